"""How many digits are multiplied with, whatever stands around: all of them, or on a GPU those of tf32.

Torch's switch for tf32 is one for the whole process, and on for convolutions. Whoever computes says which way it has to
stand. Those who agree go on side by side; others wait for their turn, and the last one puts it back. Automatic casts
(``torch.autocast``) are each thread's own, and off; a network that enters them in its forward has them there.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["WIDE", "digits", "tolerance"]

WIDE = frozenset({torch.float64, torch.int64, torch.int32})  # what float32 would round

_MATMUL: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn
_TURN = threading.Condition()
_AS_IT_IS = nullcontext()
_CASTING = frozenset({"cpu", "cuda", "mps", "xpu"})  # torch does not take the question for others, such as "meta"
_MINE = threading.local()


@dataclass
class _Switch:
    """How it stands, for how many, how many wait, and how often it was set anew."""

    tf32: bool = False
    inside: int = 0
    waiting: int = 0
    turns: int = 0
    before: tuple[Any, ...] = ()


_SWITCH = _Switch()


def digits(device: torch.device, *, tf32: bool = False) -> AbstractContextManager[None]:
    """In which a device multiplies float32 with all digits, or a GPU in tf32.

    It may be entered again by who is in it, for the same; RuntimeError for the other.
    """
    kind = device.type
    casts = kind in _CASTING and torch.is_autocast_enabled(kind)
    uncast = torch.autocast(kind, enabled=False) if casts else _AS_IT_IS
    return _switched(tf32, uncast) if kind == "cuda" else uncast


@contextmanager
def _switched(tf32: bool, uncast: AbstractContextManager[Any]) -> Iterator[None]:
    with _TURN:
        _enter(tf32)
    _MINE.depth = _depth() + 1
    try:
        with uncast:
            yield
    finally:
        _MINE.depth -= 1
        with _TURN:
            _SWITCH.inside -= 1
            if not _SWITCH.inside:
                try:
                    _put_back(*_SWITCH.before)
                finally:
                    _TURN.notify_all()


def _enter(tf32: bool) -> None:
    """Waits where the others do not agree, and behind whoever waits already, so that nobody waits for ever."""
    if _depth() and _SWITCH.tf32 != tf32:
        raise RuntimeError("a network that computes in tf32 and one that does not cannot run inside of one another")
    fits = _SWITCH.tf32 == tf32 and (not _SWITCH.waiting or _depth() > 0)
    if _SWITCH.inside and not fits:
        turns = _SWITCH.turns
        _SWITCH.waiting += 1
        try:
            _TURN.wait_for(lambda: not _SWITCH.inside or (_SWITCH.tf32 == tf32 and _SWITCH.turns > turns))
        finally:
            _SWITCH.waiting -= 1
    if not _SWITCH.inside:
        _SWITCH.before, _SWITCH.tf32 = _standing(), tf32
        _SWITCH.turns += 1
        if len(_SWITCH.before[1]) == 2:
            _MATMUL.allow_tf32 = _CUDNN.allow_tf32 = tf32
        # the older switches leave convolutions to a newer one above them, or say nothing at all
        _MATMUL.fp32_precision = _CUDNN.conv.fp32_precision = _CUDNN.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    _SWITCH.inside += 1


def _depth() -> int:
    """How often this thread is inside."""
    depth: int = getattr(_MINE, "depth", 0)
    return depth


def _standing() -> tuple[str | None, tuple[Any, ...], bool]:
    """How torch's switches stand: its word for the precision of products, the two older switches, and a newer one.

    Where somebody has set the newer ones otherwise, torch does not say how the older ones stand; then the three newer
    stand for them. The last says whether nobody has touched that of products, so that it follows the one above it.
    """
    untouched = _MATMUL.fp32_precision == "none"
    try:
        word: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        word = None
    try:
        return word, (_MATMUL.allow_tf32, _CUDNN.allow_tf32), untouched
    except RuntimeError:
        return word, (_MATMUL.fp32_precision, _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision), untouched


def _put_back(word: str | None, switches: tuple[Any, ...], untouched: bool) -> None:
    if len(switches) == 2:
        _MATMUL.allow_tf32, _CUDNN.allow_tf32 = switches
    else:
        _MATMUL.fp32_precision, _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision = switches
    if word == "medium":  # the other two follow from the switch
        torch.set_float32_matmul_precision(word)
    if untouched:
        _MATMUL.fp32_precision = "none"


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of a few hundred operations in a type: 3e-5 in float32, 2e-2 in bfloat16."""
    return {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 1e-2}.get(dtype, 2e-2)
