"""The torch backend: every tier gives the same passes, several threads at once too, for every shape of the rows."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import mcdrop
from mcdrop.masks import Site, sample_masks
from mcdrop.predict import Prediction
from mcdrop.tiers import TIERS

Array = NDArray[Any]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 30), nn.Dropout(0.4), nn.ReLU(), nn.Linear(30, 30), nn.AlphaDropout(0.2), nn.Linear(30, 2)
    )


class Sequence(nn.Module):
    """A mean over a sequence of any length, with dropout on each step and feature."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(x)
        return out


X = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)


def passes_of(
    model: mcdrop.Model, x: Any, passes: int, *, seed: int = 0, start: int = 0, sampler: str = "iid"
) -> Array:
    return model.backend.forward(model.rows(x), passes, seed=seed, start=start, sampler=sampler)


# -- tiers -------------------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 8, dropout=0.3, batch_first=True), nn.Flatten()
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Dropout2d(0.5), nn.Flatten()
    ),
    "one row of weights for all": lambda: Weights(),
}  # fmt: skip


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training))


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("tier", sorted(TIERS))
def test_every_tier_gives_the_passes_of_the_loop(make: Callable[[], nn.Module], tier: str) -> None:
    torch.manual_seed(0)
    model = mcdrop.wrap(make(), example=X[:8])
    backend: Any = model.backend
    rows = model.rows(X[:8])
    expected = backend.run(rows, 6, only=None, tier="loop")
    if tier == "fold" and model.audit.sites[0].shared:
        with pytest.raises(RuntimeError, match="cannot differ between the rows"):
            backend.run(rows, 6, only=None, tier=tier)
        return
    torch.testing.assert_close(backend.run(rows, 6, only=None, tier=tier), expected, rtol=1e-4, atol=1e-5)


def test_the_audit_says_which_tier_and_why() -> None:
    audit = mcdrop.wrap(mlp(), example=X).audit
    assert audit.tier in {"captured", *TIERS}
    assert audit.tier_reason
    assert f"tier: {audit.tier}" in str(audit)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["iid", "balanced"])
def test_masks_are_equal_to_the_bit_for_any_batch_chunk_and_number_of_rows(sampler: str) -> None:
    """Dropout alone on ones shows its mask: kept units are 1 / (1 - p), exactly."""
    model = mcdrop.wrap(nn.Dropout(0.5), example=np.ones((3, 6)))
    (site,) = model.audit.sites
    mask = sample_masks([Site(site.name, site.shape, 0.5)], 40, seed=5, sampler=sampler)[site.name] * 2
    for rows in (1, 2, 7, 256):
        seen = passes_of(model, np.ones((rows, 6)), 40, seed=5, sampler=sampler)
        np.testing.assert_array_equal(seen, np.broadcast_to(mask[:, None], seen.shape))
    parts = [
        passes_of(model, np.ones((2, 6)), n, seed=5, start=s, sampler=sampler) for s, n in ((0, 1), (1, 22), (23, 17))
    ]
    np.testing.assert_array_equal(np.concatenate(parts)[:, 0], mask)


def test_the_masks_of_a_longer_sequence_extend_those_of_a_shorter_one() -> None:
    model = mcdrop.wrap(Sequence(), example=np.ones((2, 5, 3)))
    short, long = (passes_of(model, np.ones((2, n, 3)), 10, seed=1) for n in (5, 40))
    np.testing.assert_array_equal(long[:, :, :5], short)
    assert 0.4 < (long == 0).mean() < 0.6


