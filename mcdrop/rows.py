"""Rows: what a network is given, as leaves whose first dimension is the rows."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError

__all__ = ["Rows", "by_name", "check_dense", "check_named", "check_spelling", "column_names", "listed", "numbers"]

_NOT_PLAIN = {  # what no network is given as rows, and why or what to give instead
    "is_meta": "one on the meta device holds no numbers",
    "is_nested": "of a nested one give to_padded_tensor(0.0)",
    "is_quantized": "of a quantized one give dequantize()",
}


@dataclass(frozen=True)
class Rows:
    """One batch of inputs: positional leaves and keyword leaves, all with the same number of rows.

    A leaf is a numpy array, or a tensor that is passed through as it is. ``unseen`` are tensors on a GPU whose numbers
    nobody has looked at yet, with their names. ``names`` are those that all leaves were given under, if any.
    """

    ONE_ROW = "; make rows that need one another, as nodes of a graph, one row: forward(x) gives net(x[0], edges)[None]"

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int
    unseen: list[tuple[str, Any]] = field(default_factory=list, compare=False, repr=False)
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, x: Any, *, later: bool = False, hint: str = "") -> "Rows":
        """Reads an array or tensor, a tuple of positional inputs, or a dict of keyword inputs.

        Numbers on a GPU may be looked at ``later``, since it takes as long to hear of them as to run a small network:
        whoever runs it does so, or calls ``look``. The ``hint`` is for inputs of unequal numbers of rows.

        Raises:
            InputError: text, ragged rows, no rows, a number that is not finite, leaves of unequal length, or a tensor
                that holds no plain numbers.
        """
        if isinstance(x, Rows):
            return x
        if hasattr(x, "detach") or hasattr(x, "shape"):  # a single tensor or array, which is neither of the others
            named = {"inputs": x}
        elif isinstance(x, tuple):
            named = {f"input {i}": value for i, value in enumerate(x)}
        else:
            named = {repr(name): value for name, value in x.items()} if isinstance(x, Mapping) else {"inputs": x}
        leaves = {name: _leaf(value, name) for name, value in named.items()}
        by_name = dict(zip(x, leaves.values(), strict=True)) if isinstance(x, Mapping) else {}
        rows = cls._counted(() if by_name else tuple(leaves.values()), by_name, hint)
        rows.unseen.extend((name, leaf) for name, leaf in leaves.items() if hasattr(leaf, "detach"))
        if not later or not all(leaf.is_cuda for _, leaf in rows.unseen):
            rows.look()
        return rows

    @classmethod
    def _counted(cls, args: tuple[Any, ...], kwargs: dict[str, Any], hint: str) -> "Rows":
        """Puts leaves of equally many rows together."""
        counts = {leaf.shape[0] for leaf in (*args, *kwargs.values())}
        if not counts:
            raise InputError("no inputs were given")
        if len(counts) > 1:
            raise InputError(f"all inputs must have the same number of rows, got {sorted(counts)}{hint}")
        if counts == {0}:
            raise InputError("inputs hold no rows; give at least one")
        return cls(args, kwargs, counts.pop())

    def look(self) -> None:
        """Looks at the numbers that nobody has looked at.

        Raises:
            InputError: one is not finite.
        """
        for name, leaf in self.unseen:
            # a sum is finite only where all of it is, and cheaper; one that overflows is looked at number by number
            if leaf.is_floating_point() and not math.isfinite(leaf.sum()) and not bool(leaf.isfinite().all()):
                raise InputError(f"{name} must be finite numbers; {_first_bad(leaf.float().cpu().numpy())}")
        self.unseen.clear()

    @property
    def leaves(self) -> tuple[Any, ...]:
        """All leaves, the positional ones first."""
        return (*self.args, *self.kwargs.values())

    def named(self) -> Iterator[tuple[str, Any]]:
        """Walks over (name, leaf); positional leaves are named by their position."""
        yield from ((str(i), leaf) for i, leaf in enumerate(self.args))
        yield from self.kwargs.items()

    def map(self, change: Callable[[Any], Any]) -> "Rows":
        """Gives the same inputs with every leaf changed; the change may alter the number of rows."""
        self.look()
        args = tuple(change(leaf) for leaf in self.args)
        kwargs = {name: change(leaf) for name, leaf in self.kwargs.items()}
        return Rows(args, kwargs, len((*args, *kwargs.values())[0]), names=self.names)

    def take(self, which: Any) -> "Rows":
        """Gives the chosen rows: a slice or an index array."""
        return self.map(lambda leaf: leaf[which])

    def copy(self) -> "Rows":
        """Gives the same inputs in memory of their own, which nobody else writes to or keeps alive."""
        return self.map(lambda leaf: leaf.clone() if hasattr(leaf, "detach") else leaf.copy())

    def split(self, size: int) -> Iterator["Rows"]:
        """Cuts into blocks of at most ``size`` rows."""
        for begin in range(0, self.count, size):
            yield self if size >= self.count else self.take(slice(begin, begin + size))


def by_name(x: Any, names: Sequence[str] | None) -> Any:
    """Gives the named columns of a data frame, in the order of the names; anything else as it is.

    So is a frame without names of its own, whose columns are numbered.

    Raises:
        InputError: a column is missing.
    """
    columns = list(x.columns) if names and hasattr(x, "columns") else []
    if not names or not any(isinstance(column, str) for column in columns):
        return x
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"the rows have no column {', '.join(missing)}; the model reads {', '.join(names)}")
    return x[list(names)]


def column_names(x: Any) -> list[str] | None:
    """Gives the names of a data frame's columns; None where they are numbered or not told apart, and of all else."""
    columns = list(x.columns) if hasattr(x, "columns") else []
    bare = {column.strip() for column in columns if isinstance(column, str)}  # as tables have them
    return [str(column) for column in columns] if columns and len(bare) == len(columns) else None


