"""The posterior itself as a file: one deterministic graph that gives mean, variance and bounds, without mcdrop.

The masks of all passes are constants in it. It runs wherever the format runs, on any number of rows.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.agreement import difference, largest
from mcdrop.engine import PassPlan
from mcdrop.errors import ArtifactError, ModelRefused
from mcdrop.graphs import graph_backend
from mcdrop.masks import sample_masks
from mcdrop.model import Model, Options, check_model
from mcdrop.posterior_statistics import BY_PLACE, statistics
from mcdrop.predict import Prediction, predict
from mcdrop.rowfile import as_array
from mcdrop.streams import path_of, whole

if TYPE_CHECKING:
    from mcdrop.backends.onnx import OnnxBackend

__all__ = ["export_onnx", "export_torch"]

Array = NDArray[Any]

_TOLERANCE = 1e-5
# of a network in few digits, which other kernels round otherwise; and of passes in a precision of their own
_FEW_DIGITS = {"float16": 1e-2, "tf32": 1e-2, "bfloat16": 2e-2, "bf16": 2e-2}
# How much of the mean counts in a difference of values, and how much in one of spreads, which must be right beside it.
# In float64 a value loses what the factor of a mask does, which is in float32, and a spread loses nothing.
_SHARES = {False: (1.0, 0.1), True: (0.01, 1e-8)}
_TYPES = {10: "float16", 16: "bfloat16"}  # as ONNX counts them
_BYTES = 2**31 - 1


def export_onnx(
    model: Model,
    path: str | Path,
    *,
    passes: int = 50,
    level: float = 0.95,
    interval: str = "student_t",
    seed: int | None = None,
    sampler: str | None = None,
) -> Path:
    """Writes an ONNX graph whose outputs are the posterior: mean, variance, lower, upper, standard_error.

    A classifier's also gives label, entropy, expected_entropy, mutual_information and variation_ratio, a gaussian one's
    epistemic and aleatoric. They are float64 if the network's output is, else float32; a label is int64. Any number of
    rows goes in. What was written is run and compared with ``predict``. The model's calibration is no part of it:
    variance and bounds are those of the passes alone, without the noise and scale that ``predict`` takes from one.

    Args:
        model: what ``wrap`` or ``load`` gave.
        path: the file to write.
        passes: how many are baked in.
        level: of the interval.
        interval: "mean", "normal", "predictive" (of a network with a log-variance head), "quantile" or "student_t".
        seed: of the masks; None is the model's default, as for the sampler.
        sampler: of the masks.

    Raises:
        ModelRefused: the network cannot be written as a graph.
        InputError: an interval that a graph cannot hold, too few passes for it, or no path.
        ArtifactError: what was written does not answer as ``predict`` does.
        MissingExtra: onnx, onnxruntime or onnxscript is not installed.
    """
    path = path_of(path)
    plan, options = _asked(model, passes, level, interval, seed, sampler)
    backend = graph_backend(model)
    graph = _posterior(backend, model, plan, options)
    data = graph.SerializeToString()
    if len(data) > _BYTES:
        raise ArtifactError(f"the graph has {len(data)} bytes, more than one ONNX file can hold; ask for fewer passes")
    from mcdrop.onnx_sessions import run_plain

    types = {_TYPES.get(tensor.data_type, "") for tensor in backend.model.graph.initializer}
    types.add(backend.plan(model.example).trace.dtype)
    _check(lambda leaves: run_plain(data, leaves), model, options, _tolerance(model, types))
    return _written(data, path)


def export_torch(
    model: Model,
    path: str | Path,
    *,
    passes: int = 50,
    level: float = 0.95,
    interval: str = "student_t",
    seed: int | None = None,
    sampler: str | None = None,
) -> Path:
    """Writes a ``.pt2`` file whose program gives the posterior as a dict, as ``export_onnx`` does, for torch alone.

    ``torch.export.load(path).module()`` runs it on any number of rows, inputs by position.

    Raises:
        ModelRefused: torch cannot export the network, or it is an ONNX graph.
        InputError: an interval that a program cannot hold, too few passes for it, or no path.
        ArtifactError: what was written does not answer as ``predict`` does.
    """
    from mcdrop.posterior_torch import posterior_program, run_program

    path = path_of(path)
    plan, options = _asked(model, passes, level, interval, seed, sampler)
    data = posterior_program(
        model.backend, model.example, plan, task=model.task, level=options.level, interval=interval
    )
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in model.module.state_dict().values()}
    _check(lambda leaves: run_program(data, leaves), model, options, _tolerance(model, types))
    return _written(data, path)


def _asked(
    model: Model, passes: int, level: float, interval: str, seed: int | None, sampler: str | None
) -> tuple[PassPlan, Options]:
    check_model(model)
    seed = model.defaults.seed if seed is None else seed
    sampler = model.defaults.sampler if sampler is None else sampler
    return PassPlan(passes, seed, sampler), Options(passes, level, interval, seed, sampler=sampler)


def _written(data: bytes, path: Path) -> Path:
    with whole(path) as beside:
        beside.write_bytes(data)
    return path


def _posterior(backend: "OnnxBackend", model: Model, plan: PassPlan, options: Options) -> Any:
    """The graph of all passes with their statistics on top."""
    from mcdrop.posterior_graph import all_passes

    rows = model.example
    trace = backend.plan(rows).trace
    one = backend.deterministic(rows.take(slice(0, 1)))
    drawn = sample_masks(trace.sites, plan.passes, seed=plan.seed, sampler=plan.sampler)
    builder, everything = all_passes(
        backend.model, backend.slots, trace, drawn, backend.output,
        passes=plan.passes, folds=backend.folds(rows), shape=one.shape[1:],
    )  # fmt: skip
    builder.dtype = one.dtype  # float64 of a network in float64, else float32
    found = statistics(
        builder, builder.real(everything), one.shape[1:], task=model.task, passes=plan.passes, sampler=plan.sampler,
        level=options.level, interval=options.interval,
    )  # fmt: skip
    taken = sorted({*found} & {info.name for info in backend.inputs})
    if taken:
        raise ModelRefused(
            f"an input is named {taken[0]!r}, as an output of the posterior is; rename it in the network"
        )
    for name, value in found.items():
        builder.node("Identity", value, output=name)
    builder.size([info.name for info in backend.inputs], [leaf.shape[1:] for leaf in rows.leaves])
    width = one.shape[1:] if model.task != "classification" else (*one.shape[2:], one.shape[1])
    width = (width[0] // 2, *width[1:]) if model.task == "gaussian" else width
    builder.finish({name: width[:-1] if name in BY_PLACE else width for name in found})
    said = {"passes": plan.passes, "seed": plan.seed, "sampler": plan.sampler, "level": options.level}
    entry = builder.model.metadata_props.add()
    entry.key = "mcdrop.posterior"
    entry.value = json.dumps({**said, "interval": options.interval, "task": model.task, "model": model.name})
    return builder.model


def _tolerance(model: Model, types: Collection[str]) -> float:
    """How far two runs may differ, where the network's numbers are of these types."""
    asked = str(model.asked.get("precision", ""))
    return max(_FEW_DIGITS.get(one, _TOLERANCE) for one in (asked, *types))


