"""Small networks and their ONNX exports, for the tests of graphs."""

import io
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

import mcdrop
from mcdrop.quiet import quiet

__all__ = [
    "EXAMPLES",
    "Recurrent",
    "X",
    "built",
    "by_hand",
    "dropped",
    "exported",
    "live",
    "number",
    "parsed",
    "passes_of",
]

Array = NDArray[Any]

X: Array = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)  # rows of graphs made by hand


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def _mlp() -> nn.Module:
    first = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*first, nn.Linear(16, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))


def _cnn() -> nn.Module:
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3))


EXAMPLES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (_cnn, (4, 3, 8, 8)),
    "encoder": (_encoder, (4, 5, 8)),
    "lstm": (Recurrent, (4, 5, 4)),
    "mlp": (_mlp, (4, 8)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    """Gives a network in eval mode, with running statistics that are not those of the start, and four rows."""
    make, shape = EXAMPLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, x = make(), torch.randn(shape)
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._NormBase):
                assert isinstance(norm.running_mean, Tensor)
                assert isinstance(norm.running_var, Tensor)
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return module.eval(), x


def live(module: nn.Module) -> nn.Module:
    """Switches on all training flags but those of norm layers and of the root."""
    for child in module.modules():
        child.training = child is not module and not isinstance(child, nn.modules.batchnorm._NormBase)
    return module


@cache
def exported(name: str, *, training: bool = True, legacy: bool = False) -> bytes:
    """Gives what ``torch.onnx.export`` makes of a network."""
    module, x = built(name)
    module = live(module) if training else module
    with quiet():
        if not legacy:
            shapes = ({0: torch.export.Dim("rows")},)
            program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
            assert program is not None
            return bytes(program.model_proto.SerializeToString())
        buffer: Any = io.BytesIO()
        torch.onnx.export(
            module, (x,), buffer, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "rows"}},
            training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        )  # fmt: skip
        return bytes(buffer.getvalue())


def passes_of(model: mcdrop.Model, x: Any, **given: Any) -> Array:
    """Gives twenty passes that begin with the fourth."""
    rows = model.rows(x)
    ask = {"seed": 5, "start": 3, "sampler": "balanced", **given}
    return model.backend.forward(rows, 20, **ask)


def by_hand(
    nodes: list[Any], *, opset: int = 17, dtype: int = TensorProto.FLOAT, initial: tuple[Any, ...] = ()
) -> bytes:
    """Gives a graph of some nodes from x to y, each (N, 6)."""
    given = helper.make_tensor_value_info("x", dtype, ["n", 6])
    made = helper.make_tensor_value_info("y", dtype, ["n", 6])
    graph = helper.make_graph(nodes, "hand", [given], [made], [*initial])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


def number(name: str, value: Any, kind: int = TensorProto.FLOAT) -> Any:
    """Gives a constant."""
    return helper.make_tensor(name, kind, np.shape(value), np.asarray(value).reshape(-1).tolist())


def dropped(x: Array, p: float = 0.25, site: str = "site0", passes: int = 20, seed: int = 5) -> Array:
    """Dropout alone, from the masks themselves."""
    drawn = mcdrop.sample_masks([mcdrop.Site(site, (6,), p)], passes, seed=seed, start=3, sampler="balanced")
    return np.asarray(x[None] * drawn[site][:, None] / (1 - p))


def parsed(data: bytes) -> Any:
    """Gives a graph that is no longer bytes."""
    return onnx.ModelProto.FromString(data)
