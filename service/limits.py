"""The door: a request body is read with a bound and parsed strictly, before anything trusts it."""

import asyncio
import gc
import json
import reprlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from mcdrop.errors import MCDropError

__all__ = ["BodyTooLarge", "BrokenBody", "SlowBody", "parse_object", "read_body"]

EXAMPLE = '{"inputs": [[0.5]]}'


class BodyTooLarge(MCDropError):
    """A body with more bytes than one request may have."""

    def __init__(self, given: str, limit: int) -> None:
        super().__init__(f"the body must have at most {limit} bytes, got {given}; send fewer rows per request")


class BrokenBody(MCDropError):
    """A body that is not one JSON object."""


class SlowBody(MCDropError):
    """A body that did not arrive in time."""


async def read_body(chunks: AsyncIterator[bytes], *, declared: str | None, limit: int, seconds: float) -> bytes:
    """Collects a body of at most ``limit`` bytes that arrives within ``seconds``.

    ``declared`` is its Content-Length: a body that says that it is too large is refused unread, one that does not say
    as soon as it is, so that no request holds more than the limit in memory.

    Raises:
        BodyTooLarge: it has more bytes.
        SlowBody: it takes longer.
    """
    if declared is not None and declared.isdecimal() and int(declared[:20]) > limit:
        raise BodyTooLarge(declared[:20], limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in chunks:
                if len(body) + len(chunk) > limit:
                    raise BodyTooLarge("more", limit)
                body += chunk
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {seconds:g} seconds; send fewer rows per request") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Reads one JSON object: UTF-8, no NaN, no name twice.

    Raises:
        BrokenBody: anything else, in one sentence.
    """
    if not body.strip():
        raise BrokenBody(f"the body is empty; send JSON such as {EXAMPLE}")
    try:
        text = body.decode("utf-8-sig")
        with _uncollected():
            parsed = json.loads(text, parse_constant=_not_json, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError:
        raise BrokenBody("the body is not UTF-8 text; send JSON in UTF-8, not compressed") from None
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" at")  # some of them end so
        raise BrokenBody(f"the body is not JSON: {said} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BrokenBody("the body is nested too deeply; inputs are lists of rows") from None
    except ValueError:  # an integer of thousands of digits, which Python refuses to read
        raise BrokenBody("the body holds a number with too many digits") from None
    if not isinstance(parsed, dict):
        raise BrokenBody(f"the body must be a JSON object such as {EXAMPLE}, got {reprlib.repr(parsed)}")
    return parsed


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps Python's collector away, which goes through the whole process again for every few hundred lists."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _not_json(constant: str) -> NoReturn:
    raise BrokenBody(f"{constant} is not JSON; every number must be finite")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise BrokenBody(f"the name {reprlib.repr(name)} stands more than once in one object")
            seen.add(name)
    return found
