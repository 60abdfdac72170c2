"""A network made ready to be sampled: discovered once, audited, with its task and the shapes of its inputs."""

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mcdrop.audit import Audit
from mcdrop.backends import Backend
from mcdrop.calibration import Calibration
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError, UnknownName
from mcdrop.intervals import INTERVALS, check_level
from mcdrop.locks import new_lock
from mcdrop.rows import Rows, listed
from mcdrop.screening import Screen
from mcdrop.wholes import check_whole, is_whole

__all__ = ["InputSpec", "Model", "Options", "check_columns", "check_fitted", "check_model", "not_a_network"]

# How a tensor is brought to a type, by numpy's name of it; its own methods, since torch takes long to import.
_CASTS = {"bool": "bool", "int8": "char", "int16": "short", "int32": "int", "int64": "long", "uint8": "byte"}


@dataclass(frozen=True)
class Options:
    """What may be asked of a prediction.

    Raises:
        InputError: an option outside its range, or an unknown interval.
    """

    passes: int = 100
    level: float = 0.95
    interval: str = "student_t"
    seed: int = 0
    keep_samples: bool = False
    sampler: str = "balanced"
    tolerance: float | None = None
    exact_last: bool = False

    def __post_init__(self) -> None:
        """Checks at the door; the numbers become Python's own, as in ``PassPlan``."""
        object.__setattr__(self, "level", check_level(self.level))
        UnknownName.check("interval", self.interval, INTERVALS)
        plan = self.plan
        for name in ("passes", "seed", "tolerance"):
            object.__setattr__(self, name, getattr(plan, name))

    @property
    def plan(self) -> PassPlan:
        """The passes that these options need."""
        keep = self.keep_samples or INTERVALS[self.interval].needs_samples
        return PassPlan(self.passes, self.seed, self.sampler, keep, self.tolerance, self.exact_last)

    def plan_with(self, calibration: Calibration | None) -> PassPlan:
        """The same where a calibration is at hand, whose intervals may be made of the passes themselves."""
        keep = self.interval == "conformal" and calibration is not None and calibration.needs_samples
        return replace(self.plan, keep_samples=True) if keep else self.plan


@dataclass(frozen=True)
class InputSpec:
    """One input: its name, its numpy type, and its shape with -1 for the rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A network whose every random draw is a mask; made by ``wrap`` or ``load``, safe to share between threads.

    ``features`` names the columns of a single (N, F) input, or is None. ``module`` is the user's own, untouched.
    ``reads`` says which of the network's outputs was asked for, "" for the only one. ``saved_as`` gives the digest of
    the weights that were saved for that of those that were read, where a format holds them in another form.
    """

    module: Any
    backend: Backend
    audit: Audit
    task: str
    inputs: tuple[InputSpec, ...]
    positional: int
    example: Rows
    asked: Mapping[str, Any] = field(default_factory=dict)  # what wrap was asked for besides, to be saved
    defaults: Options = Options()
    screen: Screen | None = None
    calibration: Calibration | None = None
    name: str = ""
    version: str = ""
    description: str = ""
    features: list[str] | None = None
    reads: str = ""
    saved_as: Mapping[str, str] = field(default_factory=dict)
    references: dict[Any, Any] = field(default_factory=dict, repr=False)  # scores of the screen's rows, by plan
    lock: threading.Lock = field(default_factory=new_lock, repr=False)

    def __deepcopy__(self, memo: object) -> "Model":
        """Gives a model that shares the network, which is safe from several threads, and its backend."""
        return replace(self, references={}, lock=new_lock())

    def __copy__(self) -> "Model":
        """Gives a model that shares the network, its backend and what is held for them."""
        return replace(self)

    def __reduce__(self) -> Any:
        """Refuses to be pickled: the backend holds compiled code, and a pickle runs code where it is read."""
        raise InputError(
            "a model cannot be pickled; write it with mcdrop.save(model, folder) and read it with mcdrop.load"
        )

    @property
    def digest(self) -> str:
        """What names the weights and the output that is read: whatever is fitted holds for these alone."""
        return f"{self.weights} {self.reads}" if self.reads else self.weights

    @property
    def weights(self) -> str:
        """What names the weights, also after they were saved and read."""
        digest = self.backend.digest()
        return self.saved_as.get(digest, digest)

    def with_screen(self, screen: Screen | None) -> "Model":
        """Gives the same model with a fitted screen, or without one.

        Raises:
            InputError: it is something else.
        """
        check_fitted(screen, None)
        return replace(self, screen=screen, references={}, lock=new_lock())

    def with_calibration(self, calibration: Calibration | None) -> "Model":
        """Gives the same model with a calibration; it holds for the passes, seed and weights it was fitted with.

        Raises:
            InputError: it is something else.
        """
        check_fitted(None, calibration)
        audit = replace(self.audit, calibrated=calibration is not None)
        return replace(self, calibration=calibration, audit=audit, references={}, lock=new_lock())

    def rows(self, x: Any, *, later: bool = False) -> Rows:
        """Reads inputs and checks them against what the network was wrapped with; ``later`` as for ``Rows.of``.

        Raises:
            InputError: unusable rows, unknown or missing names, or a wrong number of axes or columns.
        """
        rows = self._placed(x, later)
        given = rows.leaves
        if len(given) != len(self.inputs):
            inputs = "1 input" if len(self.inputs) == 1 else f"{len(self.inputs)} inputs"
            raise InputError(f"the network takes {inputs} ({self._names()}), got {len(given)}")
        checked = tuple(map(_fit, given, self.inputs))
        if all(map(operator.is_, checked, given)):
            return rows
        left = iter(checked)
        return rows.map(lambda leaf: next(left))

    def _placed(self, x: Any, later: bool) -> Rows:
        """Puts inputs given by name where the network takes them."""
        if not isinstance(x, Mapping):
            rows = Rows.of(x, later=later)
            if rows.kwargs or self.positional in (len(rows.args), len(self.inputs)):
                return rows
            raise InputError(f"the network takes inputs by name: {self._names()}; got {len(rows.args)} without names")
        names = [spec.name for spec in self.inputs]
        if sorted(map(str, x)) != sorted(names):
            raise InputError(f"inputs must be named {', '.join(names)}; got {', '.join(map(str, x)) or 'none'}")
        rows = Rows.of({name: x[name] for name in names})
        leaves = rows.leaves
        by_name = dict(zip(names[self.positional :], leaves[self.positional :], strict=True))
        return Rows(leaves[: self.positional], by_name, rows.count, names=tuple(names))

    def _names(self) -> str:
        return ", ".join(spec.name for spec in self.inputs)


