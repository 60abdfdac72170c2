"""Bodies that are slow or too large: their clients hear of it, whenever they read, and hold up nothing."""

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from serving import PATIENCE, in_process

from service import Settings, create_app

GOOD = json.dumps({"model": "line", "version": "1", "inputs": [[0.5]], "passes": 20}).encode()
TOO_LARGE = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n" + bytes(1000)


def served(store: Path, talk: Callable[[int], None], *, drain_seconds: int | None = None, **limits: Any) -> float:
    """Has a client talk in a thread to an app that a real server serves; gives the seconds that its stop took."""

    async def run() -> float:
        app = create_app(Settings(store=store, **limits))
        app.state.registry.load()
        async with in_process(app, drain_seconds=drain_seconds) as url:
            await asyncio.to_thread(talk, int(url.rpartition(":")[2]))
            began = time.monotonic()
        return time.monotonic() - began

    return asyncio.run(run())


def read_all(wire: socket.socket) -> bytes:
    return b"".join(iter(lambda: wire.recv(65536), b""))


def test_a_slow_client_that_reads_when_it_has_sent_all_is_answered_and_may_ask_again(store: Path) -> None:
    def slow() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * 300_000
            time.sleep(0.1)

    def talk(port: int) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
            connection.connect()
            wire = connection.sock
            for body, status in ((slow(), 408), (GOOD, 200)):
                length = {"content-length": str(5 * 300_000 if status == 408 else len(GOOD))}
                connection.request("POST", "/predict", body, length)
                response = connection.getresponse()
                assert response.status == status, response.read()
                response.read()
                assert connection.sock is wire

    served(store, talk, body_seconds=0.1)


def test_a_body_that_is_too_large_is_not_waited_for_long(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.app.MOST_LEFT_SECONDS", 0.1)

    def talk(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE / 2) as wire:
            wire.sendall(TOO_LARGE)
            assert read_all(wire).startswith(b"HTTP/1.1 413 ")

    served(store, talk, body_seconds=PATIENCE)


def test_a_body_that_is_too_large_does_not_hold_up_the_stop(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    wires = []

    def talk(port: int) -> None:
        wires.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        wires[0].sendall(TOO_LARGE)
        assert wires[0].recv(12) == b"HTTP/1.1 413"

    assert served(store, talk, drain_seconds=0) < 3
    with closing(wires[0]) as wire:
        assert b"send fewer rows per request" in read_all(wire)
    assert "Traceback" not in caplog.text