def check_named(names: Sequence[str], header: Sequence[str], table: str) -> None:
    """Refuses a table whose header lacks a column that is read by its name.

    Raises:
        InputError: a column is missing, or spelt in another way.
    """
    if missing := [name for name in names if name not in header]:
        check_spelling(missing, [name for name in header if name not in names], table)
        many = "s" * (len(missing) > 1)
        raise InputError(f"{table} lacks the column{many} {listed(missing)}; the model takes {listed(names)}")


def listed(names: Sequence[str]) -> str:
    """Gives names in quotes, of many the first eight and how many more."""
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_spelling(missing: Iterable[str], others: Iterable[str], name: str) -> None:
    """Refuses other columns whose names differ from a missing one only in case, blanks around or how letters are coded.

    Raises:
        InputError: there is one; it may be meant, or may not.
    """
    alike = {_folded(other): other for other in others}
    for feature in missing:
        if (found := alike.get(_folded(feature))) is not None:
            shown = ascii if normalize("NFC", found) == normalize("NFC", feature) else repr  # else they look the same
            raise InputError(
                f"{name} has a column {shown(found)}, but the model takes {shown(feature)}; rename the column"
            )


def _folded(name: str) -> str:
    return normalize("NFKC", normalize("NFKC", name).casefold()).strip()


def check_dense(value: Any, name: str) -> None:
    """Checks a single tensor.

    Raises:
        InputError: it is a sparse one.
    """
    layout = str(getattr(value, "layout", "torch.strided"))
    if layout.startswith("torch.sparse"):
        raise InputError(f"{name} must be dense, got a tensor of layout {layout}; give to_dense() of it")


def _check_plain(value: Any, name: str) -> None:
    """Refuses a tensor without numbers of its own, or without rows of one length."""
    for kind, why in _NOT_PLAIN.items():  # no list: it is asked of every tensor in a list
        if getattr(value, kind, False):
            raise InputError(f"{name} must be a plain tensor; {why}")


def numbers(value: Any, name: str, *, finite: bool = True) -> NDArray[Any]:
    """Gives numbers as an array: of a tensor on any device, or of what ``Rows.of`` reads.

    Raises:
        InputError: text, ragged rows, a single number, a sparse tensor or one without numbers, or a number that is not
            finite though all are to be.
    """
    check_dense(value, name)
    _check_plain(value, name)
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    array: NDArray[Any] = _leaf(value, name, finite=finite)
    return array


