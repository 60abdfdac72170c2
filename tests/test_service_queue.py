"""Who is computed next: a bounded queue, which refuses when it is full and forgets those who have left."""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from serving import PATIENCE, in_process, until

from service import Settings, create_app
from service.queue import Left, Queue, QueueFull

LINE = {"model": "line", "version": "1", "inputs": [[0.5]], "passes": 20}


async def stays() -> None:
    """A client that never leaves."""
    await asyncio.Event().wait()


def occupied(queue: Queue, threads: int) -> tuple[threading.Event, list[asyncio.Task[bool]]]:
    """Fills the threads of a queue with work that lasts until the event is set."""
    gate = threading.Event()
    return gate, [asyncio.create_task(queue.run(lambda: gate.wait(PATIENCE), stays)) for _ in range(threads)]


async def freed(gate: threading.Event, tasks: list[asyncio.Task[bool]]) -> None:
    gate.set()
    assert await asyncio.gather(*tasks) == [True] * len(tasks)


def test_as_many_wait_as_may_and_the_next_is_told_when_to_come_back() -> None:
    async def watch() -> None:
        queue = Queue(threads=2, most_waiting=3)
        gate, running = occupied(queue, 2)
        waiting = [asyncio.create_task(queue.run(lambda: True, stays)) for _ in range(3)]
        await until(lambda: queue.waiting == 3)
        with pytest.raises(QueueFull, match=r"^3 requests are waiting already; try again in \d+ s$") as caught:
            await queue.run(lambda: True, stays)
        assert caught.value.seconds >= 1
        await freed(gate, running + waiting)
        assert await queue.run(lambda: 7, stays) == 7
        assert queue.waiting == 0

    asyncio.run(watch())


def test_who_leaves_before_its_turn_is_not_computed_and_its_place_is_free() -> None:
    async def watch() -> None:
        queue, left, done = Queue(threads=1, most_waiting=1), asyncio.Event(), list[str]()

        async def leaves() -> None:
            await left.wait()

        gate, running = occupied(queue, 1)
        abandoned = asyncio.create_task(queue.run(lambda: done.append("abandoned"), leaves))
        await until(lambda: queue.waiting == 1)
        left.set()
        with pytest.raises(Left):
            await abandoned
        patient = asyncio.create_task(queue.run(lambda: done.append("patient"), stays))
        await until(lambda: queue.waiting == 1)
        await freed(gate, running)
        await patient
        assert done == ["patient"]

    asyncio.run(watch())


def test_work_that_runs_is_finished_and_keeps_its_thread_though_its_client_has_left() -> None:
    async def watch() -> None:
        queue, started, gate, done = Queue(threads=1, most_waiting=1), threading.Event(), threading.Event(), list[str]()

        def work() -> None:
            started.set()
            gate.wait(PATIENCE)
            done.append("left")

        async def leaves() -> None:
            await until(started.is_set)

        running = asyncio.create_task(queue.run(work, leaves))
        await until(started.is_set)
        following = asyncio.create_task(queue.run(lambda: done.append("following"), stays))
        await asyncio.sleep(0.05)
        assert not done
        gate.set()
        await asyncio.gather(running, following, return_exceptions=True)
        assert done == ["left", "following"]

    asyncio.run(watch())


def test_an_error_of_the_work_reaches_its_caller_and_frees_the_place() -> None:
    def fails() -> None:
        raise ValueError("no")

    async def watch() -> None:
        queue = Queue(threads=1, most_waiting=0)
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await queue.run(fails, stays)
        assert await queue.run(lambda: 1, stays) == 1

    asyncio.run(watch())


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def served(store: Path, use: Callable[[FastAPI, str], Awaitable[None]], *, most_waiting: int) -> None:
    """Uses an app of one thread that a real server serves on 127.0.0.1."""

    async def run() -> None:
        app = create_app(Settings(store=store, threads=1, max_waiting=most_waiting))
        app.state.registry.load()
        async with in_process(app) as url:
            await use(app, url)

    asyncio.run(run())


def test_a_full_service_says_429_and_when_to_try_again(store: Path) -> None:
    async def use(app: FastAPI, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            gate, running = occupied(app.state.queue, 1)
            await until(lambda: app.state.queue._inside == 1)
            response = await client.post("/predict", json=LINE)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["content-type"] == "application/json"
            assert list(response.json()) == ["error"]
            assert "requests are waiting already" in response.json()["error"]
            assert (await client.get("/health/live")).status_code == 200
            await freed(gate, running)
            assert (await client.post("/predict", json=LINE)).status_code == 200

    served(store, use, most_waiting=0)


def test_a_request_whose_client_has_gone_is_dropped_before_it_runs(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(app: FastAPI, url: str) -> None:
        queue, body = app.state.queue, json.dumps(LINE).encode()
        head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        gate, running = occupied(queue, 1)
        for _ in range(3):  # only one may wait: each of them finds the place that the one before it has left
            _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            writer.write(head.encode() + body)
            await until(lambda: queue.waiting == 1)
            writer.close()
            await until(lambda: queue.waiting == 0)
        await freed(gate, running)

    with caplog.at_level(logging.INFO, "service"):
        served(store, use, most_waiting=1)
    assert caplog.text.count("the client left before its request was computed") == 3
    assert "Traceback" not in caplog.text
