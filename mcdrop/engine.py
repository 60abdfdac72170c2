"""Running passes over N rows: in chunks, under a memory bound, with statistics gathered as the chunks come.

A row's answer depends on neither the chunk nor its neighbours, because the masks do not: cutting is free, and a row
whose mean is known well enough may leave the batch without changing the answer of any other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mcdrop.backends import Backend, Block
from mcdrop.errors import InputError, UnknownName
from mcdrop.masks import BLOCKS, SAMPLERS, SEED_LIMIT, Site, is_whole
from mcdrop.moments import Gathered
from mcdrop.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MOST_PASSES", "ROUNDING", "PassPlan", "PassResult", "Statistics", "plain", "run_passes"]

MOST_PASSES = 1_000_000
ROUNDING = 1e-5  # relative: in batches of other sizes the scores of float32 networks came out up to 4e-6 apart
_CHECKED_AT = 0.975
_ROUND = 64  # passes between two looks at the error of an adaptive run
_RARE = 0.005  # about the least drop rate in use
_SEEN = 5  # drops, after which the chance that none is seen is exp(-5)

Array = NDArray[np.float64]
Kept = NDArray[np.floating[Any]]  # in the network's own precision


@dataclass(frozen=True)
class PassPlan:
    """Which passes to run. Requests with equal plans can share them.

    The sampler is "balanced" unless said otherwise: at 32 to 100 passes it cut the squared error of the mean 5 to 7
    times on the reference models, with every single pass distributed as before. With a ``tolerance`` a row
    stops as soon as the standard error of its mean is at most that, for every output, and after ``passes`` at the
    latest. With ``exact_last`` the last dropout is averaged over in closed form instead of drawn (see ``exact``): mean
    and variance tend to the same, with less Monte Carlo error, and there are no single passes to keep.

    Raises:
        InputError: passes below 2 (a variance needs two) or above a million, a seed outside 0 to 2**64 - 1, a tolerance
            that is not above 0, a flag that is neither true nor false, or kept samples together with a tolerance or a
            closed form.
    """

    passes: int = 100
    seed: int = 0
    sampler: str = "balanced"
    keep_samples: bool = False
    tolerance: float | None = None
    exact_last: bool = False

    def __post_init__(self) -> None:
        """Checks at the door; the numbers become Python's own, so that equal plans are written alike."""
        if not is_whole(self.passes) or not 2 <= self.passes <= MOST_PASSES:
            raise InputError(f"passes must be a whole number from 2 to {MOST_PASSES}, got {self.passes!r}")
        if not is_whole(self.seed) or not 0 <= self.seed < SEED_LIMIT:
            raise InputError(f"seed must be a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        object.__setattr__(self, "passes", int(self.passes))
        object.__setattr__(self, "seed", int(self.seed))
        UnknownName.check("sampler", self.sampler, SAMPLERS)
        for flag in ("exact_last", "keep_samples"):
            if not isinstance(given := getattr(self, flag), bool | np.bool_):
                raise InputError(f"{flag} must be true or false, got {given!r}")
            object.__setattr__(self, flag, bool(given))
        if self.exact_last and self.keep_samples:
            raise InputError(
                "exact_last averages over the last dropout in closed form, so there are no samples to keep and an "
                "interval that needs them ('quantile') cannot be read; leave it out or choose 'student_t'"
            )
        if self.tolerance is None:
            return
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int | float | np.number):
            raise InputError(f"tolerance must be a number, got {self.tolerance!r}")
        if not 0 < self.tolerance < float("inf"):
            raise InputError(f"tolerance must be above 0, got {self.tolerance!r}")
        object.__setattr__(self, "tolerance", plain(self.tolerance))
        if self.keep_samples:
            raise InputError(
                "tolerance ends each row after its own number of passes, so samples cannot be kept and an interval "
                "that needs them all ('quantile') cannot be read; leave out tolerance or choose 'student_t'"
            )


def plain(number: "float | np.number[Any]") -> float:
    """Gives a number as Python's own, one of fewer digits as it is written: np.float32(0.99) is meant as 0.99."""
    return float(str(number)) if isinstance(number, np.floating) else float(number)


