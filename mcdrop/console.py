"""What the commands have in common: where they may write, what they tell on stderr, and how they end when told to."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import typer

from mcdrop.errors import InputError, UnknownName
from mcdrop.store import MANIFEST
from mcdrop.streams import STANDARD_STREAM

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from mcdrop.model import Model

__all__ = ["check_output", "checked", "load", "note", "note_not_finite", "progress", "terminable", "waiting"]

_OF_TABLES = (".arrow", ".csv", ".feather", ".json", ".jsonl", ".parquet", ".pq", ".tsv", ".txt", ".xls", ".xlsx")
_OF_NETWORKS = (".onnx", ".pt", ".pt2", ".pth", ".safetensors")
_FORMATS = (*_OF_TABLES, *_OF_NETWORKS, ".gz", ".zip")


def check_output(
    output: str | Path, *, suffixes: Iterable[str], inputs: Iterable[str | Path], hint: str = "--output"
) -> None:
    """Calls an output wrong usage that would replace an input, lie in a model folder, or be of another format.

    Standard output takes tables alone.

    Args:
        output: the file to write.
        suffixes: those of the formats that the command writes; a suffix that is of no format is fine too.
        inputs: what the command reads.
        hint: how the command calls its output.

    Raises:
        typer.BadParameter: it is one of these.
    """
    target = Path(output)
    suffix = target.suffix.lower()
    if str(output) == STANDARD_STREAM:
        if not {*suffixes}.isdisjoint(_OF_TABLES):
            return
        problem = f"standard output takes no network; give a file with the suffix {' or '.join(suffixes)}"
    elif any(_same_file(Path(source), target) for source in inputs):
        problem = "the output would replace the input; choose another file"
    elif (target.resolve().parent / MANIFEST).is_file():
        problem = f"{target.parent} is a model folder, which holds the model alone; choose another folder"
    elif suffix in _FORMATS and suffix not in suffixes:
        problem = f"this command does not write {suffix}; choose one of: {', '.join(suffixes)}"
    else:
        return
    raise typer.BadParameter(problem, param_hint=hint)


def _same_file(source: Path, target: Path) -> bool:
    return source.exists() and target.exists() and source.samefile(target)


def checked(name: str, help: str, **more: Any) -> Any:
    """Gives an option whose bad values are wrong usage, before any work is done."""

    def check(value: Any) -> Any:
        try:
            return value if value is None else _checked(name, value)
        except InputError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(callback=check, help=help, **more)


def _checked(name: str, value: Any) -> Any:
    """Gives what the library makes of an option; what is heavy is imported when there is one."""
    from mcdrop.conformal import CONFORMAL
    from mcdrop.model import Options
    from mcdrop.screening import SCORES, check_fdr, check_fpr

    tables: dict[str, tuple[str, Iterable[str]]] = {
        "method": ("calibration method", CONFORMAL),
        "score": ("score", SCORES),
    }
    rates = {"fdr": check_fdr, "fpr": check_fpr}
    if name in tables:
        what, known = tables[name]
        UnknownName.check(what, value, known)
        return value
    if name in rates:
        return rates[name](value, sys.maxsize)  # what the rows resolve is checked where they are counted
    return getattr(Options(**{name: value}), name)


def note(text: str) -> None:
    """Prints a line that is no error on stderr."""
    typer.echo(f"note: {text}", err=True)


def note_not_finite(lost: int, rows: int, what: str) -> None:
    """Prints how many rows have outputs or scores that are infinite or NaN, where there are any."""
    if lost:
        note(f"{lost} of {rows} rows have {what} that are not finite numbers")


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP, which comes when a terminal is closed, end what runs as Ctrl-C does.

    So no half-written file is left. The exit code is 128 and the signal's number: 143 and 129.
    """
    if threading.current_thread() is not threading.main_thread():  # another thread cannot take signals
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with ExitStack() as undo:
        for one in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
            if signal.getsignal(one) is signal.SIG_DFL:  # what others do on a signal, such as nohup, stays theirs
                undo.callback(signal.signal, one, signal.signal(one, end))
        yield


def load(model: Path, devices: Sequence[str] | None = None) -> "Model":
    """Loads a model, which takes a while where it is large: each of its draws is proved anew."""
    from mcdrop.artifact import load

    with waiting("loading the model"):
        return load(model, devices=devices or ())


@contextmanager
def progress(source: str, output: str, doing: str = "predicting") -> Iterator[Callable[[int], None]]:
    """Gives what is to be told the bytes that were read; shows a bar on a terminal that prints nothing else."""
    console = None if output == STANDARD_STREAM and _is_terminal(sys.stdout) else _console()
    if console is None:
        yield lambda position: None
        return
    from rich.progress import Progress

    from mcdrop.files import size_of

    bar = Progress(console=console, transient=True, redirect_stdout=False)
    task = bar.add_task(doing, total=size_of(source))
    with _shown(bar):
        yield lambda position: bar.update(task, completed=position)


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Shows on a terminal that something is being done, and for how long, where nobody can tell how much is left."""
    console = _console()
    if console is None:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    # stderr stays as it is: what a network's own code makes of it meanwhile, such as a logger, stays for good
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task(doing, total=None)
    with _shown(bar):
        yield


@contextmanager
def _shown(bar: "Progress") -> Iterator[None]:
    """Shows a bar for the while; a terminal that is closed meanwhile ends nothing."""
    try:
        with suppress(OSError):
            bar.start()
        yield
    finally:
        with suppress(OSError):
            bar.stop()


def _console() -> "Console | None":
    """What writes to stderr, where that is a terminal which can take back what it shows."""
    if not _is_terminal(sys.stderr):
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


def _is_terminal(stream: TextIO | None) -> bool:
    """Python has None for a stream that was closed before it began, as by ``2>&-``."""
    return stream is not None and stream.isatty()