def _check(run: Callable[[list[Array]], dict[str, Array]], model: Model, options: Options, tolerance: float) -> None:
    """Runs what is to be written, on the example's rows and on one of them, against ``predict``."""
    bare = replace(model, screen=None, calibration=None)
    for rows in (model.example, model.example.take(slice(0, 1))):
        found = run([as_array(leaf) for leaf in rows.leaves])
        expected = predict(
            bare, rows, passes=options.passes, level=options.level, interval=options.interval,
            seed=options.seed, sampler=options.sampler, keep_samples=model.task == "classification",
        )  # fmt: skip
        worst = _worst(found, expected, tolerance)
        if worst > tolerance:
            raise ArtifactError(f"the exported graph differs from mcdrop.predict by {worst:.1e} of the largest value")


def _but_for_ties(found: Array, expected: Prediction, tolerance: float) -> Array:
    """A variation ratio moved towards the expected one by the votes that rounding alone decides, at most.

    Where a pass gives two classes the same probability, but for rounding, each runtime may vote for another one.
    """
    wanted = expected.variation_ratio
    assert wanted is not None  # of a classifier, and with samples, as asked for by the caller
    assert expected.samples is not None
    second, first = np.moveaxis(np.partition(expected.samples, -2, axis=-1)[..., -2:], -1, 0)
    ties = np.mean(first - second <= 2 * tolerance, axis=0)
    return np.asarray(found + np.clip(wanted - found, -ties, ties))


def _worst(found: dict[str, NDArray[Any]], expected: Prediction, tolerance: float) -> float:
    """The largest difference, relative to the largest spread and a share of the largest mean together."""
    # the noise may have no finite variance
    spread, size = largest(np.sqrt([expected.variance, expected.epistemic])), largest(expected.mean)
    share, share_of_spread = _SHARES[found["mean"].dtype == np.float64]
    worst = 0.0
    for name, value in found.items():
        wanted = getattr(expected, name)
        if value.shape != wanted.shape:
            raise ModelRefused(f"the exported graph gives {name} of shape {value.shape} instead of {wanted.shape}")
        if name == "variation_ratio":
            value = _but_for_ties(value, expected, tolerance)
        if name in ("epistemic", "variance"):
            value, wanted = np.sqrt(value), np.sqrt(wanted)
        if name != "label":
            of_spread = name in ("epistemic", "standard_error", "variance")
            scale = spread + size * (share_of_spread if of_spread else share)
            worst = max(worst, difference(value, wanted, scale=scale))
    return worst
