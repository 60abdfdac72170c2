"""The process around the app: takes the port, runs uvicorn, and ends with one clear line when it cannot."""

import copy
import logging
import os
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from mcdrop.errors import ArtifactError, InputError
from service.app import create_app
from service.settings import Settings

__all__ = ["serve"]


def serve(settings: Settings) -> None:
    """Serves until it is told to stop; running requests are finished.

    Raises:
        InputError: the address cannot be listened on.
        ArtifactError: the store cannot be served.
    """
    # the requests that are computed at once share the cores; torch reads this when the first model brings it in
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // settings.threads)))
    app = create_app(settings)
    registry = app.state.registry
    with _listen(settings.host, settings.port) as listener:  # before the models are loaded: a busy port is told at once
        registry.entries()
        server = uvicorn.Server(_configured(app, settings))

        def stop() -> None:
            server.should_exit = True

        registry.on_failure = stop
        host, port = listener.getsockname()[:2]
        at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logging.getLogger("service").info("mcdrop on %s, docs on %s/docs; Ctrl-C stops it", at, at)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            if not registry.ended:
                # Python would wait for the thread that loads, or, were it a daemon, end it inside torch, which aborts
                logging.shutdown()
                os._exit(0)
    if registry.problem:
        raise ArtifactError(registry.problem)


def _cores() -> int:
    """Those that this process may use, of which taskset or a container may have left it a few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from None


def _configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Uvicorn as it is, with our loggers beside its own."""
    log = copy.deepcopy(LOGGING_CONFIG)
    log["loggers"]["service"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    drain = settings.drain_seconds
    return uvicorn.Config(app, log_config=log, lifespan="on", server_header=False, timeout_graceful_shutdown=drain)