@dataclass(frozen=True)
class Statistics:
    """What is gathered: outputs (t, N, ...) to statistics (t, N, ..., K); the first ``width(K)`` are the mean's.

    ``there`` does the same with a tensor, where it is. Where passes are kept, ``kept`` makes what is kept of the
    statistics, which must fit into the type of the outputs.
    """

    of: Callable[[Array], Array]
    there: "Callable[[Tensor], Tensor]"
    width: Callable[[int], int]
    kept: Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class PassResult:
    """What the passes gave for K statistics, arrays (N, ..., K).

    ``passes`` and ``degrees`` (of freedom of the standard error) are (N,), ``samples`` (T, N, ..., K) what is kept.
    ``features`` (N, F) are hidden features read at ``layer`` (None: the default), where a screen compares them.
    ``deterministic`` is None where it was not asked for, and ``statistics``, what was gathered, where it is not known.
    """

    passes: NDArray[np.int64]
    mean: Array
    variance: Array
    standard_error: Array
    degrees: NDArray[np.int64]
    deterministic: Array | None
    samples: Kept | None
    plan: PassPlan
    features: NDArray[np.float32] | None = None
    layer: str | None = None
    statistics: Statistics | None = None

    @classmethod
    def of(
        cls, gathered: Gathered, deterministic: Array | None, samples: Kept | None, plan: PassPlan,
        statistics: Statistics | None = None,
    ) -> "PassResult":  # fmt: skip
        """Reads what was gathered for rows that all had the same passes."""
        found = gathered.read()
        zeros = np.zeros(len(found.mean), np.int64)
        return cls(
            passes=zeros + gathered.count,
            mean=found.mean,
            variance=found.variance,
            standard_error=np.sqrt(found.error_squared),
            degrees=zeros + found.degrees,
            deterministic=deterministic,
            samples=samples,
            plan=plan,
            statistics=statistics,
        )

    @classmethod
    def join(cls, parts: "list[PassResult]", order: NDArray[np.int64] | None = None) -> "PassResult":
        """Puts the rows of several results together, in the given order of rows."""
        if len(parts) == 1 and order is None:
            return parts[0]
        which = slice(None) if order is None else order
        fields = ("passes", "mean", "variance", "standard_error", "degrees", "deterministic")
        joined: dict[str, Any] = {}
        for name in fields:
            each = [found for part in parts if (found := getattr(part, name)) is not None]
            joined[name] = np.concatenate(each)[which] if each else None
        kept = [part.samples for part in parts if part.samples is not None]
        joined["samples"] = np.concatenate(kept, axis=1)[:, which] if kept else None
        return cls(**joined, plan=parts[0].plan, statistics=parts[0].statistics)


