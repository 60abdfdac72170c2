"""The standard streams: closed ones and full ones are named, and a reader that leaves is no failure."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcdrop.console import progress
from mcdrop.errors import InputError
from mcdrop.streams import STANDARD_STREAM, check_place, reading, writing


@contextlib.contextmanager
def broken(place: str | int) -> Iterator[io.TextIOWrapper]:
    """A stream whose last bytes cannot be written, when it is closed neither."""
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(place, "w")))
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def write() -> None:
    with writing(STANDARD_STREAM) as stream:
        stream.write("x\n1\n")


def test_a_standard_stream_that_was_closed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by ``<&-`` and ``>&-``: Python has no stream then."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match=r"^cannot read standard input: it is closed$"), reading(STANDARD_STREAM):
        pass
    with pytest.raises(InputError, match=r"^cannot write standard output: it is closed$"):
        write()


def test_no_progress_is_shown_where_no_stream_could(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As by ``2>&-``; and where the table goes to an output that is none."""
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, None)
        for output in ("out.csv", STANDARD_STREAM):
            with progress(str(tmp_path / "rows.csv"), output) as advance:
                advance(1)


def test_a_full_standard_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with broken("/dev/full") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(InputError, match=r"^cannot write standard output: No space left on device$"):
            write()
        monkeypatch.undo()


def test_a_reader_that_has_left_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line ends quietly then."""
    reader, writer = os.pipe()
    os.close(reader)
    with broken(writer) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError):
            write()
        monkeypatch.undo()


def test_an_error_of_another_file_is_not_that_of_the_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out.csv").open("w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(FileNotFoundError, match=r"model\.bin"), writing(STANDARD_STREAM):
            (tmp_path / "model.bin").read_bytes()
        write()
    assert (tmp_path / "out.csv").read_text() == "x\n1\n"


def test_a_reader_that_leaves_a_pipe_with_a_name_is_told_as_what_it_is_too() -> None:
    """As of ``-o /dev/stdout | head -1``."""
    reader, writer = os.pipe()

    def write_when_it_has_left() -> None:
        with writing(f"/dev/fd/{writer}") as stream:
            os.close(reader)
            stream.write("x\n1\n")

    with pytest.raises(BrokenPipeError):
        write_when_it_has_left()
    os.close(writer)


def test_standard_output_takes_no_place_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where that cannot be written: nobody makes a file in /proc."""
    monkeypatch.chdir("/proc")
    check_place(STANDARD_STREAM)
    with pytest.raises(InputError, match=r"^cannot write \./-: "):
        check_place("./-")  # a file of that name is a file
