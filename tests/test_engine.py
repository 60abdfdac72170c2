"""The engine: chunks and batches do not matter, memory is bounded, and the Monte Carlo error is honest."""

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from captures import Operations
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import mcdrop
from mcdrop.engine import MOST_PASSES, PassPlan, PassResult, run_passes
from mcdrop.errors import InputError, UnknownName
from mcdrop.layers import StochasticDepth
from mcdrop.rows import Rows
from mcdrop.summaries import TASKS

Array = NDArray[np.float64]

SEEDS = 400
every_sampler = pytest.mark.parametrize("sampler", ["balanced", "iid"])


@cache
def small() -> tuple[mcdrop.Model, NDArray[np.float32]]:
    """An 8-50-1 network as for the UCI sets, dropout 0.1 before each layer, trained a little; and 40 rows."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        x = torch.randn(400, 8)
        y = x[:, :1] * x[:, 1:2] + torch.sin(2 * x[:, 2:3]) + 0.1 * torch.randn(400, 1)
        net = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 50), nn.ReLU(), nn.Dropout(0.1), nn.Linear(50, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    rows = x[:40].numpy()
    return mcdrop.wrap(net, example=rows), rows


def run(x: Any = None, *, chunk_bytes: int | None = None, **plan: Any) -> PassResult:
    model, rows = small()
    before = model.backend.chunk_bytes
    model.backend.chunk_bytes = chunk_bytes or before
    try:
        given = model.rows(rows if x is None else x)
        return run_passes(model.backend, given, PassPlan(**plan), statistics=TASKS["regression"].statistics)
    finally:
        model.backend.chunk_bytes = before


@cache
def truth() -> tuple[Array, Array]:
    """Mean and variance of 20000 independent passes, (N,)."""
    result = run(passes=20_000, seed=987_654_321, sampler="iid")
    return result.mean[:, 0], result.variance[:, 0]


@cache
def repeats(passes: int, sampler: str) -> dict[str, Array]:
    """What 400 seeds gave: name -> (seeds, N)."""
    results = [run(passes=passes, seed=seed, sampler=sampler) for seed in range(SEEDS)]
    names = ("mean", "variance", "standard_error")
    found = {name: np.stack([getattr(result, name)[:, 0] for result in results]) for name in names}
    return found | {"degrees": np.stack([result.degrees for result in results])}


# -- the same answer ---------------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("chunk_bytes", [1, 3_000, 100_000, 10**9])
def test_chunk_size_does_not_change_the_answer(sampler: str, chunk_bytes: int) -> None:
    """From one row and one pass at a time to all at once."""
    plan: dict[str, Any] = {"passes": 40, "seed": 3, "sampler": sampler, "x": small()[1][:6]}
    whole, cut = run(**plan), run(chunk_bytes=chunk_bytes, **plan)
    for name in ("mean", "variance", "standard_error"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(cut.degrees, whole.degrees)
    kept = run(chunk_bytes=chunk_bytes, keep_samples=True, **plan).samples
    expected = run(keep_samples=True, **plan).samples
    assert kept is not None
    assert expected is not None
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-5)


@every_sampler
def test_a_row_alone_in_a_batch_and_in_any_order_gets_the_same_answer(sampler: str) -> None:
    _, x = small()
    many = np.concatenate([x] * 7)[:256]
    order = np.random.default_rng(0).permutation(256)
    plan: dict[str, Any] = {"passes": 30, "seed": 9, "sampler": sampler}
    batch, shuffled = run(many, **plan), run(many[order], **plan)
    np.testing.assert_allclose(shuffled.mean, batch.mean[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shuffled.variance, batch.variance[order], rtol=1e-4, atol=1e-7)
    for row in (0, 100, 255):
        alone = run(many[row : row + 1], **plan)
        np.testing.assert_allclose(alone.mean, batch.mean[row : row + 1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone.variance, batch.variance[row : row + 1], rtol=1e-4, atol=1e-7)


@every_sampler
def test_fewer_passes_are_the_first_of_more(sampler: str) -> None:
    few = run(passes=20, sampler=sampler, keep_samples=True).samples
    many = run(passes=70, sampler=sampler, keep_samples=True).samples
    assert few is not None
    assert many is not None
    np.testing.assert_allclose(few, many[:20], rtol=1e-5, atol=1e-6)


def test_another_seed_gives_another_answer() -> None:
    means = [run(passes=20, seed=seed).mean for seed in (0, 1, 2**64 - 1)]
    assert not np.allclose(means[0], means[1])
    assert not np.allclose(means[0], means[2])
    np.testing.assert_array_equal(means[0], run(passes=20, seed=0).mean)


def test_the_deterministic_output_is_plain_eval() -> None:
    model, x = small()
    with torch.no_grad():
        expected = model.module.eval()(torch.from_numpy(x)).numpy()
    off = run(passes=2).deterministic
    assert off is not None
    np.testing.assert_allclose(off, expected, rtol=1e-6)


def test_kept_samples_are_what_the_moments_are_of() -> None:
    result = run(passes=40, sampler="iid", keep_samples=True)
    assert result.samples is not None
    assert result.samples.shape == (40, 40, 1)
    samples = result.samples.astype(np.float64)
    np.testing.assert_allclose(result.mean, samples.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.variance, samples.var(axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(result.standard_error, stats.sem(samples), rtol=1e-9)


@pytest.mark.parametrize(
    "plan", [{"passes": 20}, {"passes": 200, "tolerance": 0.02}, {"passes": 9, "exact_last": True}]
)
def test_without_the_deterministic_output_there_is_a_pass_less_and_the_rest_is_the_same(plan: dict[str, Any]) -> None:
    model, x = small()
    found, rows = [], []
    for asked in (True, False):
        with Operations() as ran:
            found.append(mcdrop.sample(model, x, PassPlan(**plan), deterministic=asked))
        rows.append(sum(len(args[0]) for args in ran.named("aten.mm") if args[0].shape[-1] == x.shape[-1]))
    (whole, less), (more, fewer) = found, rows
    assert more - fewer == len(x)
    assert fewer == less.passes.sum()
    assert whole.deterministic is not None
    assert less.deterministic is None
    np.testing.assert_array_equal(less.passes, whole.passes)
    for name in ("mean", "variance", "standard_error"):
        np.testing.assert_allclose(getattr(less, name), getattr(whole, name), rtol=1e-4, atol=1e-6)


# -- rows that stop ----------------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("chunk_bytes", [None, 3_000])
def test_a_row_that_stops_has_the_answer_that_so_many_passes_always_give(sampler: str, chunk_bytes: int | None) -> None:
    adaptive = run(passes=700, tolerance=0.02, sampler=sampler, chunk_bytes=chunk_bytes)
    assert 1 < len(set(adaptive.passes)) <= 11
    for passes in set(adaptive.passes.tolist()):
        fixed, rows = run(passes=passes, sampler=sampler), adaptive.passes == passes
        for name in ("mean", "variance", "standard_error", "degrees"):
            np.testing.assert_allclose(getattr(adaptive, name)[rows], getattr(fixed, name)[rows], rtol=1e-4, atol=1e-6)
    off = run(passes=2).deterministic
    assert off is not None
    assert adaptive.deterministic is not None
    np.testing.assert_allclose(adaptive.deterministic, off, rtol=1e-4, atol=1e-6)


def test_no_row_stops_before_a_rare_drop_can_have_been_seen() -> None:
    """At a rate of 0.01 half of all runs of 64 passes drop nothing: all passes are alike, and the error is not 0."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), StochasticDepth(0.01), nn.Linear(8, 1))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    model = mcdrop.wrap(net, example=x)
    for seed in range(20):
        found = mcdrop.sample(model, x, PassPlan(600, seed, "iid", tolerance=1e-9))
        assert (found.passes == 600).all() or not found.variance.any()
        assert found.passes.min() >= 500  # 5 / 0.01: nothing was dropped in one of 150 such runs
    exact = mcdrop.sample(model_of_a_last_layer(0.01), x, PassPlan(600, 0, tolerance=1e-9, exact_last=True))
    assert (exact.passes == 64).all()  # known without a drop
    assert (exact.variance > 0).all()


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_numbers_that_hardly_ever_pass_a_threshold_are_waited_for_too(draw: str) -> None:
    """At a rate of 0.005, which no draw of numbers tells: 5 / 0.005 passes."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = mcdrop.sample(mcdrop.wrap(Gate(draw), example=x), x, PassPlan(1000, 0, "iid", tolerance=1e-9))
    assert (found.passes == 1000).all()


class Gate(nn.Module):
    """Drops all by hand, at a rate of 0.005."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.draw, self.last = draw, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x)
        if self.training:
            out = out * (torch.rand(1) >= 0.005 if self.draw == "uniform" else torch.randn(1) <= 2.5758)
        return out


