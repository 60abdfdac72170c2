"""Exported programs (``.pt2``): read behind the preflight, and with their dropout in reach again.

An export in eval mode keeps dropout as calls that are switched off; these become dropout modules. What decomposition
or attention in eval mode has lost is named.
"""

import io
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from mcdrop.any_rows import RECURRENT, states_of_any_rows
from mcdrop.backends import Backend
from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import ArtifactError, MCDropError, ModelRefused, NoStochasticSite
from mcdrop.forward import to_tensors, using
from mcdrop.intercept import Given, Interception
from mcdrop.preflight import preflight
from mcdrop.quiet import quiet
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.trace import Trace, repeat_rows
from mcdrop.volatile import from_start

__all__ = ["exported", "lost_attention", "read_program"]

_aten = torch.ops.aten

_DROPOUT: dict[Any, type[nn.Module]] = {
    _aten.dropout.default: nn.Dropout,
    _aten.dropout_.default: nn.Dropout,
    _aten.feature_dropout.default: nn.Dropout2d,
    _aten.feature_dropout_.default: nn.Dropout2d,
    _aten.alpha_dropout.default: nn.AlphaDropout,
    _aten.alpha_dropout_.default: nn.AlphaDropout,
    _aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    _aten.feature_alpha_dropout_.default: nn.FeatureAlphaDropout,
}
_CHECKS_TYPE = _aten._assert_tensor_metadata.default
_NORMS = {_aten.group_norm.default: F.group_norm, _aten.layer_norm.default: F.layer_norm}
_SAME: dict[Any, Any] = {  # the same arguments, by a function that masks or a capture can reach
    _aten.baddbmm.default: torch.baddbmm,
    _aten.bernoulli.default: torch.bernoulli,
    _aten.bernoulli.p: torch.bernoulli,
    _aten.bernoulli_.Tensor: Tensor.bernoulli_,
    _aten.bernoulli_.float: Tensor.bernoulli_,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.conv1d.default: torch.conv1d,
    _aten.conv2d.default: torch.conv2d,
    _aten.conv3d.default: torch.conv3d,
    _aten.cosine_similarity.default: F.cosine_similarity,
    _aten.exponential_.default: Tensor.exponential_,
    _aten.gru_cell.default: torch.gru_cell,
    _aten.linear.default: F.linear,
    _aten.lstm_cell.default: torch.lstm_cell,
    _aten.matmul.default: torch.matmul,
    _aten.normal.Tensor_Tensor: torch.normal,
    _aten.normal.Tensor_float: torch.normal,
    _aten.normal.float_Tensor: torch.normal,
    _aten.normal.float_float: torch.normal,
    _aten.normal_.default: Tensor.normal_,
    _aten.rand.default: torch.rand,
    _aten.rand_like.default: torch.rand_like,
    _aten.randint.default: torch.randint,
    _aten.randint.low: torch.randint,
    _aten.randn.default: torch.randn,
    _aten.randn_like.default: torch.randn_like,
    _aten.rnn_relu_cell.default: torch.rnn_relu_cell,
    _aten.rnn_tanh_cell.default: torch.rnn_tanh_cell,
    _aten.rrelu.default: F.rrelu,
    _aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    _aten.uniform_.default: Tensor.uniform_,
}
_TRAIN = 6  # the flag's position among the arguments of a recurrent layer
_ROWS = 3
_RECIPE = (
    "export it with torch.export.export(model.eval(), ...) and save it before any run_decompositions(), or use "
    "mcdrop.save(mcdrop.wrap(model, ...), folder, format='pt2')"
)


def exported(backend: Backend, rows: Rows) -> bytes:
    """Gives a backend's network, its draws on, as the bytes of a ``.pt2`` file that takes any number of rows.

    Whoever reads it puts every dropout on, so what passes leave off is a dropout at a rate of 0 there.

    Raises:
        ModelRefused: torch cannot export it, or it is no torch network.
    """
    if not isinstance(backend, TorchBackend):
        raise ModelRefused("an ONNX graph cannot be saved as .pt2; save it with format='onnx'")
    few = to_tensors(repeat_rows(rows, _ROWS), backend.live)
    leaves = few.leaves
    buffer, count = io.BytesIO(), torch.export.Dim("rows", min=1)
    try:
        with quiet(), torch.no_grad():
            found = backend.plan(rows).trace
            shapes, module = tuple({0: count} for _ in leaves), _Positional(backend.apart(), few, found)
            program = torch.export.export(module, leaves, dynamic_shapes=(shapes,), strict=False)
            torch.export.save(program, buffer)
    except Exception as error:  # whatever an exporter makes of somebody's network
        raise ModelRefused(f"torch cannot export this network: {' '.join(str(error).split())[:300]}") from error
    return buffer.getvalue()


