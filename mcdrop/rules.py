"""What each function that draws does with values from a source.

To teach mcdrop a function, add one rule to ``RULES``: a function of the mode and the same arguments.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdrop.decisions import DECISION_RULES
from mcdrop.intercept import Folded, Interception, Rules
from mcdrop.sequences import SEQUENCE_RULES, body_rule

__all__ = ["RULES", "by_torchs_own"]

Apply = Callable[[Interception, Tensor, float, int], Tensor]


def _drop_rule(apply: Apply, leading: int | None, unbatched: int = -1) -> Callable[..., Tensor]:
    """A rule for a function of (input, p, training, inplace).

    ``leading`` says how many axes the mask has (None: all); an input of ``unbatched`` axes has no rows, and one less.
    """

    def rule(mode: Interception, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        p = float(p)  # a tensor, where somebody keeps it in a buffer
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if not training and not mode.source.forces(p):
            return input
        axes = input.dim() if leading is None else min(leading - (input.dim() == unbatched), input.dim())
        value = getattr(mode, apply.__name__)(input, p, axes)  # by name, because a mode may drop in its own way
        return mode.write(input, value) if inplace else value

    return rule


def _torch_rule(apply: Apply, leading: int | None, inplace: bool) -> Callable[..., Tensor]:
    """A rule for a function of (input, p, train), such as ``torch.dropout``."""
    inner = _drop_rule(apply, leading)

    def rule(mode: Interception, input: Tensor, p: float, train: bool) -> Tensor:
        return inner(mode, input, p, train, inplace)

    return rule


def _rrelu(
    mode: Interception, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    slope: Tensor | float = (lower + upper) / 2
    if training:
        slope = mode.numbers("uniform", tuple(input.shape), input) * (upper - lower) + lower
    value = torch.where(input >= 0, input, input * slope)
    return mode.write(input, value) if inplace else value


def _bernoulli(mode: Interception, input: Tensor, p: float | Tensor | None = None, **ignored: Any) -> Tensor:
    """``torch.bernoulli(input)`` reads probabilities of one from the input; with ``p`` only its shape counts."""
    chance = input if p is None else p
    if isinstance(chance, Tensor):
        values = mode.source.draw("uniform", tuple(input.shape), 0.0)
        if values is None:
            return chance.to(input.dtype).expand(input.shape).clone()
        return (values.to(input.device) < chance).to(input.dtype)
    values = mode.source.draw("bernoulli", tuple(input.shape), 1 - chance)
    if values is None:
        return torch.full_like(input, chance)
    return values.to(input.device, input.dtype).expand(input.shape).clone()


def _bernoulli_(mode: Interception, input: Tensor, p: float | Tensor = 0.5, **ignored: Any) -> Tensor:
    return mode.write(input, _bernoulli(mode, input, p))


def _uniform_(mode: Interception, input: Tensor, *args: float, **kwargs: Any) -> Tensor:
    low = args[0] if args else kwargs.get("from", 0.0)
    high = args[1] if len(args) > 1 else kwargs.get("to", 1.0)
    return mode.write(input, mode.numbers("uniform", tuple(input.shape), input) * (high - low) + low)


def _normal_(mode: Interception, input: Tensor, mean: float = 0.0, std: float = 1.0, **ignored: Any) -> Tensor:
    center = complex(mean, mean) if input.is_complex() else mean
    return mode.write(input, mode.numbers("normal", tuple(input.shape), input) * std + center)


def _exponential_(mode: Interception, input: Tensor, lambd: float = 1.0, **ignored: Any) -> Tensor:
    values = mode.source.draw("uniform", tuple(input.shape), 0.0)
    if values is None:
        return mode.write(input, torch.full_like(input, 1 / lambd))
    return mode.write(input, (-torch.log1p(-values.to(input.device)) / lambd).to(input.dtype).expand(input.shape))


def _normal(mode: Interception, mean: Tensor | float, std: Tensor | float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    like = tensors[0] if tensors else _blank(kwargs)
    size = args[0] if args else kwargs.get("size")
    shape = tuple(size) if size else tuple(torch.broadcast_shapes(*(value.shape for value in tensors)))
    return mode.numbers("normal", shape, like) * std + mean


def _like_rule(kind: str) -> Callable[..., Tensor]:
    def rule(mode: Interception, input: Tensor, **kwargs: Any) -> Tensor:
        return mode.numbers(kind, tuple(input.shape), _blank(kwargs, input))

    return rule


def _size_rule(kind: str) -> Callable[..., Tensor]:
    def rule(mode: Interception, *size: Any, **kwargs: Any) -> Tensor:
        given = kwargs.get("size", size)
        shape = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
        sizes: Any = (n if isinstance(n, torch.SymInt) else int(n) for n in shape)  # of an export it is a symbol
        return mode.numbers(kind, tuple(sizes), _blank(kwargs))

    return rule


def _randint(mode: Interception, *args: Any, **kwargs: Any) -> Tensor:
    """``low`` may be left out, and each of ``low``, ``high`` and ``size`` be named."""
    given = [*args]
    size = kwargs["size"] if "size" in kwargs else given.pop()
    high = kwargs["high"] if "high" in kwargs else given.pop()
    low = kwargs.get("low", given.pop() if given else 0)
    blank = torch.empty(0, device=kwargs.get("device"))
    values = torch.floor(mode.numbers("uniform", tuple(size), blank) * (high - low)) + low
    drawn: Tensor = values.to(kwargs.get("dtype") or torch.int64)
    return drawn


def _to_out(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of a function that may write to a tensor that it is given."""

    def with_out(mode: Interception, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        if out is None:
            return rule(mode, *args, **kwargs)
        value = rule(mode, *args, **{"dtype": out.dtype, "device": out.device, **kwargs})
        if out.shape != value.shape:  # torch makes it fit
            torch.utils.swap_tensors(out, value)
            return out
        return mode.write(out, value)

    return with_out


def _pack(mode: Interception, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Takes what is there of each step by index, for which vmap has a rule."""
    if isinstance(mode.source, Folded):
        mode.source.packed = True
    steps_first = input.transpose(0, 1) if batch_first else input
    _, sizes = torch._pack_padded_sequence(torch.empty(*steps_first.shape[:2], 1), lengths, False)
    there = _there(sizes, len(steps_first)).flatten().nonzero().squeeze(1)
    return steps_first.flatten(0, 1).index_select(0, there.to(input.device)), sizes


def _unpack(
    mode: Interception, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """Puts what is there in its place by index, and the padding where nothing is."""
    blank, lengths = torch._pad_packed_sequence(
        torch.empty(len(data), 1), batch_sizes, False, padding_value, total_length
    )
    there = _there(batch_sizes, len(blank)).flatten()
    place = torch.where(there, there.cumsum(0) - 1, len(data)).to(data.device)
    padding = data.new_full((1, *data.shape[1:]), padding_value)
    padded = torch.cat([data, padding]).index_select(0, place).unflatten(0, blank.shape[:2])
    return (padded.transpose(0, 1) if batch_first else padded), lengths


def _there(sizes: Tensor, steps: int) -> Tensor:
    """Which rows are there at each step (steps, rows), the longest first."""
    return torch.arange(int(sizes[0])) < F.pad(sizes, (0, steps - len(sizes)))[:, None]


def _blank(kwargs: dict[str, Any], like: Tensor | None = None) -> Tensor:
    """An empty tensor with the type and device that the arguments of a factory function ask for."""
    dtype = kwargs.get("dtype") or (like.dtype if like is not None else None)
    device = kwargs.get("device") or (like.device if like is not None else None)
    return torch.empty(0, dtype=dtype, device=device)


def by_torchs_own(rules: Rules) -> Rules:
    """Gives the same rules, also by those functions of torch's in whose places a library has put its own.

    Those call torch's in the end, and a mode hears of these alone.
    """
    homes: Any = (torch, torch._C._VariableFunctions), (F, torch._C._nn), (Tensor, torch._C.TensorBase)
    named = ((public, home, name) for public, home in homes for name in dir(home) if not name.startswith("__"))
    owns = {getattr(public, name, None): getattr(home, name) for public, home, name in named}
    written = {one: getattr(one, "__globals__", {}).get("__name__", "") for one in rules}  # in which module
    theirs = (one for one, where in written.items() if one in owns and not where.startswith("torch."))
    return {**{owns[one]: rules[one] for one in theirs}, **rules}


RULES: Rules = by_torchs_own({
    **SEQUENCE_RULES,
    **DECISION_RULES,
    F.gumbel_softmax: body_rule(F.gumbel_softmax),
    F.dropout: _drop_rule(Interception.drop, None),
    F.dropout1d: _drop_rule(Interception.drop, 2, unbatched=2),
    F.dropout2d: _drop_rule(Interception.drop, 2),
    F.dropout3d: _drop_rule(Interception.drop, 2, unbatched=4),
    F.alpha_dropout: _drop_rule(Interception.alpha_drop, None),
    F.feature_alpha_dropout: _drop_rule(Interception.alpha_drop, 2),
    F.rrelu: _rrelu,
    torch.dropout: _torch_rule(Interception.drop, None, inplace=False),
    torch.dropout_: _torch_rule(Interception.drop, None, inplace=True),
    torch.feature_dropout: _torch_rule(Interception.drop, 2, inplace=False),
    torch.feature_dropout_: _torch_rule(Interception.drop, 2, inplace=True),
    torch.alpha_dropout: _torch_rule(Interception.alpha_drop, None, inplace=False),
    torch.alpha_dropout_: _torch_rule(Interception.alpha_drop, None, inplace=True),
    torch.feature_alpha_dropout: _torch_rule(Interception.alpha_drop, 2, inplace=False),
    torch.feature_alpha_dropout_: _torch_rule(Interception.alpha_drop, 2, inplace=True),
    torch.bernoulli: _to_out(_bernoulli),
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
    Tensor.exponential_: _exponential_,
    torch.normal: _to_out(_normal),
    torch._pack_padded_sequence: _pack,
    torch._pad_packed_sequence: _unpack,
    torch.rand: _to_out(_size_rule("uniform")),
    torch.randn: _to_out(_size_rule("normal")),
    torch.rand_like: _like_rule("uniform"),
    torch.randn_like: _like_rule("normal"),
    torch.randint: _to_out(_randint),
})  # fmt: skip
