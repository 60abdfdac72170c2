"""What the draws do to a network: who makes the variance, what dropout does to batch norm, what need not be repeated.

Everything here is measured on the example rows with a few passes, and goes into the audit.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mcdrop.agreement import ROUNDING, others_than_outputs
from mcdrop.audit import Audit, NormReport, times
from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import ModelRefused
from mcdrop.forward import as_numpy
from mcdrop.moments import Found, mean_gap, moments_of, total_variance
from mcdrop.onednn import FLOPS, available
from mcdrop.planning import LARGEST_ERROR
from mcdrop.record import ALL_HIGH, ALL_LOW, caller, module_paths
from mcdrop.rows import Rows

__all__ = ["diagnose"]

_ROWS, _PASSES = 4, 32
_FEWEST_PASSES = 16  # where these take long enough
_NORM_ROWS = 256  # so few as above say little about a variance
_LOOKS = (None, ALL_LOW, ALL_HIGH)  # passes that show whether anything changes: as drawn, and the extremes
_SECONDS = 5.0  # longer than this the shares are not worth waiting for
_SHIFTED = (0.8, 1.25)  # variance ratios outside are worth a warning
_PREDICTED_AT = 100


def diagnose(backend: TorchBackend, rows: Rows, audit: Audit) -> Audit:
    """Gives the audit with shares of variance, batch norm's variance shift, and the deterministic prefix.

    Raises:
        ModelRefused: a lower precision changes the passes by more than a fifth of their standard deviation.
    """
    example, rows = rows, rows.take(slice(0, _ROWS))
    began = time.monotonic()
    plan = backend.plan(rows)
    prepared = time.monotonic() - began
    everything, seconds = _passes(backend, rows)
    error, found = _precision_error(backend, rows, everything), _moments(everything)
    # where the draws belong to one number of rows, or these take long, the few have to do
    more = example.count > _ROWS and not plan.trace.unclear and seconds * _NORM_ROWS < _SECONDS * _ROWS * _PASSES / 2
    norms, looked_at = _norms(backend, rows, example.take(slice(0, _NORM_ROWS)) if more else rows)
    prefix, speed_up = _prefix(backend, rows)
    audit = replace(
        audit, tier=plan.tier, tier_reason=plan.reason, kept_from=plan.kept_from, chunk=plan.chunk,
        exact_last=plan.exact is not None, prepare_seconds=prepared, norms=norms, prefix_share=prefix,
        speed_up=speed_up,
        mean_gap=mean_gap(found, backend.deterministic(rows)), precision=backend.precision, precision_error=error,
        warnings=(*audit.warnings, *_norm_warnings(norms, looked_at), *_precision_warnings(backend)),
    )  # fmt: skip
    if seconds * len(audit.live) > _SECONDS:
        return audit
    return replace(audit, sites=_shares(backend, rows, audit, found))


def _passes(backend: TorchBackend, rows: Rows) -> tuple[Tensor, float]:
    """As many passes as usual, or fewer where they take long, and about how many seconds the usual ones take."""
    began = time.monotonic()
    passes = backend.run(rows, _FEWEST_PASSES, only=None)
    seconds = (time.monotonic() - began) * _PASSES / _FEWEST_PASSES
    if seconds > _SECONDS:
        return passes, seconds
    more = backend.run(rows, _PASSES - _FEWEST_PASSES, only=None, start=_FEWEST_PASSES)
    return torch.cat([passes, more]), seconds


def _shares(backend: TorchBackend, rows: Rows, audit: Audit, everything: Found) -> Any:
    """The variance that each live site makes on its own, as a part of the variance of all together."""
    total = total_variance(everything)
    sites = []
    for site in audit.sites:
        if site.verdict == "live":
            alone = _moments(backend.run(rows, _PASSES, only=site.name))
            site = replace(site, share=total_variance(alone) / total)
        sites.append(site)
    return tuple(sites)


def _moments(passes: Tensor) -> Found:
    return moments_of(map(as_numpy, passes))


def _precision_warnings(backend: TorchBackend) -> list[str]:
    place = torch.device(backend.devices[0])
    if backend.precision != "bf16" or place.type != "cpu" or available(torch.bfloat16, place):
        return []
    return ["precision='bf16' is slower than 'fp32' here: this processor has no instructions for bfloat16"]


def _precision_error(backend: TorchBackend, rows: Rows, everything: Tensor) -> float | None:
    """What a lower precision changes in passes of the same masks, in standard deviations: a root mean square.

    It is that of the output, or channel, where it is largest, since their units may differ. What does not vary beyond
    rounding, such as masked logits, has no say in it.
    """
    if backend.precision == "fp32":
        return None
    exact = backend.run(rows, len(everything), only=None, tier="loop")
    found = _moments(exact)
    others, squares = others_than_outputs(found.variance.ndim), 0.0
    with np.errstate(invalid="ignore"):
        varies = found.variance > np.square(ROUNDING[4] * found.mean)
        for low, full in zip(map(as_numpy, everything), map(as_numpy, exact), strict=True):
            square = np.square(low - full, dtype=np.float64)
            squares += np.nansum(square, axis=others, where=varies)
    spread = np.nansum(found.variance, axis=others, where=varies)
    shares = np.divide(squares, len(everything) * spread, out=np.zeros_like(spread), where=spread > 0)
    error = math.sqrt(np.max(shares, initial=0.0)) if varies.any() else math.inf
    if not error <= LARGEST_ERROR:
        where = f" of output {np.argmax(shares)}" if shares.size > 1 else ""
        raise ModelRefused(
            f"precision={backend.precision!r} is off from fp32 by {error:.0%} of the passes' standard deviation{where}"
            f", more than {LARGEST_ERROR:.0%}: the spread of this network is too small for so few digits; use 'fp32'"
        )
    return error


# -- batch norm --------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    values: int
    mean: Tensor
    variance: Tensor
    running: Tensor


class _NormInputs(TorchFunctionMode):
    """Collects the mean and variance of what each batch norm layer is given, by channel, and from how many values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, list[_Seen]] = {}
        self._paths = module_paths(module)
        # by the layer that holds the statistics: the nodes of an exported program have no layer of their own
        self._owners = {id(buffer): name.rpartition(".")[0] for name, buffer in module.named_buffers()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Looks at calls of batch norm with running statistics, and runs everything as it is."""
        if func is F.batch_norm and len(args) > 2 and args[2] is not None:
            x = args[0].detach()
            path = self._owners.get(id(args[2])) or caller(self._paths)
            self.seen.setdefault(path, []).append(_Seen(x.numel() // x.shape[1], *_mean_variance(x), args[2]))
        return func(*args, **(kwargs or {}))


def _mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """By channel; the mean is taken off first, so that it takes no digits of the variance."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], -1)
    mean = x.mean((0, 2))
    rest = x - mean[:, None]
    off = rest.mean((0, 2)).double()
    return mean.double() + off, rest.square().mean((0, 2)).double() - off**2


def _norms(backend: TorchBackend, few: Rows, more: Rows) -> tuple[tuple[NormReport, ...], int]:
    """Per norm layer the variance under masks over the running one, and over that without (Li et al. 2018, sec. 3).

    With the number of rows that were looked at.
    """
    backend.watch(few, looked := _NormInputs(backend.plain))
    if not looked.seen:
        return (), few.count
    try:
        masked, plain = _norm_inputs(backend, more, together=None not in backend.plan(few).trace.layouts)
    except Exception:  # whatever a network does with more rows, such as those of longer sequences
        more = few
        masked, plain = _norm_inputs(backend, few, together=False)
    reports = []
    for path, (under_masks, running) in ((path, _pooled(seen)) for path, seen in masked.seen.items()):
        if path not in plain.seen:
            continue
        without, _ = _pooled(plain.seen[path])
        floor = 1e-6 * max(float(without.max()), 1e-12)
        reports.append(
            NormReport(
                path,
                variance_ratio=float((under_masks.clamp_min(floor) / running.clamp_min(floor)).median()),
                mask_effect=float((under_masks.clamp_min(floor) / without.clamp_min(floor)).median()),
            )
        )
    return tuple(reports), more.count


def _norm_inputs(backend: TorchBackend, rows: Rows, *, together: bool) -> tuple[_NormInputs, _NormInputs]:
    """What norm layers are given under masks, each row's own, and without.

    ``together`` runs as many rows at a time as memory allows; else it is as often as there are passes, for masks that
    all rows share.
    """
    masked, plain = _NormInputs(backend.live), _NormInputs(backend.plain)
    room = max(_ROWS, backend.chunk_bytes // backend.row_bytes(rows.take(slice(0, _ROWS))))
    for block in rows.split(room):
        backend.watch(block, plain)
    many = rows.take([*range(rows.count)] * min(_PASSES, max(1, _ROWS * _PASSES // rows.count)))
    if len(_LOOKS) * rows.count < many.count and (unmoved := _unmoved(backend, [*rows.split(room)])):
        return unmoved, plain
    began = time.monotonic()
    for number, block in enumerate(many.split(min(room, many.count if together else -(-many.count // _PASSES)))):
        backend.each_row(block, seed=0, start=number * room, watching=masked)
        if time.monotonic() - began > _SECONDS and 4 * (number + 1) * block.count >= many.count:
            break
    return masked, plain


def _unmoved(backend: TorchBackend, blocks: Sequence[Rows]) -> _NormInputs | None:
    """What norm layers are given in a pass, where no draw comes before one; None where one does.

    Numbers as low and as high as can be show a drop, however rare it is; those that are drawn show noise that cancels
    out where all are alike. Most networks drop in their head alone, and more passes of all before it would be for
    nothing.
    """
    looks = [_NormInputs(backend.live) for _ in _LOOKS]
    try:
        for look, at in zip(looks, _LOOKS, strict=True):
            for block in blocks:
                backend.first_pass(block, look, at=at)
    except Exception:  # whatever a network makes of nothing
        return None
    first, *others = ([(path, one) for path, seen in look.seen.items() for one in seen] for look in looks)
    alike = all(len(first) == len(other) and all(map(_alike, first, other)) for other in others)
    return looks[0] if alike else None


def _alike(one: tuple[str, _Seen], other: tuple[str, _Seen]) -> bool:
    (path, seen), (elsewhere, beside) = one, other
    return path == elsewhere and torch.equal(seen.mean, beside.mean) and torch.equal(seen.variance, beside.variance)


def _pooled(seen: list[_Seen]) -> tuple[Tensor, Tensor]:
    """The variance of all values by channel, and the running one."""
    means, variances = (torch.stack([getattr(one, name) for one in seen]) for name in ("mean", "variance"))
    shares = torch.tensor([one.values for one in seen], dtype=means.dtype, device=means.device)[:, None]
    shares /= shares.sum()
    mean = (shares * means).sum(0)
    return (shares * (variances + (means - mean) ** 2)).sum(0), seen[0].running.double()


def _norm_warnings(norms: tuple[NormReport, ...], rows: int) -> list[str]:
    low, high = _SHIFTED
    shifted = [norm for norm in norms if not low <= norm.mask_effect <= high]
    if not shifted:
        return []
    worst = max(shifted, key=lambda norm: abs(math.log(max(norm.mask_effect, 1e-12))))
    fit = all(low <= norm.variance_ratio <= high for norm in shifted)
    advice = (
        "Here they fit the passes; put dropout after the last norm layer where they should fit both"
        if fit
        else "Put dropout after the last norm layer, or fit the statistics to the passes with "
        "mcdrop.recalibrate_batchnorm"
    )
    effect, ratio = times(worst.mask_effect), times(worst.variance_ratio)
    return [
        f"dropout shifts the variance at {len(shifted)} of {len(norms)} norm layers, most {effect} at "
        f"{worst.path} ({ratio} of its running variance, on {rows} rows): running statistics fit "
        f"the passes or the deterministic output, not both (Li et al. 2018). {advice}"
    ]


# -- prefix ------------------------------------------------------------------------------------------------------------


def _operations(backend: TorchBackend, rows: Rows, passes: int) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        backend.run(rows, passes, only=None, at_once=True)
    return int(counter.get_total_flops())


def _prefix(backend: TorchBackend, rows: Rows) -> tuple[float | None, float | None]:
    """The share of floating-point operations before the first draw, and the speed-up at 100 passes that follows.

    Counted on one and on three batched passes: what does not grow is run once.
    """
    try:
        once, thrice = (_operations(backend, rows, passes) for passes in (1, 3))
    except Exception:  # torch's counter does not take all that networks do, such as differentiate inside a forward
        return None, None
    if once <= 0:
        return None, None
    repeated = (thrice - once) / 2
    prefix = max(once - repeated, 0.0)
    return prefix / once, _PREDICTED_AT * once / (prefix + _PREDICTED_AT * repeated)
