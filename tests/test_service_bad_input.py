"""Whatever arrives, the service answers with one helpful sentence, and the next request works."""

import asyncio
import contextlib
import gc
import http.client
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from serving import PATIENCE, Server

from mcdrop.errors import MCDropError
from mcdrop.intervals import INTERVALS
from service import Settings, create_app
from service.app import STATUS
from service.limits import BodyTooLarge, BrokenBody, parse_object

GOOD = {"model": "line", "inputs": [[0.5]], "passes": 20}
MANY = "[" * 100_000


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as found:
        yield found


def refused(response: httpx.Response, status: int, *said: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 32
    body = response.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"]
    for part in said:
        assert part in body["error"]


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


BAD: dict[str, tuple[bytes, int, str]] = {
    "wrong width": (line(inputs=[[1, 2]]), 422, "must have the shape (N, 1), got (N, 2)"),
    "flat list": (line(inputs=[1, 2]), 422, "must have the shape (N, 1), got (N,)"),
    "empty batch": (line(inputs=[]), 422, "give at least one"),
    "empty row": (line(inputs=[[]]), 422, "(N, 1)"),
    "NaN": (b'{"model": "line", "inputs": [[NaN]]}', 400, "NaN is not JSON; every number must be finite"),
    "infinity": (b'{"model": "line", "inputs": [[-Infinity]]}', 400, "-Infinity is not JSON"),
    "overflow": (b'{"model": "line", "inputs": [[1e999]]}', 422, "finite"),
    "float32 overflow": (line(inputs=[[1e300]]), 422, "too large for float32"),
    "huge integer": (
        line(inputs=[[10**400]]),
        422,
        "must be numbers, got a whole number of 1329 bits, more than a float",
    ),
    "integer above float32": (line(inputs=[[10**39]]), 422, "too large for float32"),
    "endless integer": (b'{"inputs": [[' + b"1" * 5000 + b"]]}", 400, "too many digits"),
    "text": (line(inputs=[["hello"]]), 422, "'hello'"),
    "missing value": (line(inputs=[[None]]), 422, "null"),
    "ragged rows": (line(inputs=[[1], [1, 2]]), 422, "row 0 has 1 values and row 1 has 2"),
    "rows as objects": (line(inputs=[{"x": 1}]), 422, "must be numbers"),
    "inputs as text": (
        line(inputs="1,2"),
        422,
        "inputs must be a list of rows or an object of named inputs, got '1,2'",
    ),
    "no inputs": (b'{"model": "line"}', 422, "the field 'inputs' is missing"),
    "unknown input": (line(inputs={"y": [[1]]}), 422, "inputs must be named input; got y"),
    "level 95": (line(level=95), 422, "for 95 % give 0.95"),
    "level 1.0": (line(level=1.0), 422, "level must be a number between 0 and 1, got 1.0"),
    "level as text": (line(level="0.95"), 422, "level must be a valid number, got '0.95'"),
    "passes 0": (line(passes=0), 422, "passes must be a whole number from 2 to 10000, got 0"),
    "passes a billion": (line(passes=10**9), 422, "passes must be a whole number from 2 to 10000, got 1000000000"),
    "passes as text": (line(passes="100"), 422, "passes must be a valid integer, got '100'"),
    "passes as bool": (line(passes=True), 422, "passes must be a valid integer, got True"),
    "seed as float": (line(seed=1.0), 422, "seed must be a valid integer, got 1.0"),
    "negative seed": (line(seed=-1), 422, "seed must be a whole number from 0"),
    "samples as number": (line(samples=1), 422, "samples must be a valid boolean"),
    "unknown model": (line(model="nope"), 404, "unknown model 'nope'; choose one of: classes, line"),
    "unknown version": (line(version="9"), 404, "unknown version '9' of model 'line'; choose one of: 1, 2"),
    "no model": (b'{"inputs": [[1]]}', 422, "the field 'model' is missing; choose one of: classes, line"),
    "unknown interval": (
        line(interval="nope"),
        422,
        f"unknown interval 'nope'; choose one of: {', '.join(sorted(INTERVALS))}",
    ),
    "too few passes": (line(interval="quantile", passes=5), 422, "at least 39 passes"),
    "unknown fields": (
        line(tolerance=0.1, deadline_ms=5),
        422,
        "unknown field 'tolerance', 'deadline_ms'; known fields:",
    ),
    "lone surrogate": (b'{"model": "\\ud800", "inputs": [[1]]}', 404, "unknown model"),
    "field that is no text": (
        b'{"inputs": [[1]], "bogus\\ud800": 1}',
        422,
        "unknown field 'bogus\\ud800'; known fields: model, version, inputs",
    ),
    "input that is no text": (line(inputs={"\ud800": [[1]]}), 422, "inputs must be named input; got "),
    "too many rows": (line(inputs=[[0]] * 10_001), 422, "one request may have 10000 rows, got 10001"),
    "too much work": (line(inputs=[[0]] * 5000, passes=10_000), 422, "rows times passes may be 10000000"),
    "too much kept": (line(inputs=[[0]] * 5000, passes=500, samples=True), 422, "1000000 where every pass is kept"),
    "broken JSON": (b'{"inputs": [[1,', 400, "the body is not JSON: Expecting value at line 1, column 16"),
    "open text": (b'{"model": "li', 400, "the body is not JSON: Unterminated string starting at line 1, column 11"),
    "no JSON": (b"x=1&y=2", 400, "the body is not JSON"),
    "two objects": (b"{}{}", 400, "the body is not JSON: Extra data"),
    "empty body": (b"", 400, "the body is empty; send JSON such as"),
    "array": (b"[[1]]", 400, "the body must be a JSON object such as"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "not UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), 400, "not UTF-8"),
    "deep": (b'{"inputs": ' + MANY.encode(), 400, "nested too deeply"),
    "rather deep": (b'{"model": "line", "inputs": ' + b"[" * 500 + b"]" * 500 + b"}", 422, ""),
    "name twice": (b'{"model": "line", "model": "line", "inputs": [[1]]}', 400, "'model' stands more than once"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_the_next_request_works(client: httpx.Client, name: str) -> None:
    content, status, said = BAD[name]
    refused(client.post("/predict", content=content), status, said)
    assert client.post("/predict", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/predict", 405, "GET does not work on '/predict'; use POST"),
        ("PUT", "/predict", 405, "use POST"),
        ("DELETE", "/models", 405, "use GET"),
        ("POST", "/predict/", 404, "there is nothing at '/predict/'"),
        ("GET", "/", 404, "/docs lists what there is"),
        ("GET", "/models/nope", 404, "unknown model 'nope'"),
        ("GET", "/models/line?version=9", 404, "unknown version '9'"),
        ("GET", "/models/%ff%00", 404, "unknown model"),
        ("GET", "/" + "x" * 5000, 404, "xxx'"),
    ],
)
def test_unknown_routes_and_methods(client: httpx.Client, method: str, path: str, status: int, said: str) -> None:
    response = client.request(method, path)
    refused(response, status, said)
    assert len(response.text) < 300


def test_head_has_no_body(client: httpx.Client) -> None:
    response = client.head("/predict")
    assert (response.status_code, response.headers["allow"], response.content) == (405, "POST", b"")
    assert client.post("/predict", json=GOOD).status_code == 200


def test_a_hundred_megabytes_are_refused_and_never_held(server: Server, client: httpx.Client) -> None:
    chunk = b" " * 2**20
    before = server.memory_peak()
    refused(client.post("/predict", content=(chunk for _ in range(100))), 413, "at most 8388608 bytes, got more")
    declared = {"content-length": str(100 * 2**20)}
    refused(client.post("/predict", content=(chunk for _ in range(100)), headers=declared), 413, "got 104857600")
    assert server.memory_peak() - before < 40 * 2**20
    assert client.post("/predict", json=GOOD).status_code == 200


def talk(server: Server, *parts: bytes) -> bytes:
    """Sends bytes as they are, closes its side, and gives what comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as wire:
        for part in parts:
            wire.sendall(part)
        wire.shutdown(socket.SHUT_WR)
        answer = b""
        while more := wire.recv(65536):
            answer += more
    return answer


def test_a_request_that_breaks_off_harms_nobody(server: Server, client: httpx.Client) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    for parts in (
        [head, b'{"inputs": [['],
        [head],
        [b"POST /pre"],
        [head.replace(b"content-length: 1000", b"x: y"), b""],
    ):
        talk(server, *parts)
    chunked = head.replace(b"content-length: 1000", b"transfer-encoding: chunked")
    talk(server, chunked, b'5\r\n{"inp\r\nzz\r\n')
    assert client.post("/predict", json=GOOD).status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_a_refusal_leaves_the_connection_open(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.connect()
        wire = connection.sock
        for body, status in ((b"[]", 400), (line(passes=0), 422), (line(), 200)):
            connection.request("POST", "/predict", body)
            response = connection.getresponse()
            response.read()
            assert response.status == status
            assert connection.sock is wire


def test_a_client_that_sends_all_before_it_reads_is_answered_and_sent_away(server: Server) -> None:
    """A server that just closes takes its answer with it: such a client sees its connection reset."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", "/predict", bytes(20 * 2**20))
        response = connection.getresponse()
        said = json.loads(response.read())["error"]
    assert (response.status, response.headers["connection"]) == (413, "close")
    assert "at most 8388608 bytes" in said


# -- without a server --------------------------------------------------------------------------------------------------


def ask(app: FastAPI, content: bytes | AsyncIterator[bytes]) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/predict", content=content)

    return asyncio.run(once())


def loaded(store: Path, **limits: Any) -> FastAPI:
    app = create_app(Settings(store=store, **limits))
    app.state.registry.load()
    return app


def test_a_body_that_never_ends_is_given_up(store: Path) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(PATIENCE)

    refused(ask(loaded(store, body_seconds=0.05), slow()), 408, "did not arrive within 0.05 seconds")


def test_a_body_that_is_too_large_and_never_ends_is_given_up(store: Path) -> None:
    """What is left of it is read, but only for a while; the answer ends, and the connection with it."""

    async def dripping() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    response = ask(loaded(store, body_seconds=0.2, max_body_bytes=3), dripping())
    refused(response, 413, "at most 3 bytes")
    assert response.headers["connection"] == "close"


def test_an_answer_has_a_bounded_size(store: Path) -> None:
    app = loaded(store, max_numbers=50)
    assert ask(app, line()).status_code == 200
    refused(ask(app, line(inputs=[[0]] * 10)), 422, "one answer may hold 50 numbers")


def test_an_unexpected_failure_is_logged_and_says_where(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = loaded(store)
    model = app.state.registry.find("line").model
    model.references.clear()
    object.__setattr__(model, "backend", None)  # what no request can bring about
    with caplog.at_level(logging.ERROR, "service"):
        response = ask(app, line())
    refused(response, 500, "its log has the reason under " + response.headers["x-request-id"])
    (record,) = (record for record in caplog.records if record.name.startswith("service"))
    assert response.headers["x-request-id"] in record.getMessage()
    assert record.exc_info is not None
    assert "NoneType" not in response.text


def test_a_store_that_cannot_be_loaded_keeps_the_service_unready(tmp_path: Path) -> None:
    app = loaded(tmp_path / "no")
    refused(ask(app, line()), 503, "no is not a folder of models")


def test_every_status_belongs_to_errors_of_ours() -> None:
    assert all(issubclass(kind, MCDropError) for kind in STATUS)


@pytest.mark.parametrize("body", [b"{}", b' \n{"a": {"b": [1, 2.5, null, true]}}', b'{"\\u00e9": "\xc3\xa9"}'])
def test_json_is_read_as_python_reads_it(body: bytes) -> None:
    assert parse_object(body) == json.loads(body)


def test_many_names_do_not_take_long_to_compare() -> None:
    names = ",".join(f'"{i}": 0' for i in range(200_000))
    with pytest.raises(BrokenBody, match="'0' stands more than once"):
        parse_object(("{" + names + ',"0": 1}').encode())


@pytest.mark.parametrize("end", [b"[]]}", b"[]]"])
def test_many_lists_are_read_without_a_look_through_the_whole_process_for_each_few(end: bytes) -> None:
    looks: list[str] = []

    def look(phase: str, _: object) -> None:
        looks.append(phase)

    gc.callbacks.append(look)
    try:
        with contextlib.nullcontext() if end.endswith(b"}") else pytest.raises(BrokenBody):
            parse_object(b'{"inputs":[' + b"[]," * 100_000 + end)
    finally:
        gc.callbacks.remove(look)
    assert gc.isenabled()
    assert len(looks) <= 4  # before and after


def test_a_body_of_exactly_the_limit_is_read(store: Path) -> None:
    body = line()
    assert ask(loaded(store, max_body_bytes=len(body)), body).status_code == 200
    refused(ask(loaded(store, max_body_bytes=len(body) - 1), body), STATUS[BodyTooLarge], f"got {len(body)}")
