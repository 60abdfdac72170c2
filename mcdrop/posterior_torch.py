"""The posterior as one exported program of torch: masks as buffers, passes folded into the rows, rows free."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mcdrop.backends import Backend
from mcdrop.backends.torch import TorchBackend
from mcdrop.engine import PassPlan
from mcdrop.errors import ModelRefused
from mcdrop.forward import to_tensors
from mcdrop.intercept import Folded
from mcdrop.masks import sample_masks
from mcdrop.posterior_statistics import statistics
from mcdrop.quiet import quiet
from mcdrop.rows import Rows
from mcdrop.trace import Trace, one_pass, repeat_rows, trace

__all__ = ["posterior_program", "run_program"]

_ROWS = 3

# what the operators of ``posterior_statistics`` do to tensors
_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "ArgMax": lambda x, axis, keepdims: x.argmax(axis),
    "Clip": lambda x, low, high: x.clamp(low, high),
    "Exp": torch.exp,
    "Log": torch.log,
    "Max": torch.maximum,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "OneHot": lambda x, depth, values, axis: F.one_hot(x, depth[0]).to(values.dtype),
    "ReduceMax": lambda x, axes, keepdims: x.amax(axes),
    "ReduceMean": lambda x, axes, keepdims: x.mean(axes),
    "ReduceSum": lambda x, axes, keepdims: x.sum(axes),
    "ReduceSumSquare": lambda x, axes, keepdims: x.square().sum(axes),
    "Relu": torch.relu,
    "Slice": lambda x, start, stop, axes: x.narrow(axes[0], start[0], stop[0] - start[0]),
    "Softmax": lambda x, axis: x.softmax(axis),
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": lambda *parts: sum(parts),
    "Transpose": lambda x, perm: x.permute(perm),
}


class _Tensors:
    """ONNX operators on tensors, numbers of one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def constant(self, value: Any, dtype: Any = None) -> Tensor:
        return torch.as_tensor(np.asarray(value, dtype or np.float64), dtype=None if dtype else self.dtype)

    def real(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)

    def whole(self, *numbers: int) -> tuple[int, ...]:
        return numbers

    def node(self, operator: str, *inputs: Any, output: str | None = None, **attributes: Any) -> Tensor:
        return _OPERATORS[operator](*inputs, **attributes)

    def reshaped(self, value: Tensor, *shape: int) -> Tensor:
        return value.reshape(shape)

    def ranked(self, value: Tensor, rank: int, *, largest: bool) -> Tensor:
        return value.topk(rank, dim=0, largest=largest).values[rank - 1]


class _Posterior(nn.Module):
    """All passes and what they say, as one function of the inputs by position."""

    def __init__(self, backend: TorchBackend, found: Trace, rows: Rows, plan: PassPlan, asked: dict[str, Any]) -> None:
        super().__init__()
        self.live = backend.live
        self._backend, self._found, self._rows, self._plan, self._asked = backend, found, rows, plan, asked
        drawn = sample_masks(found.sites, plan.passes, seed=plan.seed, sampler=plan.sampler)
        off = found.left_off(backend.excluded)
        for site in found.sites:
            if site.name not in off:  # torch 2.13 cannot export a buffer that is None
                self.register_buffer(site.name, torch.as_tensor(drawn[site.name]))
        self._folds = all(layout is not None for layout in found.layouts) and not found.united

    def forward(self, *leaves: Tensor) -> dict[str, Tensor]:
        """Gives the posterior."""
        masks = [self._buffers.get(site.name) for site in self._found.sites]
        passes = self._plan.passes
        if self._folds:
            copies = self._placed([leaf.repeat(passes, *(1,) * (leaf.dim() - 1)) for leaf in leaves])
            output = one_pass(self.live, copies, self._backend.pick, self._found, masks, Folded)
            output = output.reshape(passes, -1, *output.shape[1:])
        else:
            each = ([None if mask is None else mask[t] for mask in masks] for t in range(passes))
            rows = self._placed([*leaves])
            output = torch.stack([one_pass(self.live, rows, self._backend.pick, self._found, one) for one in each])
        by_type = _Tensors(torch.promote_types(output.dtype, torch.float32))
        return statistics(by_type, by_type.real(output), tuple(output.shape[2:]), **self._asked)

    def _placed(self, leaves: list[Tensor]) -> Rows:
        left = iter(leaves)
        return Rows(tuple(next(left) for _ in self._rows.args), {name: next(left) for name in self._rows.kwargs}, 0)


def posterior_program(backend: Backend, rows: Rows, plan: PassPlan, *, task: str, level: float, interval: str) -> bytes:
    """Gives the ``.pt2`` file of a posterior.

    Raises:
        ModelRefused: torch cannot export the network, or it is an ONNX graph.
    """
    if not isinstance(backend, TorchBackend):
        raise ModelRefused("an ONNX graph cannot be written as a program of torch; write it with export_onnx")
    few = to_tensors(repeat_rows(rows, _ROWS), backend.live)
    found = trace(backend.live, few, backend.pick, backend.force)
    if found.unclear:
        raise ModelRefused("a draw whose rows are only known while the network runs cannot be part of a program")
    asked = {"task": task, "passes": plan.passes, "sampler": plan.sampler, "level": level, "interval": interval}
    leaves, buffer = few.leaves, io.BytesIO()
    count = torch.export.Dim("rows", min=1)
    module = _Posterior(backend, found, few, plan, asked)
    with torch.no_grad():
        module(*leaves)  # what it cannot hold is said in our own words
    try:
        with quiet(), torch.no_grad():
            module.live = backend.apart().live
            shapes = (tuple({0: count} for _ in leaves),)
            program = torch.export.export(module, leaves, dynamic_shapes=shapes, strict=False)
            for name, weight in program.named_parameters():  # of the program alone: the network's own may be trained
                program.state_dict[name] = nn.Parameter(weight.detach(), requires_grad=False)
            torch.export.save(program, buffer)
    except Exception as error:  # whatever an exporter makes of somebody's network
        raise ModelRefused(f"torch cannot export this network: {' '.join(str(error).split())[:300]}") from error
    return buffer.getvalue()


def run_program(data: bytes, leaves: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Runs a program that was written here on inputs by position."""
    with quiet(), torch.no_grad():
        program = torch.export.load(io.BytesIO(data))
        types = {node.name: node.meta["val"].dtype for node in program.graph.nodes if node.op == "placeholder"}
        taken = zip(leaves, program.graph_signature.user_inputs, strict=True)
        found = program.module()(*(torch.as_tensor(leaf, dtype=types[name]) for leaf, name in taken))
    return {name: value.numpy() for name, value in found.items()}
