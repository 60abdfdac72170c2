"""Passes summed up where they are: the path that a GPU takes, walked on a CPU, gives what arrays give."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from captures import apart, backend_of, made
from devices import on_each_device
from torch import nn

import mcdrop
from mcdrop.backends import Block
from mcdrop.backends.torch import TorchBackend
from mcdrop.moments import Gathered
from mcdrop.ready import _SUMMING, Ready
from mcdrop.rows import Rows
from mcdrop.samplers import BLOCKS
from mcdrop.sums import summed_up

FIELDS = ("mean", "variance", "standard_error", "deterministic")
ASKED: list[dict[str, object]] = [
    {"passes": 333},
    {"passes": 100},
    {"passes": 100, "sampler": "iid"},
    {"passes": 1000},
    {"tolerance": 0.02, "max_passes": 300},
]


class There(TorchBackend):
    """A backend that takes its device for a GPU; what it cannot record it runs."""

    def block(self, rows: Rows, *, exact_last: bool = False, rides: bool = True) -> Block:
        block = super().block(rows, exact_last=exact_last, rides=rides)
        assert isinstance(block, Ready)
        block._on_gpu = True
        return block


def there(model: mcdrop.Model, memory: int | None) -> mcdrop.Model:
    """Gives the same model with such a backend."""
    old = backend_of(model)
    new = There(old.live, old.plain, old.pick, old.excluded, old.force, tuning=old.plans.tuning, flags=old.flags)
    new.chunk_bytes = memory or old.chunk_bytes
    return replace(model, backend=new)


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each of the sums was of later passes, in order; few outputs are summed up there too."""
    seen: list[bool] = []
    plain = Ready.summed

    def watched(self: Ready, passes: int, **which: Any) -> Any:
        seen.append(which["summing"].first is not None)
        return plain(self, passes, **which)

    monkeypatch.setattr(Ready, "summed", watched)
    monkeypatch.setattr("mcdrop.ready._MANY", 1)
    return seen


@pytest.mark.parametrize("chunk", [None, 70, 190, 500])
@pytest.mark.parametrize("name", ["mlp", "residual", "encoder", "lstm"])
def test_sums_made_there_give_what_arrays_give(name: str, chunk: int | None, summed: list[bool]) -> None:
    """In one chunk and in several, all of which are summed up there; for rows that stop early."""
    net, x = made(name, rows=12)
    here = mcdrop.wrap(net, example=x[:4], tuning={})
    plan = backend_of(here).plan(here.rows(x))
    assert plan.program is not None
    needed = max(backend_of(here).room.pass_bytes(plan), _SUMMING * plan.program.width)
    memory = None if chunk is None else chunk * len(x) * needed
    other = there(here, memory)
    for asked in ASKED:
        expected = mcdrop.predict(here, x, **asked)  # type: ignore[arg-type]
        assert summed == []
        got = mcdrop.predict(other, x, **asked)  # type: ignore[arg-type]
        for field in FIELDS:
            assert apart(getattr(got, field), getattr(expected, field)) < 1e-6, (asked, field)
        if chunk is not None and asked == {"passes": 1000}:
            assert summed[0] is False
            assert all(summed[1:])
            assert len(summed) >= 1000 // chunk
        assert summed
        summed.clear()


def test_few_outputs_are_moved_instead() -> None:
    net, x = made("mlp", rows=40)
    other = there(mcdrop.wrap(net, example=x[:4], tuning={}), None)
    assert other.backend.block(other.rows(x)).sums_there(1000)
    assert not other.backend.block(other.rows(x[:1])).sums_there(100)


@pytest.mark.parametrize("task", ["classification", "gaussian", "regression"])
def test_every_task_has_its_statistics_there(task: str, summed: list[bool]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Dropout(0.3), nn.Linear(50, 4)).eval(), torch.randn(80, 6)
    here = mcdrop.wrap(net, example=x[:4], task=task, tuning={})
    other = there(here, None)
    asked: list[dict[str, object]] = [{"passes": 333}, {"passes": 333, "interval": "quantile"}]
    asked += [{"passes": 300, "exact_last": True}] if task == "regression" else []
    for one in asked:
        expected, got = (mcdrop.predict(model, x, **one) for model in (here, other))  # type: ignore[arg-type]
        for field in FIELDS:
            assert apart(getattr(got, field), getattr(expected, field)) < 1e-9, (one, field)


@pytest.mark.parametrize("sampler", BLOCKS)
@on_each_device
def test_sums_of_any_number_of_passes_are_those_of_arrays(device: str, sampler: str) -> None:
    """In one chunk, and in one that follows whole blocks; where one output is infinite, only its own sums are."""
    draws = np.random.default_rng(0)
    for passes in (1, 15, 16, 17, 63, 64, 80, 100, 255, 333, 1000):
        for shape in ((1, 1), (1, 10), (40, 3)):
            values = draws.normal(1e3, 3, (128 + passes, *shape)).astype(np.float32)
            values[-1, 0, 0] = np.inf
            expected, got = Gathered(BLOCKS[sampler]), Gathered(BLOCKS[sampler])
            expected.add(values.astype(np.float64))
            for part in (values[:128], values[128:]):
                summing = got.summing(lambda outputs: outputs)
                assert summing is not None
                got.add_sums(len(part), summed_up(torch.tensor(part, device=device), summing).cpu().numpy())
            with np.errstate(invalid="ignore"):
                one, other = expected.read(), got.read()
            assert one.degrees == other.degrees
            for field in ("mean", "variance", "error_squared"):
                whole, sums = getattr(one, field), getattr(other, field)
                assert not np.isfinite(sums[0, 0]), field
                np.testing.assert_allclose(sums.ravel()[1:], whole.ravel()[1:], rtol=1e-9, err_msg=field)
