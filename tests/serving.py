"""Real servers for tests, on a free port of 127.0.0.1: ``mcdrop serve`` in a process of its own, or an app in ours."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds in which a server must be ready, or gone


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def memory_peak(self) -> int:
        """The most bytes that its process has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def stop(self) -> int:
        """Asks it to stop as a container does, and waits."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def start(store: Path, log: Path, *, port: int = 0, **settings: int) -> subprocess.Popen[bytes]:
    """Starts a server whose warnings are errors; settings reach it by their variables."""
    environment = {**os.environ, **{f"MCDROP_{name.upper()}": str(value) for name, value in settings.items()}}
    command = [sys.executable, "-W", "error", "-m", "service", str(store), "--port", str(port)]
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)


@contextmanager
def running(store: Path, log: Path, **settings: int) -> Iterator[Server]:
    """Gives a server that is ready, and ends it."""
    process = start(store, log, **settings)
    try:
        yield Server(_ready(process, log), process, log)
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"mcdrop on (http://\S+),", log.read_text())
        try:
            if found and httpx.get(f"{found[1]}/health/ready").status_code == 200:
                return found[1]
        except httpx.TransportError:
            pass  # the port is taken, and nobody answers yet
        time.sleep(0.05)
    raise AssertionError(f"the server is not ready:\n{log.read_text()}")


async def until(true: Callable[[], bool]) -> None:
    """Waits for something that happens in this event loop."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def in_process(app: FastAPI, *, drain_seconds: int | None = None) -> AsyncIterator[str]:
    """Serves an app in this event loop, and gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=drain_seconds)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listener]))
        try:
            await until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running