def model_of_a_last_layer(p: float) -> mcdrop.Model:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 1))
    return mcdrop.wrap(net, example=torch.randn(4, 4))


@every_sampler
def test_each_row_stops_when_its_error_is_small_enough_or_passes_run_out(sampler: str) -> None:
    adaptive = run(passes=300, tolerance=0.02, sampler=sampler)
    stopped = adaptive.passes < 300
    assert (adaptive.standard_error[stopped] <= 0.02).all()
    assert (adaptive.standard_error[~stopped] > 0).all()
    assert adaptive.samples is None
    loose, tight = (run(passes=300, tolerance=t, sampler=sampler).passes for t in (1e3, 1e-9))
    assert set(loose) == {64}
    assert set(tight) == {300}


@pytest.mark.statistical
def test_the_error_of_rows_that_stopped_is_at_most_the_tolerance() -> None:
    """Root mean square over 100 seeds and all rows, against 20000 passes, with 10 % for the look at the data."""
    errors = [run(passes=2000, tolerance=0.03, seed=seed).mean[:, 0] - truth()[0] for seed in range(100)]
    assert np.sqrt(np.mean(np.square(errors), axis=0)).max() < 0.033


# -- honest errors -----------------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("passes", [64, 100])
@pytest.mark.statistical
def test_the_95_percent_interval_of_the_mean_covers_the_mean_of_20000_passes(sampler: str, passes: int) -> None:
    """Share over 400 seeds and 40 rows: 93 to 97 % for independent passes, at least 93 % for balanced ones."""
    found = repeats(passes, sampler)
    half = stats.t.ppf(0.975, found["degrees"]) * found["standard_error"]
    share = float((np.abs(found["mean"] - truth()[0]) <= half).mean())
    assert share >= 0.93
    assert share <= (0.97 if sampler == "iid" else 1.0)


