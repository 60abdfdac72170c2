"""The app: routes that convert, delegate and answer, and one table from errors to status codes."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mcdrop import __version__
from mcdrop.errors import InputError, MCDropError, ModelNotFound, ModelRefused
from service.limits import BodyTooLarge, BrokenBody, SlowBody, read_body
from service.queue import Left, Queue, QueueFull
from service.registry import NotReady, Registry
from service.schemas import (
    ErrorBody,
    ModelList,
    ModelPage,
    PredictRequest,
    PredictResponse,
    dump,
    model_entry,
    model_page,
)
from service.settings import Settings
from service.work import answer

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

STATUS: dict[type[MCDropError], int] = {
    BrokenBody: 400,
    ModelNotFound: 404,
    SlowBody: 408,
    BodyTooLarge: 413,
    InputError: 422,
    ModelRefused: 422,  # rows that take another way through the network than its example
    QueueFull: 429,
    NotReady: 503,
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in sorted({*STATUS.values(), 405, 500})
}
LOOKUP_ERRORS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (404, 405, 500, 503)}
PREDICT_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": PredictRequest.model_json_schema()}}}
}

MOST_LEFT_SECONDS = 5.0  # for throwing away what is left of a body that is too large; a stop waits for it

router = APIRouter()


def create_app(settings: Settings | None = None) -> FastAPI:
    """Builds the service; without ``settings`` they come from the environment."""
    settings = settings or Settings()
    app = FastAPI(
        title="mcdrop",
        version=__version__,
        summary="Predictions with their uncertainty, by Monte Carlo dropout",
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a redirect is no JSON answer
    )
    app.state.settings = settings
    app.state.registry = Registry(settings.store, settings.default_model, settings.devices)
    app.state.queue = Queue(settings.threads, settings.max_waiting)
    app.add_middleware(Guard)
    app.add_exception_handler(MCDropError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.include_router(router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts to load the models and lets requests in at once: until they are there, only the health routes say 200."""
    loading = asyncio.create_task(anyio.to_thread.run_sync(app.state.registry.load, abandon_on_cancel=True))
    if app.state.settings.wait_for_models:
        await loading
    try:
        with suppress(asyncio.CancelledError):  # a second Ctrl-C ends the server so, which is no failure to be logged
            yield
    finally:
        loading.cancel()


@router.post("/predict", responses={200: {"model": PredictResponse}, **ERRORS}, openapi_extra=PREDICT_BODY)
async def predict(request: Request) -> Response:
    """Predicts rows: mean, variance, an interval, and whether a row is an anomaly."""
    state = request.app.state
    state.registry.models()  # a service that is not ready, or has too much to do, says so before it reads megabytes
    state.queue.check()
    request.state.body = request.stream()
    body = await read_body(
        request.state.body,
        declared=request.headers.get("content-length"),
        limit=state.settings.max_body_bytes,
        seconds=state.settings.body_seconds,
    )
    work = partial(answer, body, state.registry, state.settings)
    return _json(await state.queue.run(work, gone=partial(_gone, request)))


async def _gone(request: Request) -> None:
    """Ends when the client closes its connection; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/models", responses={200: {"model": ModelList}, **LOOKUP_ERRORS})
async def list_models(request: Request) -> Response:
    """Lists every version of every model."""
    models = request.app.state.registry.models()
    entries = [model_entry(served.model) for versions in models.values() for served in versions.values()]
    return _json(dump({"models": entries}))


@router.get("/models/{name}", responses={200: {"model": ModelPage}, **LOOKUP_ERRORS, 422: ERRORS[422]})
async def show_model(request: Request, name: str, version: str | None = None) -> Response:
    """Shows a model and its audit: which random draws it has, and which of them are live."""
    served = request.app.state.registry.find(name, version)
    drift = None if served.watch is None else served.watch.state
    return _json(dump(model_page(served.model, served.manifest, drift)))


@router.get("/health/live")
async def live() -> Response:
    """Answers as long as the process runs."""
    return _json(dump({"live": True}))


@router.get("/health/ready", responses={503: {"model": ErrorBody}})
async def ready(request: Request) -> Response:
    """Answers 200 once every model is loaded, 503 before."""
    try:
        request.app.state.registry.models()
    except NotReady as error:
        return _json(dump({"ready": False, "error": str(error)}), 503)
    return _json(dump({"ready": True}))


class Guard:
    """Gives every request an id, and turns whatever else went wrong into a logged 500 with that id.

    Plain ASGI: a wrapper that reads requests itself would hide a client's leaving. Nothing may reach the server's own
    handler either, which closes the connection under the client's next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started = uuid.uuid4().hex, False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except (ClientDisconnect, Left) as error:
            said = str(error) or "the client left before its body was here"
            logger.info("request %s: %s", request_id, said)
        except asyncio.CancelledError:  # the server does so to what is left when its time to stop is over
            if started:
                raise
            said = "the service is stopping, and this request was not done in time; send it again"
            await _error(503, said, {"retry-after": "1"})(scope, receive, tagged)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not started:
                said = f"the service failed on this request; its log has the reason under {request_id}"
                await _error(500, said)(scope, receive, tagged)


class Last(Response):
    """An answer given before the end of a body, after which the connection is closed.

    Many clients read nothing before they have sent everything, and one that sends to a closed connection loses the
    answer: what is left of the body is read and thrown away, for some seconds at most. A server that stops ends that.
    """

    def __init__(self, answer: Response, left: AsyncIterator[bytes], seconds: float) -> None:
        super().__init__(answer.body, answer.status_code, {**answer.headers, "connection": "close"})
        self.left, self.seconds = left, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError, ClientDisconnect, asyncio.CancelledError):  # all was said, whatever ends this
            async with asyncio.timeout(self.seconds):
                async for _ in self.left:
                    pass
        await send({"type": "http.response.body"})


async def _refused(request: Request, error: Exception) -> Response:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    if status == 500:
        logger.error("%s %s: %s", request.method, request.url.path, error)
    later = error.seconds if isinstance(error, QueueFull) else 1 if status == 503 else None
    answer = _error(status, str(error), None if later is None else {"retry-after": str(later)})
    if isinstance(error, BodyTooLarge):  # not SlowBody: its client needs longer than any wait, and uvicorn reads on
        return Last(answer, request.state.body, min(request.app.state.settings.body_seconds, MOST_LEFT_SECONDS))
    return answer


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    said = str(error.detail)
    if error.status_code == 404:
        said = f"there is nothing at {path!r}; /docs lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        said = f"{request.method[:20]} does not work on {path!r}; use {allowed}"
    return _error(error.status_code, said, error.headers)


async def _bad_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
    return _error(422, said)


def _json(body: bytes, status: int = 200, headers: Any = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def _error(status: int, said: str, headers: Any = None) -> Response:
    return _json(dump({"error": " ".join(said.split())}), status, headers)