class _Positional(nn.Module):
    """A network under the names of its own weights, which takes its inputs by position and gives the picked output."""

    def __init__(self, backend: TorchBackend, rows: Rows, found: Trace) -> None:
        super().__init__()
        own = ("_buffers", "_modules", "_non_persistent_buffers_set", "_parameters")
        self.__dict__.update({name: backend.live.__dict__[name] for name in own})
        self.__dict__.update(backend=backend, rows=rows, found=found)

    def forward(self, *leaves: Tensor) -> Tensor:
        """Runs the network."""
        backend, rows, left = self.__dict__["backend"], self.__dict__["rows"], iter(leaves)
        args = [next(left) for _ in rows.args]
        with _leaving_off(self.__dict__["found"], backend.excluded, leaves[0].device), from_start(backend.live):
            output: Tensor = backend.pick(backend.live(*args, **{name: next(left) for name in rows.kwargs}))
        return output


class _Drawing(Given):
    """A source whose values are torch's own draws; one that is left off keeps its number, at a rate of 0."""

    def __init__(self, found: Trace, off: frozenset[str], device: torch.device) -> None:
        super().__init__([], found.layouts, found.forced)
        self._off_here, self._device = [site.name in off for site in found.sites], device

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Draws as the program will."""
        ones = torch.ones(shape, device=self._device)
        if self.left_off():
            F.dropout(ones, 0.0)
            return None
        if kind == "bernoulli":
            return F.dropout(ones, p) * (1 - p)
        return torch.rand_like(ones) if kind == "uniform" else torch.randn_like(ones)

    def left_off(self) -> bool:
        """Whether the next draw is left off."""
        index, self._next = self._next, self._next + 1
        return self._off_here[index]


class _Exporting(Interception):
    """Dropout stays torch's own, at a rate of 0 where it is left off."""

    source: _Drawing

    def drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """Inverted dropout of the first ``leading`` axes."""
        p = 0.0 if self.source.left_off() else p
        if leading is None or leading == x.dim() or not p:
            return F.dropout(x, p)
        keep = F.dropout(x.new_ones(x.shape[:leading]), p)
        return x * keep.reshape(*keep.shape, *(1,) * (x.dim() - leading))

    def alpha_drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """The same for alpha dropout, of all axes or of channels."""
        p = 0.0 if self.source.left_off() else p
        return F.feature_alpha_dropout(x, p, True) if leading == 2 < x.dim() else F.alpha_dropout(x, p, True)


def _leaving_off(found: Trace, excluded: frozenset[str], device: torch.device) -> AbstractContextManager[Any]:
    """Leaves draws off while a network is exported; where none are, it is exported as it is."""
    switched_off = any(path is not None and i not in found.forced for i, path in enumerate(found.off))
    if not switched_off and not any(site.path in excluded for site in found.sites):
        return nullcontext()
    return _Exporting(_Drawing(found, found.left_off(excluded), device), RULES)


def read_program(data: bytes, name: str, device: str = "cpu") -> nn.Module:
    """Gives the network of a ``.pt2`` file on a device, every dropout in it as a module in eval mode.

    Raises:
        InputError: the device cannot be used.
        ArtifactError: the file holds what could run code, or is damaged.
        NoStochasticSite: its dropout was decomposed away.
    """
    sound = preflight(data, name)
    try:
        with quiet():
            program = torch.export.load(io.BytesIO(sound))
        module: Any = _placed(program, device).module()
        found = _retargeted(module)
    except MCDropError:
        raise
    except Exception as error:  # damaged in a way that only shows when it is put together
        raise ArtifactError(f"{name} is not a sound .pt2 file: {' '.join(str(error).split())[:300]}") from error
    if not found:
        raise NoStochasticSite(
            f"{name} has no live stochastic site: every variance would be 0. It holds no dropout and no draw; "
            f"run_decompositions() removes the dropout of eval mode for good; {_RECIPE}"
        )
    flat = torch.fx.GraphModule(module, module.graph)
    flat.recompile()
    return flat.eval()