@every_sampler
@pytest.mark.parametrize("passes", [64, 100])
@pytest.mark.statistical
def test_the_variance_is_unbiased(sampler: str, passes: int) -> None:
    """The mean of 400 seeds against 20000 passes; 4 standard errors of both, all rows at once."""
    relative = repeats(passes, sampler)["variance"] / truth()[1]
    by_seed = relative.mean(axis=1)
    error = np.hypot(stats.sem(by_seed), 0.02 / np.sqrt(2))  # of 20000 passes: sqrt(2 / 20000) a row, rows dependent
    assert abs(float(by_seed.mean()) - 1) < 4 * float(error)


@pytest.mark.parametrize(("sampler", "passes"), [("iid", 64), ("balanced", 64), ("balanced", 320)])
@pytest.mark.statistical
def test_the_standard_error_is_the_spread_of_the_mean_over_seeds(sampler: str, passes: int) -> None:
    """Root mean squares over 400 seeds, 10 % apart at most (the spread itself is known to 3.5 %)."""
    found = repeats(passes, sampler)
    spread = found["mean"].std(axis=0, ddof=1)
    claimed = np.sqrt(np.square(found["standard_error"]).mean(axis=0))
    assert abs(float((claimed / spread).mean()) - 1) < 0.1


@pytest.mark.statistical
def test_balanced_passes_cut_the_squared_error_of_the_mean_at_least_four_times() -> None:
    error = {s: np.square(repeats(32, s)["mean"] - truth()[0]).mean() for s in ("iid", "balanced")}
    assert error["iid"] / error["balanced"] >= 4


