"""Masks: pure functions of (seed, site, pass), with the law that their kind and sampler promise."""

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from mcdrop.errors import InputError, UnknownName
from mcdrop.masks import BLOCKS, KINDS, SAMPLERS, SEED_LIMIT, Site, sample_masks
from mcdrop.samplers import _above, _ranks, _told_apart

Array = NDArray[np.float32]

every_sampler = pytest.mark.parametrize("sampler", sorted(SAMPLERS))
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))

seeds = st.integers(0, SEED_LIMIT - 1)
shapes = st.lists(st.integers(0, 20), max_size=3).map(tuple)
samplers = st.sampled_from(sorted(SAMPLERS))
kinds = st.sampled_from(sorted(KINDS))


def masks(
    shape: tuple[int, ...], passes: int, *, seed: int = 0, start: int = 0, sampler: str = "iid", p: float = 0.5,
    kind: str = "bernoulli", name: str = "site0",
) -> Array:  # fmt: skip
    return sample_masks([Site(name, shape, p, kind)], passes, seed=seed, start=start, sampler=sampler)[name]


# -- a pure function of (seed, site, pass) -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=seeds, shape=shapes, sampler=samplers, kind=kinds, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_cut_into_chunks_gives_the_same_masks(
    seed: int, shape: tuple[int, ...], sampler: str, kind: str, cuts: list[int]
) -> None:
    whole = masks(shape, 40, seed=seed, sampler=sampler, kind=kind)
    edges = sorted({0, 40, *cuts})
    for low, high in itertools.pairwise(edges):
        part = masks(shape, high - low, seed=seed, start=low, sampler=sampler, kind=kind)
        np.testing.assert_array_equal(part, whole[low:high])


@settings(max_examples=60)
@given(data=st.data(), seed=seeds, sampler=samplers, kind=kinds)
def test_a_longer_shape_extends_a_shorter_one_along_every_axis(
    data: st.DataObject, seed: int, sampler: str, kind: str
) -> None:
    long = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple))
    short = tuple(data.draw(st.integers(0, size)) for size in long)
    inside = (slice(None), *(slice(0, size) for size in short))
    few = masks(short, 3, seed=seed, sampler=sampler, kind=kind)
    np.testing.assert_array_equal(few, masks(long, 3, seed=seed, sampler=sampler, kind=kind)[inside])


@every_sampler
def test_what_is_clipped_of_a_large_block_moves_nothing(sampler: str) -> None:
    """Where so much is left out that the generator skips it, in passes that depend on few and on many others."""
    for start, passes in ((0, 5), (60, 20)):
        whole = masks((16, 64, 40), passes, seed=2, start=start, sampler=sampler)
        np.testing.assert_array_equal(masks((8, 64, 40), passes, seed=2, start=start, sampler=sampler), whole[:, :8])


@every_sampler
@every_kind
def test_sites_do_not_depend_on_the_sites_beside_them(sampler: str, kind: str) -> None:
    first, second = Site("site0", (9,), 0.5, kind), Site("site1", (9,), 0.5, kind)
    both = sample_masks([first, second], 5, seed=3, sampler=sampler)
    alone = sample_masks([second], 5, seed=3, sampler=sampler)
    np.testing.assert_array_equal(both["site1"], alone["site1"])


@every_sampler
@every_kind
def test_neither_the_path_nor_the_rate_moves_the_stream(sampler: str, kind: str) -> None:
    """Units that drop at a small rate also drop at a larger one: the same numbers are compared with p."""
    few = masks((200,), 4, p=0.2, kind=kind, sampler=sampler)
    many = sample_masks([Site("site0", (200,), 0.6, kind, path="a.b")], 4, seed=0, sampler=sampler)["site0"]
    if kind == "bernoulli":
        assert (many <= few).all()
        assert (many < few).any()
    else:
        np.testing.assert_array_equal(few, many)


@every_sampler
def test_other_seeds_sites_and_passes_give_independent_masks(sampler: str) -> None:
    """Each pair of streams agrees in half of 20000 fair units, within 4 standard errors."""
    streams = {
        "base": masks((20_000,), 1, seed=1, sampler=sampler),
        "next seed": masks((20_000,), 1, seed=2, sampler=sampler),
        "largest seed": masks((20_000,), 1, seed=SEED_LIMIT - 1, sampler=sampler),
        "other site": masks((20_000,), 1, seed=1, name="site1", sampler=sampler),
        "other block of passes": masks((20_000,), 1, seed=1, start=16, sampler=sampler),
        "digits in another order": masks((20_000,), 1, seed=11, name="site0", sampler=sampler),
    }
    names = sorted(streams)
    for i, a in enumerate(names):
        for b in names[:i]:
            share = float((streams[a] == streams[b]).mean())
            assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(20_000), (a, b)