def _placed(program: torch.export.ExportedProgram, device: str) -> torch.export.ExportedProgram:
    """Moves a program with all that it makes by itself, which names the device that it was exported on."""
    with quiet(), using(device) as there:
        return move_to_device_pass(program, there)


def _retargeted(module: Any) -> int:
    """Puts dropout, draws and batch norm where masks reach them; gives the number of draws."""
    graph, draws = module.graph, 0
    for node in [*graph.nodes]:  # what only checks that it runs as it was exported
        if (node.op == "call_module" and "guards" in str(node.target)) or node.target is _CHECKS_TYPE:
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        if node.target in _DROPOUT:
            draws += _as_module(module, node)
        elif node.target in RECURRENT:
            arguments = list(node.args)
            arguments[1] = states_of_any_rows(graph, node)
            arguments[_TRAIN] = True
            node.target, node.args = RECURRENT[node.target], tuple(arguments)
            draws += bool(arguments[_TRAIN - 1])
        elif node.target is _aten.native_dropout.default:
            draws += _native(module, node)
        elif node.target is _aten.batch_norm.default:
            x, weight, bias, mean, variance, _, momentum, eps, *_ = node.args
            node.target, node.args = F.batch_norm, (x, mean, variance, weight, bias, False, momentum, eps)
        elif node.target is _aten.instance_norm.default:
            x, weight, bias, mean, variance, *rest = node.args
            node.target, node.args = F.instance_norm, (x, mean, variance, weight, bias, *rest[:3])
        elif node.target in _NORMS:
            node.target, node.args = _NORMS[node.target], node.args[:5]
        else:
            draws += _is_draw(node)
            node.target = _SAME.get(node.target, node.target)
    graph.set_codegen(torch.fx.graph.CodeGen())
    graph.lint()
    return draws


def _is_draw(node: Any) -> bool:
    """Whether a call draws; a draw that no mask reaches counts too, and is named where the network is wrapped."""
    if node.target is _aten.scaled_dot_product_attention.default:
        return _attention_rate(node) > 0
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _attention_rate(node: Any) -> float:
    return float(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))


def _as_module(module: Any, node: Any) -> bool:
    """Replaces a call by a dropout module at the place that the exporting network gave it."""
    x, p = node.args[:2]
    stack = [*(node.meta.get("nn_module_stack") or {"": ("",)}).values()]
    place = str(stack[-1][0]) or "dropout"
    names = dict(module.named_modules())
    path = next(name for name in (place, *(f"{place}.dropout{i}" for i in range(len(names) + 1))) if name not in names)
    module.add_submodule(path, _DROPOUT[node.target](float(p)))
    with module.graph.inserting_before(node):
        new = module.graph.call_module(path, (x,))
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    return float(p) > 0


def _native(module: Any, node: Any) -> bool:
    users = [*node.users]
    if any(user.target is not torch.ops.aten and user.args[1] != 0 and user.users for user in users):
        raise ModelRefused("the program reads the mask of a dropout, which cannot be replaced; export it in eval mode")
    for user in users:
        user.target = _aten.dropout.default
        user.args = (node.args[0], node.args[1], True)
    drawn = [_as_module(module, user) for user in users if user.users]
    module.graph.erase_node(node) if not node.users else None
    return any(drawn)


def lost_attention(module: nn.Module) -> list[str]:
    """Names the attention that has no dropout: exports in eval mode lose its rate."""
    paths = []
    for node in getattr(module, "graph", torch.fx.Graph()).nodes:
        if node.target is F.scaled_dot_product_attention and not _attention_rate(node):
            stack = [*(node.meta.get("nn_module_stack") or {"": ("attention",)}).values()]
            paths.append(str(stack[-1][0]))
    return paths