@pytest.mark.statistical
def test_blocks_of_64_have_a_smaller_error_than_blocks_of_16() -> None:
    """Passes 64 to 320 against what as many passes would leave at the error of the first 64, in blocks of 16."""
    few, many = (repeats(passes, "balanced")["mean"] for passes in (64, 320))
    later = (320 * many - 64 * few) / 256
    error = {64: np.square(few - truth()[0]).mean(), 256: np.square(later - truth()[0]).mean()}
    assert error[256] < 0.8 * error[64] / 4


# -- bounds ------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, numpy as np, torch, mcdrop
from torch import nn
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(4, 128), nn.Dropout(0.5), nn.ReLU(), nn.Linear(128, 1))
x = np.zeros((64, 4), np.float32)
model = mcdrop.wrap(net, example=x)
for passes in (500, 10_000):
    mcdrop.predict(model, x, passes=passes)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_passes() -> None:
    """All activations at once would take 320 MiB; the cache of masks may grow to its bound of 64 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], stdout=subprocess.PIPE, text=True, check=True)
    few, many = (int(line) for line in done.stdout.split())
    assert many - few < 100


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"passes": 0}, "passes must be a whole number from 2 to 1000000, got 0"),
        ({"passes": 1}, "from 2 to"),
        ({"passes": -5}, "got -5"),
        ({"passes": 10**9}, "got 1000000000"),
        ({"passes": MOST_PASSES + 1}, "got 1000001"),
        ({"passes": 10.5}, "got 10.5"),
        ({"passes": 10.0}, "got 10.0"),
        ({"passes": "10"}, "got '10'"),
        ({"passes": True}, "got True"),
        ({"passes": None}, "got None"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2**64 - 1, got -1"),
        ({"seed": 2**64}, "got 18446744073709551616"),
        ({"seed": 0.5}, "got 0.5"),
        ({"seed": False}, "got False"),
        ({"tolerance": 0}, "tolerance must be above 0, got 0"),
        ({"tolerance": -0.1}, "got -0.1"),
        ({"tolerance": float("nan")}, "got nan"),
        ({"tolerance": float("inf")}, "got inf"),
        ({"tolerance": "small"}, "tolerance must be a number, got 'small'"),
        ({"keep_samples": "no"}, "keep_samples must be true or false, got 'no'"),
        ({"exact_last": 1}, "exact_last must be true or false, got 1"),
        ({"tolerance": True}, "got True"),
        ({"tolerance": 0.1, "keep_samples": True}, "samples cannot be kept"),
    ],
)
def test_a_plan_out_of_range_is_refused_with_what_was_given(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        PassPlan(**plan)
    assert said in str(caught.value)


def test_plans_at_the_edges_are_taken() -> None:
    assert PassPlan(2, 2**64 - 1).passes == 2
    assert PassPlan(np.int64(MOST_PASSES), np.uint64(2**64 - 1)).passes == MOST_PASSES  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown sampler 'sobol'; choose one of: balanced, iid"):
        PassPlan(sampler="sobol")


def test_joined_results_keep_the_order_of_rows() -> None:
    _, x = small()
    parts = [run(x[:3], passes=5, keep_samples=True), run(x[3:10], passes=5, keep_samples=True)]
    order = np.random.default_rng(0).permutation(10)
    joined, whole = PassResult.join(parts, order), run(x[:10], passes=5, keep_samples=True)
    np.testing.assert_allclose(joined.mean, whole.mean[order], rtol=1e-5, atol=1e-6)
    assert joined.samples is not None
    assert whole.samples is not None
    np.testing.assert_allclose(joined.samples, whole.samples[:, order], rtol=1e-5, atol=1e-6)
    assert Rows.of(x).count == 40


@pytest.mark.parametrize("flag", ["exact_last", "keep_samples"])
def test_a_flag_of_numpy_is_one_of_python(flag: str) -> None:
    plan = PassPlan(**{flag: np.True_})  # type: ignore[arg-type]
    assert getattr(plan, flag) is True
    assert plan == PassPlan(**{flag: True})  # type: ignore[arg-type]