@pytest.mark.parametrize("p", [0.0, 1 / 16, 0.25, 3 / 64, 0.5, 5 / 1024, 5033165 / 2**24, 1 - 2**-24, 1.0])
@every_sampler
def test_units_are_kept_whose_numbers_reach_the_rate(sampler: str, p: float) -> None:
    """Rates at the edges of strata and inside of them, in passes before the 64th and after."""
    for start, passes in ((0, 5), (40, 60), (130, 16)):
        numbers = masks((3, 70), passes, start=start, sampler=sampler, kind="uniform")
        kept = masks((3, 70), passes, start=start, sampler=sampler, p=p)
        np.testing.assert_array_equal(kept, numbers >= np.float32(p))


@pytest.mark.parametrize("shape", [(3000,), (300, 20), (50, 3, 20)], ids=str)
@every_sampler
@every_kind
def test_pieces_of_a_large_block_are_those_of_the_whole(
    sampler: str, kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for start, passes in ((3, 2), (60, 20)):
        with monkeypatch.context() as patched:
            patched.setattr("mcdrop.masks._UNITS", 1)  # a block at a time
            whole = masks(shape, passes, start=start, sampler=sampler, kind=kind, p=0.3)
            patched.setattr("mcdrop.masks._SPLIT", 104)
            pieces = masks(shape, passes, start=start, sampler=sampler, kind=kind, p=0.3)
        np.testing.assert_array_equal(pieces, whole)


def test_the_stream_is_numpys_philox() -> None:
    """The law of the stream, written out: key from BLAKE2b, one counter for eight units, 32 bits a unit."""
    key = int.from_bytes(hashlib.blake2b(b"7/site0/1", digest_size=16).digest(), "little")
    units, counters = 15, 2  # the block that holds units 1 to 15; unit 0 is a block of its own
    generator = np.random.Philox(key=key, counter=3 * counters)
    words = generator.random_raw(counters * 4).view(np.uint32)[:units]
    expected = np.where(words < round(0.3 * 2**32), 0.0, 1.0)
    np.testing.assert_array_equal(masks((16,), 1, seed=7, start=3, p=0.3)[0, 1:], expected)


def test_balanced_passes_follow_their_law() -> None:
    """Written out in whole numbers for one unit: its 16th by rank, the quarter of it, and what is inside of that."""

    def word(what: str, row: int, bits: int) -> int:
        key = int.from_bytes(hashlib.blake2b(f"7/site0/1/{what}".encode(), digest_size=16).digest(), "little")
        words = np.random.Philox(key=key, counter=row * -(-15 * bits // 256)).random_raw(4)
        return int(int.from_bytes(words.astype("<u8").tobytes(), "little") >> 3 * bits & 2**bits - 1)

    orders = [order for order in itertools.permutations(range(4)) if not order[0]]
    for block in (2, 6):
        order = [word("order", 16 * block + place, 16) for place in range(16)]
        keys = [(bits >> 4, place ^ order[0] & 15) for place, bits in enumerate(order)]
        found = masks((16,), 16, seed=7, start=16 * block, sampler="balanced", kind="uniform")[:, 4]
        for key, number in zip(keys, found, strict=True):
            sixteenth = sorted(keys).index(key)
            inside = word("inside", 16 * block + sixteenth, 32)
            if block < 4:
                expected = sixteenth + inside / 2**32
            else:
                chance = word("quarter", 16 * (block // 4) + sixteenth, 32)
                quarter = orders[(chance >> 2) % 6][block % 4] ^ chance & 3
                expected = sixteenth + (quarter + inside / 2**32) / 4
            assert number == np.floor(expected * 2**20) / 2**24


def test_philox_equals_the_published_known_answer() -> None:
    """Random123's known-answer test for philox4x64-10 with counter and key of all ones (kat_vectors)."""
    ones = 2**64 - 1
    generator = np.random.Philox(key=[ones, ones], counter=2**256 - 2)  # numpy counts up before it draws
    assert [hex(word) for word in generator.random_raw(4)] == [
        "0x87b092c3013fe90b", "0x438c3c67be8d0224", "0x9cc7d7c69cd777b6", "0xa09caebf594f0ba0",
    ]  # fmt: skip


@every_sampler
@every_kind
def test_no_global_generator_is_read_or_moved(sampler: str, kind: str) -> None:
    def states() -> Iterator[object]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        assert isinstance(numpy, dict)
        yield from (random.getstate(), torch.get_rng_state().tolist())
        yield from (numpy["state"]["pos"], numpy["state"]["key"].tolist())

    before = [*states()]
    first = masks((50,), 20, sampler=sampler, kind=kind)
    assert [*states()] == before
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    np.testing.assert_array_equal(masks((50,), 20, sampler=sampler, kind=kind), first)


# -- the law of one pass -----------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.statistical
def test_units_drop_at_exactly_p(sampler: str, p: float) -> None:
    """200000 units of one pass, within 4 binomial standard errors; at 0 and 1 without exception."""
    drops = int((masks((200_000,), 1, p=p, sampler=sampler) == 0).sum())
    assert abs(drops - 200_000 * p) <= 4 * np.sqrt(200_000 * p * (1 - p))


@every_sampler
@pytest.mark.statistical
def test_units_of_one_pass_are_independent(sampler: str) -> None:
    """The correlation of any two of 60 units over 4000 blocks' first passes, largest of 1770 pairs."""
    apart = max((size for size, _ in BLOCKS[sampler]), default=1)
    kept = masks((60,), 4000 * apart, p=0.3, sampler=sampler)[::apart]
    correlation = np.asarray(np.corrcoef(kept.T))[np.triu_indices(60, 1)] * np.sqrt(len(kept))
    assert np.abs(correlation).max() < stats.norm.isf(1e-3 / len(correlation))
    assert stats.kstest(correlation, "norm").pvalue > 1e-3


@pytest.mark.statistical
def test_passes_of_iid_masks_are_independent() -> None:
    """The correlation of any two of 60 passes over 4000 units, largest of 1770 pairs."""
    kept = masks((4000,), 60, p=0.3)
    correlation = np.asarray(np.corrcoef(kept))[np.triu_indices(60, 1)] * np.sqrt(4000)
    assert np.abs(correlation).max() < stats.norm.isf(1e-3 / len(correlation))
    assert stats.kstest(correlation, "norm").pvalue > 1e-3


@pytest.mark.statistical
def test_kept_counts_of_a_pass_are_binomial() -> None:
    counts = (masks((40,), 5000, p=0.2) == 0).sum(axis=1)
    expected = stats.binom.pmf(np.arange(41), 40, 0.2) * 5000
    common = np.flatnonzero(expected >= 5)
    observed = np.bincount(counts, minlength=41)
    tail = slice(common[0], common[-1] + 1)
    rest = 5000 - observed[tail].sum(), 5000 - expected[tail].sum()
    found = stats.chisquare([*observed[tail], rest[0]], [*expected[tail], rest[1]])
    assert found.pvalue > 1e-3


@every_sampler
@pytest.mark.statistical
def test_numbers_are_uniform_or_normal(sampler: str) -> None:
    uniform = masks((50_000,), 1, kind="uniform", sampler=sampler).ravel()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    normal = masks((50_000,), 1, kind="normal", sampler=sampler).ravel()
    assert np.isfinite(normal).all()
    assert stats.kstest(normal, "norm").pvalue > 1e-3


# -- balanced masks ----------------------------------------------------------------------------------------------------


every_block = pytest.mark.parametrize(("size", "begin"), BLOCKS["balanced"])


@every_block
@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.25, 0.5, 0.9375])
def test_balanced_masks_drop_each_unit_equally_often_in_every_block(p: float, size: int, begin: int) -> None:
    """Floor or ceil of 16 p times in 16 passes, of 64 p times in 64, for each unit, in every whole block."""
    dropped = size - masks((300,), 192, p=p, sampler="balanced")[begin:].reshape(-1, size, 300).sum(axis=1)
    assert set(np.unique(dropped)) <= {np.floor(size * p), np.ceil(size * p)}


@every_block
def test_balanced_numbers_fall_once_in_each_stratum(size: int, begin: int) -> None:
    numbers = masks((100,), 192, kind="uniform", sampler="balanced")[begin:].reshape(-1, size, 100)
    strata = np.sort(np.floor(numbers * size), axis=1)
    np.testing.assert_array_equal(strata, np.broadcast_to(np.arange(size)[:, None], strata.shape))


@pytest.mark.statistical
def test_every_place_in_a_balanced_block_is_bernoulli() -> None:
    """Each of 128 passes drops at p over 40000 units (4 binomial standard errors), so no pass is special."""
    share = 1 - masks((40_000,), 128, p=0.1, sampler="balanced").mean(axis=1)
    np.testing.assert_allclose(share, 0.1, atol=4 * np.sqrt(0.1 * 0.9 / 40_000))


@every_block
@pytest.mark.statistical
def test_numbers_of_a_balanced_block_are_independent_within_their_strata(size: int, begin: int) -> None:
    """The sum of n numbers, one in each of n strata of width 1 / n, then has the variance 1 / (12 n).

    Over 40000 units, within 4 standard errors.
    """
    numbers = masks((40_000,), begin + size, kind="uniform", sampler="balanced")[begin:].astype(np.float64) - 0.5
    squares = np.square(numbers.sum(axis=0))
    assert abs(squares.mean() - 1 / (12 * size)) < 4 * squares.std() / squares.size**0.5


@pytest.mark.statistical
def test_balanced_blocks_are_independent_of_one_another() -> None:
    kept = masks((4000,), 192, p=0.3, sampler="balanced")
    for one, other in ((kept[:16], kept[16:32]), (kept[:64], kept[64:128]), (kept[64:128], kept[128:])):
        across = np.asarray(np.corrcoef(one, other))[: len(one), len(one) :].ravel() * np.sqrt(4000)
        assert np.abs(across).max() < stats.norm.isf(1e-3 / len(across))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT, 1.5, True, "1"])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    with pytest.raises(InputError, match=r"whole number from 0 to 2\*\*64 - 1, got"):
        masks((1,), 1, seed=seed)


@pytest.mark.parametrize("passes", [0, -1, 2.5, True])
def test_passes_that_are_no_count_are_refused(passes: Any) -> None:
    with pytest.raises(InputError, match=f"passes must be a whole number above 0, got {passes}"):
        masks((1,), passes)


@pytest.mark.parametrize("start", [-1, 0.5, SEED_LIMIT])
def test_a_first_pass_out_of_range_is_refused(start: Any) -> None:
    with pytest.raises(InputError, match=rf"start must be a whole number from 0 to 2\*\*64 - 1, got {start}"):
        masks((1,), 1, start=start)


@every_sampler
@pytest.mark.parametrize(("p", "kept"), [(1 - 1e-11, 0), (1e-11, 1), (1 - 2**-32, None), (2**-32, None)])
def test_a_rate_is_of_2_to_the_32_steps(sampler: str, p: float, kept: int | None) -> None:
    """What rounds to none or all of them drops none or all; a step from there is drawn, with hardly a chance."""
    drawn = masks((50,), 80, sampler=sampler, p=p)
    np.testing.assert_array_equal(drawn, round(1 - p) if kept is None else kept)


@pytest.mark.parametrize("p", [1.5, -0.1, np.nan, "0.5"])
def test_a_rate_that_is_no_share_is_refused(p: Any) -> None:
    with pytest.raises(InputError, match="drop rate p of site 'site0' must be a number from 0 to 1, got"):
        masks((1,), 1, p=p)


def test_numbers_of_numpy_are_taken_as_pythons_own() -> None:
    ours = masks((9,), np.int64(3), seed=np.uint64(7), start=np.int32(2), p=np.float32(0.5))  # type: ignore[arg-type]
    np.testing.assert_array_equal(ours, masks((9,), 3, seed=7, start=2))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown sampler 'sobol'; choose one of: balanced, iid"):
        masks((1,), 1, sampler="sobol")
    with pytest.raises(UnknownName, match=r"unknown sampler \['iid'\]; choose one of"):
        masks((1,), 1, sampler=["iid"])  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown kind of draw 'poisson'; choose one of: bernoulli, normal, uniform"):
        masks((1,), 1, kind="poisson")


def test_passes_rank_as_a_sort_ranks_them() -> None:
    """Few units in many blocks as many units in few."""
    words = np.random.default_rng(0)
    for blocks, units in ((3, 500), (2000, 2), (1, 40_000)):
        high = np.tile(np.arange(16, dtype=np.uint16)[:, None] << 12, (blocks, 1, units))
        order = words.permuted(high, axis=1)
        order += words.integers(0, 2**12, order.shape, np.uint16)
        ranks = np.argsort(np.argsort(order, axis=1), axis=1)
        np.testing.assert_array_equal(_ranks(order), ranks)
        for rank in range(16):
            above, there = _above(order, rank)
            np.testing.assert_array_equal(above, ranks > rank)
            np.testing.assert_array_equal(there, ranks == rank)


def test_passes_whose_random_bits_are_equal_come_first_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bits are: of all shifts each puts each pass at each rank once."""
    shifts = np.arange(16, dtype=np.uint16)
    ranks = _ranks(_told_apart(np.tile((0xABC0 | shifts), (1, 16, 1))))[0]
    np.testing.assert_array_equal(np.sort(ranks, axis=0), np.tile(shifts[:, None], (1, 16)))
    np.testing.assert_array_equal(np.sort(ranks, axis=1), np.tile(shifts, (16, 1)))
