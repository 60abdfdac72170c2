"""Layers whose weights differ from pass to pass, as under DropConnect: one node of a graph that runs pass by pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["EACH_PASS", "each_pass", "run_each_pass"]

Call = Callable[[Callable[..., Any], Sequence[Tensor], Sequence[Tensor]], Any]


class _Held(NamedTuple):
    """A call: what shows its shapes, what computes it for a pass, and for all at once, and what fills its arguments."""

    operator: Any
    run: Callable[..., Any]
    together: Callable[..., Tensor | None] | None
    one: Call


_CALLS: dict[str, _Held] = {}  # by what they do, since an operator takes no functions


@torch.library.custom_op("mcdrop::each_pass", mutates_args=())
def _each_pass(differing: Sequence[Tensor], same: Sequence[Tensor], call: str) -> list[Tensor]:
    # in the order that the stand-ins promise, which a compiler goes by
    return [tensor.contiguous() for tensor in run_each_pass(differing, same, call)]


@_each_pass.register_fake
def _(differing: Sequence[Tensor], same: Sequence[Tensor], call: str) -> list[Tensor]:
    held = _CALLS[call]
    found = held.one(held.operator, [tensor[0] for tensor in differing], same)
    passes = differing[0].shape[0]
    return [tensor.new_empty((passes, *tensor.shape)) for tensor in _listed(found)]


def each_pass(
    operator: Any, run: Callable[..., Any], args: Sequence[Any], dims: Sequence[Any],
    together: Callable[..., Tensor | None] | None = None,
) -> Any:  # fmt: skip
    """Calls an operator whose arguments differ along the given axes, for each pass on its own.

    ``run`` computes what the operator does, ``together`` the same for all passes at once, or None. What comes out has
    the passes in front, and is as the operator gives it: a tensor or a list of them.
    """
    leaves, spec = tree_flatten([*args])
    axes, _ = tree_flatten([_spread(value, dim) for value, dim in zip(args, dims, strict=True)])
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    apart = [place for place in places if axes[place] is not None]
    alike = [place for place in places if axes[place] is None]
    settings = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def one(function: Callable[..., Any], differing: Sequence[Tensor], same: Sequence[Tensor]) -> Any:
        filled = [*settings]
        for place, tensor in zip([*apart, *alike], [*differing, *same], strict=True):
            filled[place] = tensor
        return function(*tree_unflatten(filled, spec))

    # all that a call depends on, and no addresses, so that it is the same in every process for what compilers keep; in
    # one line, since a compiler puts it behind the sign of a comment
    functions = [getattr(one, "__qualname__", str(one)) for one in (run, together)]
    name = " ".join(f"{operator} {functions} {settings} {apart} {alike} {spec}".split())
    _CALLS[name] = _Held(operator, run, together, one)
    found = EACH_PASS([leaves[place].movedim(axes[place], 0) for place in apart], [leaves[p] for p in alike], name)
    return found if _gives_list(operator) else found[0]


def run_each_pass(differing: Sequence[Tensor], same: Sequence[Tensor], call: str) -> list[Tensor]:
    """Runs such a call."""
    held = _CALLS[call]
    whole = None if held.together is None else held.one(held.together, differing, same)
    if whole is not None:
        return [whole]
    passes = zip(*(tensor.unbind() for tensor in differing), strict=True)
    each = [_listed(held.one(held.run, tensors, same)) for tensors in passes]
    return [_together(tensors) for tensors in zip(*each, strict=True)]


def _together(passes: Sequence[Tensor]) -> Tensor:
    """Puts passes in front of one another; as one batch of rows, so that images keep their order in memory."""
    if len(passes) == 1:
        return passes[0].unsqueeze(0)
    return torch.cat([*passes]).unflatten(0, (len(passes), -1)) if passes[0].numel() else torch.stack([*passes])


def _gives_list(operator: Any) -> bool:
    return isinstance(operator._schema.returns[0].type, torch.ListType)


def _listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [*found]


def _spread(value: Any, dim: Any) -> Any:
    """The axis of each tensor in an argument, where none differ too."""
    return [None] * len(value) if isinstance(value, list | tuple) and dim is None else dim


EACH_PASS = torch.ops.mcdrop.each_pass.default
