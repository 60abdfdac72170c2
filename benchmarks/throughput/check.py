"""Is what was timed an answer? Mean and variance of a way beside those of many passes of the plain loop.

The draws differ, so the comparison is with the Monte Carlo error of both sides. Rows may share their masks, so a sum
over rows and outputs is taken to be no more certain than its parts.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.throughput.networks import draws_on
from benchmarks.throughput.setting import Moments, Run, Setting

__all__ = ["ANSWER", "ZERO", "Reference", "pooled", "reference", "verdict"]

ANSWER, ZERO = "ok", "zero spread"

TOLERANCE = 6.0  # standard errors, for each of up to 80 outputs of 250 results
TOLERANCE_WHOLE = 5.0  # standard errors, for one figure a result
ROUNDING = {"fp32": 1e-4, "tf32": 3e-3, "bf16": 3e-2}  # of the largest output: what fewer digits may change
CHECKED = 8  # rows, spread over the batch
FEWEST, MOST, SECONDS = 60, 4000, 1.0  # passes of the reference, and the time for those above the fewest
POOLED, POOLED_SECONDS = 20, 0.5


@dataclass(frozen=True)
class Reference:
    """Mean, variance and its relative standard error for one pass, (n, D) each, from passes of the plain loop."""

    rows: slice
    mean: Tensor
    variance: Tensor
    spread: Tensor
    passes: int
    pass_seconds: float


def reference(setting: Setting) -> Reference:
    """Runs the plain loop on some of the rows."""
    rows = slice(None, None, max(1, len(setting.x) // CHECKED))
    net, x = draws_on(setting.copy()), setting.x[rows]
    outputs: list[Tensor] = []
    began = time.perf_counter()
    with torch.no_grad():
        while len(outputs) < FEWEST or (len(outputs) < MOST and time.perf_counter() - began < SECONDS):
            outputs.append(net(x).double().cpu())
    seconds = (time.perf_counter() - began) / len(outputs)
    each = torch.stack(outputs)
    variance = each.var(0)
    fourth = (each - each.mean(0)).pow(4).mean(0)
    kurtosis = (fourth / variance.square().clamp_min(1e-300)).clamp_min(3.0)  # few passes hide a heavy tail
    return Reference(
        rows, each.mean(0), variance, (kurtosis - 1).sqrt(), len(outputs), seconds * len(setting.x) / len(x)
    )


def pooled(run: Run, first: Moments, seconds: float) -> tuple[Moments, int]:
    """Gives the moments of several runs with other draws, and how many there were."""
    found, began = [first], time.perf_counter()
    while len(found) < POOLED and time.perf_counter() - began + seconds <= POOLED_SECONDS:
        found.append(run(len(found)))
        if torch.equal(found[-1][0], first[0]):  # its draws are fixed, so further runs tell nothing
            del found[-1]
            break
    mean, variance = (torch.stack([one[k].double().cpu() for one in found]).mean(0) for k in range(2))
    return (mean, variance), len(found)


def verdict(found: Moments, passes: int, truth: Reference, precision: str = "fp32") -> str:
    """Gives ANSWER, ZERO, or in what and by how much the moments of this many passes are wrong."""
    mean, variance = (moment.double().cpu()[truth.rows] for moment in found)
    if mean.shape != truth.mean.shape:
        return f"wrong: shape {tuple(mean.shape)} instead of {tuple(truth.mean.shape)}"
    if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        return "wrong: not finite"
    if float(variance.mean().sqrt()) < 1e-3 * float(truth.variance.mean().sqrt()):
        return ZERO
    share = (1 / passes + 1 / truth.passes) ** 0.5
    scale = float(truth.mean.abs().max() + truth.variance.max().sqrt())
    error = truth.variance.sqrt() * share + scale * ROUNDING[precision] / TOLERANCE
    off = float(((mean - truth.mean).abs() / error).max())
    if off > TOLERANCE:
        return f"wrong: a mean off by {off:.1f} standard errors"
    weighted = float((truth.variance * truth.spread).sum() / truth.variance.sum())
    whole = abs(float((variance.sum() / truth.variance.sum()).log()))
    off = max(0.0, whole - 2 * ROUNDING[precision]) / (weighted * share)
    if off > TOLERANCE_WHOLE:
        return f"wrong: the variance off by {off:.1f} standard errors"
    return ANSWER
