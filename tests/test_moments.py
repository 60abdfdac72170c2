"""Moments: equal to numpy's however the passes come, and an honest error of the mean."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mcdrop.at_once import are_few
from mcdrop.blocks import FEWEST_BLOCKS
from mcdrop.masks import BLOCKS, Site, sample_masks
from mcdrop.moments import Gathered, mean_gap, moments_of, total_variance
from mcdrop.sums import summed_up

Array = NDArray[np.float64]

every_kind = pytest.mark.parametrize("blocks", [(), ((4, 0),), ((4, 0), (8, 8))])
draws = hnp.arrays(np.float64, st.tuples(st.integers(2, 50), st.just(3)), elements=st.floats(-1e6, 1e6))


Blocks = tuple[tuple[int, int], ...]


def gathered(values: Array, blocks: Blocks = (), cuts: tuple[int, ...] = ()) -> Gathered:
    state = Gathered(blocks)
    for part in np.split(values, sorted(cuts)):
        if len(part):
            state.add(part.astype(np.float64))  # a copy, since it is written over
    return state


@pytest.mark.parametrize("blocks", [(), ((16, 0),), ((4, 0), (16, 0))])
@pytest.mark.parametrize("first", [1e9, 1e9 + 0.03])
def test_a_small_spread_on_a_large_mean_keeps_its_digits(blocks: Blocks, first: float) -> None:
    """Where E[x^2] - E[x]^2 in float64 would leave nothing: mean 1e9, spread 1e-3, the first 30 of them away or not."""
    values = 1e9 + np.random.default_rng(0).normal(0, 1e-3, (1600, 1))
    values[0] = first
    state = gathered(values, blocks, cuts=tuple(range(1, 1600)))
    means = values.reshape(-1, blocks[-1][0] if blocks else 1).mean(axis=1)
    np.testing.assert_allclose(state.read().variance, values.var(axis=0, ddof=1), rtol=1e-3)
    np.testing.assert_allclose(state.read().error_squared, means.var(ddof=1) / len(means), rtol=1e-2)


def test_a_first_pass_far_from_all_others_costs_no_digits() -> None:
    """The worst case for sums around the first pass: the others are alike."""
    values = np.random.default_rng(0).normal(0, 1e-3, (100_000, 1))
    values[0] = 1e6
    np.testing.assert_allclose(gathered(values, cuts=(1, 77)).read().variance, values.var(axis=0, ddof=1), rtol=1e-9)


@every_kind
def test_equal_passes_have_no_spread_at_all(blocks: Blocks) -> None:
    state = gathered(np.full((50, 2), 0.1), blocks, cuts=(3, 9))
    np.testing.assert_array_equal(
        [state.read().variance, state.read().error_squared, state.read().mean - 0.1], np.zeros((3, 2))
    )


@every_kind
def test_one_value_has_no_variance(blocks: Blocks) -> None:
    state = gathered(np.array([[1.0, 2.0]]), blocks)
    np.testing.assert_array_equal(state.read().mean, [1.0, 2.0])
    assert np.isnan(state.read().variance).all()
    assert np.isnan(state.read().error_squared).all()


@every_kind
def test_passes_in_float32_are_gathered_in_float64(blocks: Blocks) -> None:
    values = np.random.default_rng(0).normal(1, 1e-3, (64, 3)).astype(np.float32)
    single, double = gathered(values, blocks), gathered(values.astype(np.float64), blocks)  # type: ignore[arg-type]
    assert single.read().mean.dtype == np.float64
    np.testing.assert_array_equal(single.read().mean, double.read().mean)
    np.testing.assert_array_equal(single.read().error_squared, double.read().error_squared)


@every_kind
def test_some_rows_can_be_taken(blocks: Blocks) -> None:
    values = np.random.default_rng(0).normal(size=(20, 5, 2))
    which = np.array([True, False, True, False, True])
    taken, alone = gathered(values, blocks).take(which), gathered(values[:, which], blocks)
    np.testing.assert_allclose(taken.read().error_squared, alone.read().error_squared, rtol=1e-12)
    np.testing.assert_allclose(taken.read().variance, alone.read().variance, rtol=1e-12)
    more = np.random.default_rng(1).normal(size=(7, 3, 2))
    for state in (taken, alone):
        state.add(more.copy())
    np.testing.assert_allclose(taken.read().error_squared, alone.read().error_squared, rtol=1e-12)


@given(
    values=draws, blocks=st.sampled_from([(), ((4, 0),), ((16, 0),), ((3, 0), (12, 6)), ((2, 0), (4, 4), (8, 16))]),
    cuts=st.lists(st.integers(1, 49), max_size=5).map(tuple),
)  # fmt: skip
def test_chunks_do_not_change_what_is_gathered(values: Array, blocks: Blocks, cuts: tuple[int, ...]) -> None:
    scale = float(np.abs(values).max()) + 1e-300
    once, cut = gathered(values, blocks), gathered(values, blocks, cuts=tuple(c for c in cuts if c < len(values)))
    assert once.count == cut.count == len(values)
    assert once.read().degrees == cut.read().degrees
    np.testing.assert_allclose(cut.read().mean, values.mean(axis=0), rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(cut.read().error_squared, once.read().error_squared, rtol=1e-9, atol=1e-12 * scale**2)
    np.testing.assert_allclose(cut.read().variance, once.read().variance, rtol=1e-9, atol=1e-12 * scale**2)


@given(
    values=draws, blocks=st.sampled_from([(), ((4, 0),), ((16, 0),), ((3, 0), (12, 6)), ((2, 0), (4, 4), (8, 16))]),
    cuts=st.lists(st.sampled_from([1, 4, 6, 8, 12, 16, 18, 24, 32, 42, 48]), max_size=5).map(tuple),
    there=st.lists(st.booleans(), min_size=6, max_size=6),
)  # fmt: skip
def test_sums_made_elsewhere_are_gathered_as_passes_are(
    values: Array, blocks: Blocks, cuts: tuple[int, ...], there: list[bool]
) -> None:
    """Also where some chunks come as the ones and some as the others."""
    cuts = tuple(c for c in cuts if c < len(values))
    arrays, mixed = gathered(values, blocks, cuts), Gathered(blocks)
    parts = [part for part in np.split(values, sorted(cuts)) if len(part)]
    for part, elsewhere in zip(parts, there, strict=False):
        summing = mixed.summing(torch.as_tensor) if elsewhere else None
        if summing is not None:
            mixed.add_sums(len(part), summed_up(torch.tensor(part), summing).numpy())
        else:
            mixed.add(part.copy())
    scale = float(np.abs(values).max()) + 1e-300
    got, expected = mixed.read(), arrays.read()
    assert got.degrees == expected.degrees
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-12, atol=1e-13 * scale)
    np.testing.assert_allclose(got.variance, expected.variance, rtol=1e-9, atol=1e-12 * scale**2)
    np.testing.assert_allclose(got.error_squared, expected.error_squared, rtol=1e-9, atol=1e-12 * scale**2)


@pytest.mark.parametrize("sampler", BLOCKS)
@pytest.mark.parametrize("passes", [2, 17, 100, 256, 257, 304, 500, 1000, 1023])
def test_few_passes_are_read_at_once_as_many_are_bit_by_bit(sampler: str, passes: int) -> None:
    values = np.random.default_rng(0).normal(1e3, 1, (passes, 2, 2))
    assert are_few(passes, 4, BLOCKS[sampler])
    at_once, streamed = gathered(values, BLOCKS[sampler]), gathered(values, BLOCKS[sampler], cuts=(1,))
    assert at_once.read().degrees == streamed.read().degrees
    for got, expected in zip(at_once.read()[:3], streamed.read()[:3], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10)
    np.testing.assert_allclose(at_once.read().mean, values.mean(axis=0), rtol=1e-14)


@pytest.mark.parametrize("numbers", [3, 70_000])
@pytest.mark.parametrize("passes", [100, 1000])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_pass_that_is_no_number_leaves_its_neighbours_to_the_bit(passes: int, numbers: int, value: float) -> None:
    """Products with a matrix would spread it, were they between outputs."""
    values = np.random.default_rng(0).normal(1e3, 1, (passes, min(numbers, 70_000 // passes)))
    harmed = values.copy()
    harmed[40, 1] = value
    with np.errstate(invalid="ignore"):
        got, expected = (gathered(one, BLOCKS["balanced"]).read() for one in (harmed, values))
    for name in ("mean", "variance", "error_squared"):
        one, other = getattr(got, name), getattr(expected, name)
        assert not np.isfinite(one[1])
        np.testing.assert_array_equal(np.delete(one, 1), np.delete(other, 1))


@given(draws)
def test_independent_passes_give_the_textbook_values(values: Array) -> None:
    state = gathered(values)
    scale = float(np.abs(values).max()) + 1e-300
    assert state.read().degrees == len(values) - 1
    textbook = values.var(axis=0, ddof=1)
    np.testing.assert_allclose(state.read().variance, textbook, rtol=1e-9, atol=1e-12 * scale**2)
    np.testing.assert_allclose(state.read().error_squared, textbook / len(values), rtol=1e-9, atol=1e-12 * scale**2)


def test_whole_blocks_give_the_error_of_the_mean_of_block_means() -> None:
    values = np.random.default_rng(0).normal(size=(96, 3))
    means = values.reshape(6, 16, 3).mean(axis=1)
    state = gathered(values, ((16, 0),), cuts=(5, 40, 41))
    assert state.read().degrees == 5
    np.testing.assert_allclose(state.read().error_squared, means.var(axis=0, ddof=1) / 6, rtol=1e-12)


def test_too_few_blocks_fall_back_on_independent_passes() -> None:
    values = np.random.default_rng(0).normal(size=(16 * FEWEST_BLOCKS - 1, 3))
    state = gathered(values, ((16, 0),))
    assert state.read().degrees == len(values) - 1
    np.testing.assert_allclose(state.read().error_squared, values.var(axis=0, ddof=1) / len(values), rtol=1e-12)


def test_each_size_of_blocks_has_an_error_of_its_own() -> None:
    """The error of a sum of independent parts: 8 passes in blocks of 4, 5 blocks of 8, one more of 4, 3 passes."""
    values = np.random.default_rng(0).normal(size=(55, 3))
    state = gathered(values, ((4, 0), (8, 8)), cuts=(1, 9, 22, 46))
    fours, eights = values[:52].reshape(13, 4, 3).sum(axis=1), values[8:48].reshape(5, 8, 3).sum(axis=1)
    variance = 5 * eights.var(axis=0, ddof=1) + 3 * fours.var(axis=0, ddof=1) + 3 * values.var(axis=0, ddof=1)
    assert state.read().degrees == 4
    np.testing.assert_allclose(state.read().error_squared, variance / 55**2, rtol=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("passes", [64, 70, 128, 320, 350])
def test_variance_and_error_of_stratified_passes_are_unbiased(passes: int) -> None:
    """Stratified passes of one uniform number, f(u) = u + (u > 0.3): 20000 repeats, within 4 standard errors.

    The variance of f(U) is 1/12 + 0.21 + 2 * 0.105 in closed form; an open block, or too few of the large ones, may
    only make the error larger.
    """
    site = Site("drop", (20_000,), kind="uniform")
    u = sample_masks([site], passes, seed=5, sampler="balanced")["drop"].astype(np.float64)
    state = gathered(u + (u > 0.3), BLOCKS["balanced"])
    truth, spread = 1 / 12 + 0.3 * 0.7 + 2 * 0.5 * 0.3 * 0.7, (state.read().mean - (0.5 + 0.7)) ** 2

    def error(values: Array) -> float:
        return float(values.std() / np.sqrt(values.size))

    bias = float(state.read().error_squared.mean() - spread.mean())
    assert bias > -4 * error(state.read().error_squared - spread)
    if passes in (64, 320):  # enough blocks of 16 and of 64, and nothing left
        assert abs(bias) < 4 * error(state.read().error_squared - spread)
        assert abs(float(state.read().variance.mean()) - truth) < 4 * error(state.read().variance)
    else:  # from above, by less than 1 / passes of the truth
        assert -4 * error(state.read().variance) < float(state.read().variance.mean()) - truth < truth / passes


# -- of passes one at a time -------------------------------------------------------------------------------------------


def test_moments_of_passes_one_at_a_time_are_numpy_s() -> None:
    values = np.random.default_rng(0).normal(1e3, 1, (32, 4, 3)).astype(np.float32)
    found, wide = moments_of(values), values.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.variance, wide.var(axis=0, ddof=1), rtol=1e-10)
    assert total_variance(found) == pytest.approx(wide.var(axis=0, ddof=1).sum())
    off = wide.mean(axis=0) + 0.5 * wide.std(axis=0, ddof=1)
    off[0, 0] -= 2.5 * wide[:, 0, 0].std(ddof=1)
    assert mean_gap(found, off) == pytest.approx(2.0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_outputs_that_are_no_numbers_count_neither_for_the_gap_nor_for_the_variance(value: float) -> None:
    values = np.random.default_rng(0).normal(size=(32, 4))
    harmed, off = values.copy(), values[0].copy()
    harmed[5, 1] = value
    for out in (off, np.where(np.arange(4) == 1, value, off)):
        assert mean_gap(moments_of(harmed), out) == mean_gap(moments_of(np.delete(values, 1, 1)), np.delete(off, 1))
    assert total_variance(moments_of(harmed)) == pytest.approx(np.delete(values, 1, 1).var(axis=0, ddof=1).sum())
    assert mean_gap(moments_of(np.full((3, 2), value)), np.zeros(2)) == 0
    assert 0 < total_variance(moments_of(np.full((3, 2), value))) < 1e-200
