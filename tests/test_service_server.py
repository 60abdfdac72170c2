"""The process of the service: how it ends while it loads, and what it takes of the machine."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serving import PATIENCE, ROOT, until

LOADING = """
import signal, threading
from service import server, settings
from service.registry import Registry
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
Registry.load = lambda self: threading.Event().wait()  # of models that take for ever
server.serve(settings.Settings(store={store!r}, port=0))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopping_does_not_wait_for_models_that_are_being_loaded(
    store: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    log = tmp_path / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", LOADING.format(store=str(store))], cwd=ROOT, stdout=stream, stderr=stream
        )
    try:
        asyncio.run(until(lambda: "startup complete" in log.read_text() or process.poll() is not None))
        process.send_signal(sent)
        assert process.wait(PATIENCE) == {signal.SIGINT: 0, signal.SIGTERM: -signal.SIGTERM}[sent]
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="nobody can be kept to some cores here")
def test_cores_are_those_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from service import server"
    told = subprocess.run([sys.executable, "-c", f"{code}; print(server._cores())"], cwd=ROOT, stdout=subprocess.PIPE)
    assert told.stdout == b"1\n"
