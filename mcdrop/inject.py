"""Dropout for networks that were trained without it (Ledda, Fumera and Roli 2023): injected after the fact.

The result shares every weight with the network it was made from. Its spread says nothing until it is calibrated on
held-out data, and the audit says so. To add a kind, add one function and one line to ``KINDS``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mcdrop.calibration import labels_of, targets_of
from mcdrop.errors import InputError, UnknownName
from mcdrop.layers import drop_block2d, drop_weights, stochastic_depth
from mcdrop.model import Model, not_a_network
from mcdrop.predict import predict
from mcdrop.shadow import live_shadow
from mcdrop.wrapping import each_once, wrap

__all__ = ["KINDS", "Kind", "choose_rate", "inject"]

Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

_BLOCK_SIZE = 3
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Kind:
    """A way to inject: what it does to a layer, and the types of layer that it fits without being told where."""

    apply: Callable[[nn.Module, float], None]
    layers: tuple[type[nn.Module], ...]
    keep_last: bool = True


def inject(module: nn.Module, *, kind: str = "dropout", p: float = 0.1, where: Where = None) -> nn.Module:
    """Gives a network with dropout in it that shares the given network's weights; the given one is not touched.

    Args:
        module: any network.
        kind: "dropout", "dropout2d", "dropblock" or "stochastic_depth" (after a layer, on the first of its tensors
            where it gives several), or "dropconnect" (on its weights).
        p: the drop rate; ``choose_rate`` finds one on held-out data.
        where: paths of layers as in ``named_modules()``, a function of (path, layer), or None for all layers that fit
            the kind, but the last one, the output, where the kind acts after a layer. Stochastic depth must be told.

    Raises:
        InputError: no network, an unknown kind, a rate outside (0, 1), or no layer that fits.
    """
    UnknownName.check("kind of injection", kind, KINDS)
    if not isinstance(p, int | float | np.number) or not 0 < p < 1:
        raise InputError(f"p must be a number between 0 and 1, got {p!r}")
    if not isinstance(module, nn.Module):
        raise not_a_network(module)
    shadow = live_shadow(module)
    chosen = _chosen(shadow, KINDS[kind], where)
    if not chosen:
        raise InputError(f"no layer to inject {kind} at: {_fitting(shadow, KINDS[kind], where)}")
    layers = dict(shadow.named_modules())
    for path in chosen:
        KINDS[kind].apply(layers[path], p)
    said = [vars(shadow).get("_mcdrop_injected"), f"{kind} with p={p:g} at {', '.join(chosen)}"]
    shadow.__dict__["_mcdrop_injected"] = "; ".join(filter(None, said))
    return shadow


def _chosen(module: nn.Module, kind: Kind, where: Where) -> list[str]:
    layers = dict(module.named_modules())
    if where is None:
        fitting = [path for path, layer in layers.items() if isinstance(layer, kind.layers)]
        return fitting[:-1] if kind.keep_last else fitting
    if isinstance(where, type):
        raise InputError(f"where takes no types; for one give lambda path, layer: isinstance(layer, {where.__name__})")
    if callable(where):
        return [path for path, layer in layers.items() if path and where(path, layer)]
    paths = each_once(where, "where", (str,))
    unknown = [path for path in paths if path not in layers]
    if unknown:
        raise InputError(f"the network has no module {', '.join(map(repr, unknown))}; paths are as in named_modules()")
    return list(paths)


def _fitting(module: nn.Module, kind: Kind, where: Where) -> str:
    if where is not None:
        return "where chose none"
    if not kind.layers:
        return "say where, with the paths of the residual branches"
    names = " or ".join(layer.__name__ for layer in kind.layers)
    return f"the network needs {'two' if kind.keep_last else 'one'} of {names}; or say where"


@dataclass(frozen=True)
class _Hook:
    """Drops what a layer gives; an object, as a function made for one rate could not be pickled with the network.

    Of several tensors the first is dropped, which is a recurrent layer's output beside its states.
    """

    drop: Callable[[Tensor, float, bool], Tensor]
    p: float

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        several = type(output) in (list, tuple) and len(output) > 0  # as recurrent layers and attention give
        first = output[0] if several else output
        if not isinstance(first, Tensor):
            raise InputError(
                f"nothing can be dropped after {type(module).__name__}, which gives {type(first).__name__} and no "
                "tensor; choose another layer with where="
            )
        dropped = self.drop(first, self.p, module.training)
        return type(output)([dropped, *output[1:]]) if several else dropped


def _after(drop: Callable[[Tensor, float, bool], Tensor]) -> Callable[[nn.Module, float], None]:
    """Adds a draw behind a layer, by a hook, so that the layer keeps its type and its attributes."""

    def apply(layer: nn.Module, p: float) -> None:
        layer.register_forward_hook(_Hook(drop, p))

    return apply


def _drop_blocks(x: Tensor, p: float, training: bool) -> Tensor:
    return drop_block2d(x, p, _BLOCK_SIZE, training)


def _on_weights(layer: nn.Module, p: float) -> None:
    """Drops weights, for this layer object alone."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise InputError(f"dropconnect fits Linear and Conv2d layers, not {type(layer).__name__}")
    # no method of the layer: a pickle would name it, and give the forward of the layer's type when it is read
    layer.__dict__["forward"] = partial(_with_weights_dropped, layer, p)