def _leaf(value: Any, name: str, *, finite: bool = True) -> Any:
    if hasattr(value, "detach"):  # a tensor: left alone, so that it stays on its device
        _check_plain(value, name)
        leaf = value.detach()
        if leaf.ndim == 0:
            raise InputError(f"{name} must have rows as its first dimension, got a single number")
        if leaf.is_complex():
            raise InputError(f"{name} must be numbers, got values of type {leaf.dtype}")
        if leaf.is_floating_point() and leaf.element_size() < 2:
            raise InputError(f"{name} must be numbers of at least 16 bits, got {leaf.dtype}; give float() of them")
        return leaf
    if isinstance(value, list) and value and hasattr(value[0], "detach"):
        for item in value:
            _check_plain(item, name)
        value = [item.detach().cpu() if hasattr(item, "detach") else item for item in value]
    if np.ma.is_masked(value):
        raise InputError(f"{name} must have no masked values; {_first(np.ma.getmaskarray(value), 'is masked')}")
    try:
        leaf = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} must be rows of equal length; {_ragged(value)}") from None
    leaf = _of_objects(leaf) if leaf.dtype.kind == "O" else leaf
    if leaf.dtype.kind not in "fiub":
        raise InputError(f"{name} must be numbers, got {_text(value, leaf)}")
    if leaf.ndim == 0:
        raise InputError(f"{name} must have rows as its first dimension, got a single number")
    if finite and leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
        raise InputError(f"{name} must be finite numbers; {_first_bad(leaf)}")
    return leaf


def _of_objects(leaf: NDArray[Any]) -> NDArray[Any]:
    """Reads numbers of several types, as data frames give them; what holds anything else is given as it is.

    Whole numbers stay so, but for those of more than 64 bits: JavaScript writes 1e20 without an exponent.
    """
    try:
        if any(_not_numbers(leaf[()])):
            return leaf
        whole = np.asarray(leaf.tolist())
        return whole if whole.dtype.kind in "iub" and whole.shape == leaf.shape else leaf.astype(np.float64)
    except (TypeError, ValueError):
        return leaf


def _first_bad(leaf: NDArray[Any]) -> str:
    bad = ~np.isfinite(leaf)
    return _first(bad, f"holds {leaf[bad][0]}")


def _first(bad: NDArray[np.bool_], said: str) -> str:
    """Names the first place."""
    row, *place = np.argwhere(bad)[0].tolist()
    return f"row {row} {said}" + (f" at {place}" if place else "")


def _ragged(value: Any) -> str:
    lengths: dict[object, int] = {}
    for i, row in enumerate(value):
        lengths.setdefault(len(row) if hasattr(row, "__len__") else "a single number", i)
    if len(lengths) < 2:
        return "some row is nested unevenly"
    (first, i), (second, j) = list(lengths.items())[:2]
    return f"row {i} has {first} values and row {j} has {second}"


def _text(value: Any, leaf: NDArray[Any]) -> str:
    """Names the first thing in nested rows that is not a number."""
    found = next(_not_numbers(value if isinstance(value, list | tuple) else leaf[()]), None)
    return found or (f"values of type {leaf.dtype}" if leaf.ndim else f"one object of type {type(value).__name__}")


def _not_numbers(value: Any) -> Iterator[str]:
    if isinstance(value, str | bytes):
        yield f"the text {value[:40]!r}"
    elif value is None or type(value).__name__ in ("NAType", "NaTType"):  # the last two are those of pandas
        yield "a missing value (null)"
    elif isinstance(value, np.generic) and value.dtype.kind not in "fiub":
        yield f"values of type {value.dtype}"
    elif isinstance(value, Mapping):
        yield "an object where a row or a number should be"
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        yield f"a whole number of {value.bit_length()} bits, more than a float64 can hold"
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        for item in value:
            yield from _not_numbers(item)