def test_sites_that_share_a_shape_have_masks_of_their_own() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    seen = passes_of(mcdrop.wrap(net, example=np.ones((2, 1000))), np.ones((1, 1000)), 1)
    assert abs(float((seen != 0).mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1000)


def test_a_mask_too_large_for_the_cache_is_right_all_the_same() -> None:
    wide = np.ones((1, 300_000), np.float32)
    model = mcdrop.wrap(nn.Dropout(0.5), example=wide)
    first, again = (passes_of(model, wide, 60, seed=2) for _ in range(2))
    np.testing.assert_array_equal(first, again)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_at_once_get_the_answers_of_one_after_another() -> None:
    """Four threads predict, with other seeds and shapes, while a fifth runs the plain module in eval mode."""
    net = mlp().eval()
    model = mcdrop.wrap(net, example=X[:8])
    asked = [(seed, size) for seed in range(6) for size in (1, 17, 256)]

    def ask(seed: int, size: int) -> Prediction:
        return mcdrop.predict(model, X[:size], passes=40, seed=seed)

    expected = {key: ask(*key) for key in asked}
    with torch.no_grad():
        plain = net(torch.from_numpy(X))
    stop, wrong = threading.Event(), []

    def keep_running() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(net(torch.from_numpy(X)), plain):
                    wrong.append(1)

    fresh = mcdrop.wrap(net, example=X[:8])  # nothing cached: plans and masks are made in the threads
    runner = threading.Thread(target=keep_running)
    runner.start()
    with ThreadPoolExecutor(4) as pool:
        futures = {key: pool.submit(mcdrop.predict, fresh, X[: key[1]], passes=40, seed=key[0]) for key in asked}
        found = {key: future.result(timeout=60) for key, future in futures.items()}
    stop.set()
    runner.join()
    assert wrong == []
    for key in asked:
        np.testing.assert_allclose(found[key].mean, expected[key].mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[key].variance, expected[key].variance, rtol=1e-4, atol=1e-7)
    assert not any(module.training for module in net.modules())


def test_two_models_of_one_network_wrapped_at_once_agree() -> None:
    net = mlp()
    with ThreadPoolExecutor(4) as pool:
        means = [f.result(60) for f in [pool.submit(lambda: mcdrop.predict(net, X[:9]).mean) for _ in range(8)]]
    for mean in means:
        np.testing.assert_allclose(mean, means[0], rtol=1e-5, atol=1e-6)


def test_new_weights_are_seen_at_once() -> None:
    net = mlp()
    model = mcdrop.wrap(net, example=X[:8])
    before = mcdrop.predict(model, X[:8]).mean
    with torch.no_grad():
        net.get_parameter("5.bias").add_(3)
    np.testing.assert_allclose(mcdrop.predict(model, X[:8]).mean, before + 3, rtol=1e-5, atol=1e-5)
    net.load_state_dict(mlp().state_dict())
    np.testing.assert_array_equal(mcdrop.predict(model, X[:8]).mean, before)


def test_a_double_network_is_sampled_in_double() -> None:
    net = mlp()
    single = mcdrop.predict(net, X[:8]).mean
    double = mcdrop.predict(net.double(), X[:8].astype(np.float64)).mean
    np.testing.assert_allclose(double, single, rtol=1e-3, atol=1e-5)


# -- writes to a part of a tensor, and draws that hardly a pass shows --------------------------------------------------

RARE = 0.005


def _base(h: Tensor, keep: Tensor) -> Tensor:
    seen = h.view(-1, 2, 4)
    h.mul_(keep)
    return seen.flatten(1)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a slice": lambda h, keep: h[:, :2].mul_(keep),
    "a chunk": lambda h, keep: h.chunk(2, 1)[0].mul_(keep),
    "a view": lambda h, keep: h.view(-1, 2, 4).mul_(keep[:, None]),
    "a row of columns": lambda h, keep: h.unbind(1)[0].mul_(keep[:, 0]),
    "the transpose": lambda h, keep: h.t().mul_(keep.t()),
    "data": lambda h, keep: h.data.mul_(keep),
    "a filled slice": lambda h, keep: h[:, 1:3].masked_fill_(keep == 0, 0.0),
    "a copy to a slice": lambda h, keep: h[:, ::2].copy_(h[:, ::2] * keep),
    "out=": lambda h, keep: torch.mul(h[:, :2], keep, out=h[:, :2]),
    "what is the same": lambda h, keep: torch.atleast_2d(h).mul_(keep),
    "a sum of one": lambda h, keep: torch.einsum("ij->ij", h).mul_(keep),
    "the whole": lambda h, keep: h.mul_(keep),
    "the whole, of which a view is read": _base,
}


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.write = nn.Linear(4, 8), nn.Linear(8, 1), write

    def written(self, x: Tensor, keep: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        found: Tensor = self.write(h, keep)
        out: Tensor = self.last(found if self.write is _base else h)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.written(x, torch.empty(len(x), 1).bernoulli_(1 - RARE) if self.training else torch.ones(len(x), 1))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_mask_that_is_written_into_a_part_of_a_tensor_is_in_its_passes(
    write: Callable[[Tensor, Tensor], Any],
) -> None:
    """However rarely it drops, and in whatever way the passes run."""
    torch.manual_seed(1)
    net, x = Writes(write).eval(), torch.randn(6, 4)
    found = mcdrop.predict(mcdrop.wrap(net, example=x), x, passes=600, sampler="iid", keep_samples=True).samples
    kept = torch.from_numpy(mcdrop.sample_masks([mcdrop.Site("site0", (1,), RARE)], 600, seed=0)["site0"])
    assert 0 < (kept == 0).sum() < 20
    with torch.no_grad():
        expected = torch.stack([net.written(x, one.expand(6, 1)) for one in kept])
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6)


def test_a_tier_that_loses_a_mask_is_told_from_the_loop_however_rarely_it_drops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loses(module: nn.Module, rows: Any, pick: Any, found: Any, stacks: Any) -> Tensor:
        return TIERS["loop"](module, rows, pick, found, [torch.ones_like(stack) for stack in stacks])

    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool((x > 100).any()) else x

    monkeypatch.setitem(TIERS, "vmap", loses)
    audit = mcdrop.wrap(nn.Sequential(nn.Dropout(1e-4), Decides()).eval(), example=torch.ones(6, 4)).audit
    assert "vmap differs from the loop" in audit.tier_reason


def test_a_network_that_masks_that_tell_break_off_is_as_it_was() -> None:
    """It counts how deep it is, and refuses to go on where many of its units are dropped."""

    class Counts(nn.Module):
        depth = 0

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.depth += 1
            h = self.first(x) * self.depth
            keep = torch.bernoulli(torch.full((len(x), 16), 0.97)) if self.training else torch.ones(16)
            if keep.mean() < 0.8:
                raise ValueError("too few units are left")
            self.depth -= 1
            out: Tensor = self.last(h * keep)
            return out

    torch.manual_seed(0)
    net, x = Counts().eval(), torch.randn(6, 4)
    model = mcdrop.wrap(net, example=x)
    numbers = sample_masks([Site("site0", (16,), 0.0, "uniform")], 20, seed=0, sampler="iid")["site0"]
    with torch.no_grad():
        expected = torch.stack([net.last(net.first(x) * torch.from_numpy(one < np.float32(0.97))) for one in numbers])
    found = mcdrop.predict(model, x, passes=20, sampler="iid", keep_samples=True).samples
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
    assert "differs from the loop" not in model.audit.tier_reason
