"""Who is computed next: some requests run in threads, some wait for one, and the others are refused at once."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from mcdrop.errors import MCDropError

__all__ = ["Left", "Queue", "QueueFull"]

Answer = TypeVar("Answer")

MOST_SECONDS = 60  # after which a client may try again, however long the queue is


class QueueFull(MCDropError):
    """A request that finds as many others waiting as may wait; ``seconds`` later it may find a place."""

    def __init__(self, waiting: int, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"{waiting} requests are waiting already; try again in {seconds} s")


class Left(Exception):
    """The client closed its connection before its request was computed."""


class Queue:
    """Runs work in ``threads`` threads and lets ``most_waiting`` more requests wait; belongs to one event loop."""

    def __init__(self, threads: int, most_waiting: int) -> None:
        self._threads, self._most_waiting = threads, most_waiting
        self._limiter = anyio.CapacityLimiter(threads)
        self._inside = 0
        self._seconds = 0.0  # that the latest work took

    @property
    def waiting(self) -> int:
        """How many requests wait for a thread."""
        return max(0, self._inside - self._threads)

    def check(self) -> None:
        """Asks for a place without taking it, so that a request can be refused before it is read.

        Raises:
            QueueFull: there is none.
        """
        if self._inside >= self._threads + self._most_waiting:
            left = self._seconds * self._inside / self._threads
            raise QueueFull(self.waiting, min(max(1, math.ceil(left)), MOST_SECONDS))

    async def run(self, work: Callable[[], Answer], gone: Callable[[], Coroutine[Any, Any, None]]) -> Answer:
        """Gives what ``work`` gives in a thread; what runs there is finished, whoever has left.

        Raises:
            QueueFull: as many requests wait as may wait.
            Left: ``gone`` ended before.
        """
        self.check()
        self._inside += 1
        watching = asyncio.create_task(gone())
        try:
            with anyio.CancelScope() as scope:
                watching.add_done_callback(lambda _: scope.cancel())
                answer, self._seconds = await anyio.to_thread.run_sync(_timed, work, limiter=self._limiter)
                return answer
            raise Left("the client left before its request was computed")
        finally:
            self._inside -= 1
            watching.cancel()


def _timed(work: Callable[[], Answer]) -> tuple[Answer, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began