def check_model(model: object) -> None:
    """Refuses what is not a model, such as a network that was not wrapped.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"a model is needed, got {type(model).__name__}; wrap a network first: mcdrop.wrap(network, example=rows)"
        )


def check_fitted(screen: object, calibration: object) -> None:
    """Refuses what is neither a screen nor None, and what is neither a calibration nor None.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(screen, Screen | None):
        raise InputError(f"screen must be what mcdrop.fit_screen gave, got {type(screen).__name__}")
    if not isinstance(calibration, Calibration | None):
        raise InputError(f"calibration must be what mcdrop.calibrate gave, got {type(calibration).__name__}")


def check_columns(names: Any, inputs: Sequence[InputSpec]) -> None:
    """Refuses what are no names for the columns of a single (N, F) input; an empty list names none.

    Raises:
        InputError: there is no such input, they are not F texts, or tables, which have blanks around names, would not
            tell them apart.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"features must be a list of names, got {names!r}")
    if not names:
        return
    width = inputs[0].shape[-1] if len(inputs) == 1 and len(inputs[0].shape) == 2 else None
    if width is None:
        raise InputError(f"only a single (N, F) input has columns that features can name, got {names!r}")
    if len(names) != width:
        raise InputError(f"features must be {width} names, one for each column, got {len(names)}: {listed(names)}")
    bare = [name.strip() for name in names]
    if twice := [name for name in dict.fromkeys(bare) if bare.count(name) > 1]:
        raise InputError(f"features must be {width} different names, but {listed(twice)} is there more than once")


def not_a_network(given: object) -> InputError:
    """Gives the error for what came where a network of torch should, such as its class or a wrapped one."""
    said = "a model; give its network, model.module" if isinstance(given, Model) else type(given).__name__
    if isinstance(given, type):
        said = f"the class {given.__name__}; give a network of it, {given.__name__}(...)"
    return InputError(f"a network is needed, a torch.nn.Module, got {said}")


def _fit(leaf: Any, spec: InputSpec) -> Any:
    """Checks one leaf against its specification and gives it in the specified type."""
    # a real (N, F) input has F columns; longer inputs and token ids may vary in length
    wide = leaf.ndim == 2 and leaf.shape[1] != spec.shape[-1] and spec.dtype.startswith("float")
    if leaf.ndim != len(spec.shape) or wide:
        wanted, got = ("N", *spec.shape[1:]), ("N", *leaf.shape[1:])
        raise InputError(f"input {spec.name!r} must have the shape {_shape(wanted)}, got {_shape(got)}")
    if hasattr(leaf, "detach"):
        return _fit_tensor(leaf, spec)
    kind = np.dtype(spec.dtype)
    if is_whole(kind):
        check_whole(leaf, kind, spec.name)
    with np.errstate(over="ignore"):
        fitted = leaf.astype(spec.dtype)
    if fitted.dtype.kind == "f" and not np.isfinite(fitted).all():
        raise _too_large(spec)
    return fitted


def _fit_tensor(leaf: Any, spec: InputSpec) -> Any:
    """The same for a tensor, which keeps its device and, where it is of real numbers, its precision."""
    real = leaf.is_floating_point()
    kind = np.dtype(spec.dtype)
    if is_whole(kind):
        given = str(leaf.dtype).removeprefix("torch.")
        if real or not np.can_cast(given, kind):
            check_whole((leaf.double() if real else leaf).cpu().numpy(), kind, spec.name, given)
        same = str(leaf.dtype) == f"torch.{spec.dtype}"
        return leaf if same else getattr(leaf, _CASTS.get(spec.dtype, "long"))()
    if not real:
        return leaf.double() if spec.dtype == "float64" else leaf.float()
    if leaf.element_size() > kind.itemsize:
        numbers = leaf.coalesce().values() if leaf.is_sparse else leaf
        if bool((numbers.float().isinf() & numbers.isfinite()).any()):
            raise _too_large(spec)
    return leaf


def _too_large(spec: InputSpec) -> InputError:
    return InputError(f"input {spec.name!r} holds numbers that are too large for {spec.dtype}")


def _shape(axes: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, axes))}{',' if len(axes) == 1 else ''})"