def run_passes(
    backend: Backend, rows: Rows, plan: PassPlan, *, statistics: Statistics, deterministic: bool = True
) -> PassResult:
    """Runs a plan over all rows, and beside it the network with every draw off where that is asked for.

    Memory follows the chunk, not the number of passes, unless samples are kept.
    """
    run = _fixed if plan.tolerance is None else _adaptive
    with np.errstate(invalid="ignore"):  # infinite passes have no variance: NaN says so
        if rows.count == 1:  # not to be cut
            return run(backend, rows, plan, statistics, deterministic)
        # what all rows of a block share is done for each block anew
        room = max(backend.chunk_bytes, backend.shared_bytes(rows))
        size = max(1, room // max(1, backend.row_bytes(rows)))
        return PassResult.join([run(backend, block, plan, statistics, deterministic) for block in rows.split(size)])


def _of(
    gathered: Gathered, deterministic: Array | None, samples: Kept | None, plan: PassPlan, statistics: Statistics
) -> PassResult:
    """Reads what was gathered; a closed form gathers conditional means and variances, whose total is the variance."""
    result = PassResult.of(gathered, deterministic, samples, plan, statistics)
    if not plan.exact_last:
        return result
    width = result.mean.shape[-1] // 2
    return replace(
        result,
        mean=result.mean[..., :width],
        variance=result.variance[..., :width] + result.mean[..., width:],
        standard_error=result.standard_error[..., :width],
    )


def _deterministic(block: Block, statistics: Statistics) -> Array:
    return np.asarray(statistics.of(block.deterministic().astype(np.float64)[None])[0])


def _fixed(backend: Backend, rows: Rows, plan: PassPlan, statistics: Statistics, deterministic: bool) -> PassResult:
    kept: list[Kept] | None = [] if plan.keep_samples else None
    block = backend.block(rows, exact_last=plan.exact_last, rides=deterministic)
    gathered = Gathered(BLOCKS[plan.sampler])
    _gather(gathered, block, plan, statistics, (0, plan.passes), kept)
    samples = np.concatenate(kept) if kept else None
    off = _deterministic(block, statistics) if deterministic else None
    return _of(gathered, off, samples, plan, statistics)


def _gather(
    gathered: Gathered, block: Block, plan: PassPlan, statistics: Statistics, span: tuple[int, int],
    kept: list[Kept] | None = None,
) -> None:  # fmt: skip
    """Runs the passes of a span in chunks, and adds them to what was gathered.

    Chunks are of equal size; those that are to be summed up where they are, of whole blocks where these fit.
    """
    count = span[1] - span[0]
    chunk = -(-count // -(-count // block.most))
    if chunk < count and block.sums_there(chunk):
        unit = max((size for size, _ in gathered.blocks), default=1)
        whole = -(-chunk // unit) * unit
        chunk = whole if whole <= block.most else chunk // unit * unit or chunk
    for start in range(*span, chunk):
        count = min(chunk, span[1] - start)
        summing = gathered.summing(statistics.there) if kept is None and block.sums_there(count) else None
        if summing is not None:
            sums = block.summed(count, seed=plan.seed, start=start, sampler=plan.sampler, summing=summing)
            if sums is not None:
                gathered.add_sums(count, sums)
                continue
        outputs = block.forward(count, seed=plan.seed, start=start, sampler=plan.sampler)
        values = statistics.of(outputs.astype(np.float64))
        if kept is not None:
            kept.append(statistics.kept(values).astype(outputs.dtype))
        gathered.add(values)


def _telling_passes(sites: Sequence[Site]) -> int:
    """From how many passes on each draw has dropped a unit, and kept one, but for a chance of exp(-5).

    What uniform or normal numbers are compared with is not known: they are taken to drop at the least rate in use.
    """
    dropped = (
        (min(site.p, 1 - site.p) if site.kind == "bernoulli" else _RARE) * max(1, math.prod(site.shape))
        for site in sites
        if not site.constant
    )
    return max((math.ceil(_SEEN / units) for units in dropped), default=1)


def _adaptive(backend: Backend, rows: Rows, plan: PassPlan, statistics: Statistics, deterministic: bool) -> PassResult:
    """Looks at the error after each round and lets the rows go that are done."""
    assert plan.tolerance is not None
    block, off = backend.block(rows, exact_last=plan.exact_last, rides=deterministic), None
    sites = backend.sites(rows)
    enough = _telling_passes(sites[:-1] if plan.exact_last else sites)  # the closed form needs no drop of the last
    active, left = np.arange(rows.count), rows
    gathered, done, order = Gathered(BLOCKS[plan.sampler]), [], []
    for start in range(0, plan.passes, _ROUND):
        stop = min(start + _ROUND, plan.passes)
        _gather(gathered, block, plan, statistics, (start, stop))
        if deterministic and not start:
            off = _deterministic(block, statistics)
        # with few blocks the error is itself uncertain: widened as its t quantile is over the normal one
        found = gathered.read()
        wide = special.stdtrit(found.degrees, _CHECKED_AT) / special.ndtri(_CHECKED_AT)
        outputs = found.mean.shape[-1] // (2 if plan.exact_last else 1)
        squared = found.error_squared[..., : statistics.width(outputs)]
        error = wide * np.sqrt(squared).reshape(len(active), -1).max(axis=1)
        known = (error > 0) | (stop >= enough)  # that all passes are alike may be for want of a rare drop
        finished = known & (error <= plan.tolerance) | (stop == plan.passes)
        if finished.any():
            theirs = None if off is None else off[active[finished]]
            done.append(_of(gathered.take(finished), theirs, None, plan, statistics))
            order.append(active[finished])
            if finished.all():
                break
            active, gathered = active[~finished], gathered.take(~finished)
            left = rows.take(active)
            block = backend.block(left, exact_last=plan.exact_last, rides=False)
    return PassResult.join(done, np.argsort(np.concatenate(order)))
