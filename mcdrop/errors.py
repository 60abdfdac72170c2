"""Every error that mcdrop raises on purpose.

    MCDropError
    ├── InputError              rows, options or files that cannot be used (also a ValueError)
    │   └── UnknownName         a name that its table does not hold
    ├── ModelRefused            a network that cannot be sampled honestly
    │   ├── NoStochasticSite    nothing in it is random, so a variance would be a lie
    │   └── UncontrolledDraw    something in it is random and cannot be turned into a mask
    ├── ArtifactError           a model folder that cannot be read or trusted
    │   └── ModelNotFound       there is no such folder
    └── MissingExtra            a library of an optional extra is not installed (also an ImportError)

The core knows no HTTP: ``service.app`` maps these classes to status codes in one table.
"""

from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "InputError",
    "MCDropError",
    "MissingExtra",
    "ModelNotFound",
    "ModelRefused",
    "NoStochasticSite",
    "UncontrolledDraw",
    "UnknownName",
]


class MCDropError(Exception):
    """Base of all errors of this library."""


class InputError(MCDropError, ValueError):
    """Rows, options or files that cannot be used; the message says what would work."""


class UnknownName(InputError):
    """A name that its table does not hold.

    >>> raise UnknownName("interval", "nope", ["normal", "mean"])
    Traceback (most recent call last):
    mcdrop.errors.UnknownName: unknown interval 'nope'; choose one of: mean, normal
    """

    def __init__(self, what: str, given: object, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {given!r}; choose one of: {', '.join(sorted(known))}")

    @classmethod
    def check(cls, what: str, given: object, known: Iterable[str]) -> None:
        """Raises where the table does not hold what was given, which may be of any type."""
        if not isinstance(given, str) or given not in known:
            raise cls(what, given, known)


class ModelRefused(MCDropError):
    """A network that cannot be sampled honestly; the message names the place and the remedy."""


class NoStochasticSite(ModelRefused):
    """Nothing in the network is random, so every variance would be zero."""


class UncontrolledDraw(ModelRefused):
    """The network draws random numbers that no mask controls, so its answers could not be repeated."""


class ArtifactError(MCDropError):
    """A model folder that cannot be read or trusted."""


class ModelNotFound(ArtifactError):
    """No model folder lies at the given place."""


class MissingExtra(MCDropError, ImportError):
    """A library that belongs to an optional extra is not installed.

    >>> raise MissingExtra("fastapi", "serve")
    Traceback (most recent call last):
    mcdrop.errors.MissingExtra: fastapi is not installed; it comes with: pip install 'mcdrop[serve]'
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; it comes with: pip install 'mcdrop[{extra}]'")