def _with_weights_dropped(layer: nn.Linear | nn.Conv2d, p: float, x: Tensor) -> Tensor:
    return drop_weights(layer, x, p, layer.training)


KINDS: dict[str, Kind] = {
    "dropblock": Kind(_after(_drop_blocks), (nn.Conv2d,)),
    "dropconnect": Kind(_on_weights, (nn.Linear, nn.Conv2d), keep_last=False),
    "dropout": Kind(_after(F.dropout), (nn.Linear,)),
    "dropout2d": Kind(_after(F.dropout2d), (nn.Conv2d,)),
    "stochastic_depth": Kind(_after(stochastic_depth), ()),
}


def choose_rate(
    module: nn.Module,
    x_held: Any,
    y_held: ArrayLike,
    *,
    kind: str = "dropout",
    where: Where = None,
    rates: Sequence[float] = RATES,
    task: str = "regression",
    criterion: str = "likelihood",
    level: float = 0.9,
    passes: int = 64,
    seed: int = 0,
) -> tuple[float, dict[float, float]]:
    """Gives the rate that is best on held-out rows, and the criterion at each rate (larger is better).

    ``criterion`` is "likelihood" (mean log-likelihood; for regression a normal with the passes' variance plus a noise
    fitted on the same rows) or "coverage" (minus the distance of the interval's coverage from ``level``).

    Raises:
        InputError: an unknown criterion, no rate, or rows, targets or labels that do not fit.
    """
    UnknownName.check("criterion", criterion, CRITERIA)
    values = {}
    if isinstance(rates, str) or not isinstance(rates, Iterable):
        raise InputError(f"rates must be a list of drop rates such as [0.1, 0.2], got {rates!r}")
    for rate in rates:
        model = wrap(inject(module, kind=kind, p=rate, where=where), example=x_held, task=task)
        values[rate] = CRITERIA[criterion](model, x_held, y_held, level, passes, seed)
    if not values:
        raise InputError("rates holds no drop rate; give at least one, such as rates=[0.1]")
    return max(values, key=lambda rate: values[rate]), values


def _likelihood(model: Model, x: Any, y: Any, level: float, passes: int, seed: int) -> float:
    p = predict(model, x, passes=passes, seed=seed, level=level)
    if model.task == "classification":
        true = np.take_along_axis(p.mean, labels_of(y, p.mean)[..., None], axis=-1)
        return float(np.mean(np.log(np.maximum(true, 1e-12))))
    residual = np.square(targets_of(y, p.mean) - p.mean)
    noise = np.zeros(1) if p.aleatoric is not None else np.maximum((residual - p.epistemic).mean(axis=0), 1e-12)
    variance = np.maximum(p.variance + noise, 1e-12)
    return float(np.mean(-0.5 * (np.log(2 * np.pi * variance) + residual / variance)))


def _coverage(model: Model, x: Any, y: Any, level: float, passes: int, seed: int) -> float:
    if model.task == "classification":
        raise InputError("criterion 'coverage' needs a regression; choose 'likelihood' for classes")
    p = predict(model, x, passes=passes, seed=seed, level=level)
    target = targets_of(y, p.mean)
    return -abs(float(np.mean((p.lower <= target) & (target <= p.upper))) - level)


CRITERIA: dict[str, Callable[[Model, Any, Any, float, int, int], float]] = {
    "coverage": _coverage,
    "likelihood": _likelihood,
}
