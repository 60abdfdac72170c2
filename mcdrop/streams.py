"""Where files are read and written: text in UTF-8, ``-`` for the standard streams, new files whole or not at all."""

import errno
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mcdrop.errors import InputError

__all__ = ["STANDARD_STREAM", "check_place", "check_stays", "explained", "path_of", "reading", "whole", "writing"]

STANDARD_STREAM = "-"


def path_of(place: object) -> Path:
    """Gives the path that a text or a path stands for.

    Raises:
        InputError: it is something else, or holds a character that no path can.
    """
    named = os.fspath(place) if isinstance(place, str | os.PathLike) else None
    if not isinstance(named, str) or "\0" in named:
        raise InputError(f"a place for files must be a text or a pathlib.Path without null characters, got {place!r}")
    return Path(named)


@contextmanager
def explained(verb: str, place: str | Path) -> Iterator[None]:
    """Turns an error of the system into one of ours that names what was to be done, and the place.

    Not that of a pipe whose reader has left.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read it has left, which is no failure of ours
            raise
        raise InputError(f"cannot {verb} {place}: {error.strerror or error}") from None


@contextmanager
def reading(source: str | Path) -> Iterator[TextIO]:
    """Gives the text of a file, or of standard input.

    Raises:
        InputError: it cannot be read.
    """
    if str(source) == STANDARD_STREAM:
        with _standard(sys.stdin, "utf-8-sig", "read standard input") as stream:
            yield stream
    else:
        with explained("read", source), Path(source).open(encoding="utf-8-sig", newline="") as opened:
            yield opened


@contextmanager
def writing(target: str | Path) -> Iterator[TextIO]:
    """Takes the text of a file, or of standard output.

    Raises:
        InputError: it cannot be written.
    """
    if str(target) == STANDARD_STREAM:
        with _standard(sys.stdout, "utf-8", "write standard output") as stream:
            yield stream
    else:
        with whole(target) as beside, beside.open("w", encoding="utf-8", newline="") as opened:
            yield opened


def check_stays(source: str | Path) -> None:
    """Checks that what is to be read twice is still there after the first time, without reading it.

    Raises:
        InputError: it is a pipe, a device or standard input, or it is not there.
    """
    if str(source) != STANDARD_STREAM:
        with explained("read", source):
            mode = Path(source).stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # why a folder cannot be read is told when it is opened
            return
    raise InputError(f"{source} is no file, and it is read twice; save the rows to a file first")


@contextmanager
def whole(target: str | Path) -> Iterator[Path]:
    """Gives the place beside a file where it is to be written; renames it when all is done, and else removes it.

    Raises:
        InputError: it cannot be written.
    """
    with explained("write", target):
        if _is_written_in_place(Path(target)):
            yield Path(target)
            return
        _check_own(target)
        place = Path(target).resolve()  # a link stays a link, to the new file
        beside = _beside(place)
        try:
            yield beside
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)


def check_place(target: str | Path) -> None:
    """Tries whether a file can be written, before the work is done that it is to hold; standard output is no file.

    Raises:
        InputError: it cannot.
    """
    if str(target) == STANDARD_STREAM:
        return
    with explained("write", target):
        if Path(target).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_written_in_place(Path(target)):
            _check_own(target)
            _beside(Path(target).resolve()).unlink()


def _is_written_in_place(target: Path) -> bool:
    """Whether it is a pipe or a device, which is not replaced; a folder is one too, and cannot be opened.

    The path is taken as it is given: where ``/dev/stdout`` is a pipe, it leads to no path that could be resolved.
    """
    return target.exists() and not target.is_file()


def _check_own(target: str | Path) -> None:
    """Refuses a file that somebody else has open under a number: what they wrote to it would be lost."""
    if str(target).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        raise InputError(f"{target} leads to a file that is open already, and would be replaced; give the file's name")


def _beside(place: Path) -> Path:
    """Makes an empty file of a name that nobody else has, with the mode of the file whose place it is to take."""
    beside = place.with_name(f".{place.name[:64]}.{secrets.token_hex(8)}.part")
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    if place.exists():
        beside.chmod(stat.S_IMODE(place.stat().st_mode))
    return beside


@contextmanager
def _standard(opened: TextIO | None, encoding: str, doing: str) -> Iterator[TextIO]:
    """Python has None for a stream that was closed before it began, as by ``>&-``."""
    if opened is None:
        raise InputError(f"cannot {doing}: it is closed")
    stream = io.TextIOWrapper(opened.buffer, encoding=encoding, newline="")
    try:
        try:
            yield stream
        finally:
            stream.detach()  # flushes, and leaves open what is not ours to close
    except OSError as error:
        with suppress(OSError, ValueError):  # what could not be written would be tried again
            stream.close()
        if error.errno == errno.EPIPE:  # whoever read it has left, which is no failure of ours
            raise
        if error.filename is not None:  # that of another file, which was used meanwhile
            raise
        raise InputError(f"cannot {doing}: {error.strerror or error}") from None
