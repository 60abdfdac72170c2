"""The zoo's own idea of stochastic behaviour, made of nothing but torch: training flags and torch's own generator.

It shares no code with the package and no idea either, other than what dropout is; so what it draws is an independent
source for the distribution of the passes. It is slow, not safe for threads, and draws a mask for every row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .specimen import Example, Specimen, call

__all__ = ["Draws", "Expected", "UnknownExpectation", "reference", "reference_passes", "restored"]

_SWITCHES = ("training", "train", "dropout_p")


@contextmanager
def reference(specimen: Specimen, module: nn.Module) -> Iterator[None]:
    """Switches on what should draw and nothing else; undone at the end.

    Flags are set one by one, never by ``train()``, which recurses. The fused attention kernels, which ignore dropout,
    are off meanwhile.
    """
    named = dict(module.named_modules(remove_duplicate=False))
    paths = [path for path, m in named.items() if not _is_norm(m)] if specimen.live is None else specimen.live
    before = [(m, m.training) for m in module.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for path in paths:
            named[path].training = True
        with specimen.around(module) if specimen.around else nullcontext():
            yield
    finally:
        for m, flag in before:
            m.training = flag
        torch.backends.mha.set_fastpath_enabled(fused)


def reference_passes(specimen: Specimen, module: nn.Module, example: Example, passes: int, *, seed: int = 0) -> Tensor:
    """Draws passes with torch's generator: (T, N, ...), what ``Specimen.pick`` takes of each output, in float64.

    Torch's global generator is left as it was.
    """
    outputs = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(passes):
            with reference(specimen, module):
                outputs.append(specimen.pick(call(module, example)).double())
    return torch.stack(outputs)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Puts the buffers back at the end, for networks that move their statistics by the flag that also drops."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, old in before:
            buffer.copy_(old)


def _is_norm(module: nn.Module) -> bool:
    # a scripted normalisation has lost its class and keeps the name
    name = getattr(module, "original_name", "")
    return isinstance(module, nn.modules.batchnorm._NormBase) or name.startswith(("BatchNorm", "InstanceNorm"))


class Draws(TorchDispatchMode):
    """Records every operation that really drew random numbers, below all of torch's Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _draws(func, args, kwargs or {}):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class UnknownExpectation(NotImplementedError):
    """A draw for which no expectation is written down here."""


class Expected(TorchDispatchMode):
    """Replaces every draw by its expectation, so that a forward becomes deterministic."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in _EXPECTATIONS:
            raise UnknownExpectation(f"{func} has no expectation")
        given = _arguments(func, args, kwargs)
        if name.endswith("_"):
            if not given["self"].is_floating_point():
                raise UnknownExpectation(f"{func} of {given['self'].dtype} has an expectation of another type")
            expectation = torch.as_tensor(_EXPECTATIONS[name](given)).to(given["self"].dtype)
            return given["self"].copy_(expectation.expand_as(given["self"]))
        drawn = func(*args, **kwargs)  # for its shape and dtype
        return torch.as_tensor(_EXPECTATIONS[name](given), dtype=drawn.dtype).expand_as(drawn).clone()


def _either(given: dict[str, Any]) -> Any:
    """Bernoulli's probability: a number beside the tensor, another tensor, or the tensor itself."""
    return given.get("p", given["self"])


_EXPECTATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bernoulli": _either,
    "bernoulli_": _either,
    "dropout": lambda given: given["input"],
    "rand": lambda given: 0.5,
    "rand_like": lambda given: 0.5,
    "uniform_": lambda given: (given["from"] + given["to"]) / 2,
    "randn": lambda given: 0.0,
    "randn_like": lambda given: 0.0,
    "normal_": lambda given: given["mean"],
    "normal": lambda given: given["mean"],
    "exponential_": lambda given: 1 / given["lambd"],
    "rrelu_with_noise": lambda given: nn.functional.rrelu(given["self"], given["lower"], given["upper"]),
}


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Tells draws from operations that could draw but have it switched off."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = _arguments(func, args, kwargs)
    return all(given[name] for name in _SWITCHES if name in given)
