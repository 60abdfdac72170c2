"""Passes summed up where they are: the path that a GPU takes, walked on a CPU, gives what arrays give."""

from dataclasses import replace

import pytest
import torch
from captures import apart, backend_of, made
from torch import nn

import mcdrop
from mcdrop.backends import Block
from mcdrop.backends.torch import TorchBackend
from mcdrop.ready import Ready
from mcdrop.rows import Rows

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

    def block(self, rows: Rows, *, exact_last: bool = False) -> Block:
        block = super().block(rows, exact_last=exact_last)
        assert isinstance(block, Ready)
        block._on_gpu = True
        return block


def there(model: mcdrop.Model, memory: int | None) -> mcdrop.Model:
    """Gives the same model with such a backend."""
    old = backend_of(model)
    new = There(old.live, old.plain, old.pick, old.off, old.force, tuning=old.plans.tuning)
    new.chunk_bytes = old.chunk_bytes = memory or old.chunk_bytes
    return replace(model, backend=new)


@pytest.mark.parametrize("memory", [None, 2**16])
@pytest.mark.parametrize("name", ["mlp", "residual", "encoder", "lstm"])
def test_sums_made_there_give_what_arrays_give(name: str, memory: int | None) -> None:
    """In one chunk and in several, for rows that stop early, and for few outputs, which are moved all the same."""
    net, x = made(name, rows=40)
    here = mcdrop.wrap(net, example=x[:4], tuning={})
    other = there(here, memory)
    assert other.backend.block(other.rows(x)).sums_there(1000)
    assert not other.backend.block(other.rows(x[:1])).sums_there(100)
    for asked in ASKED:
        for rows in (40, 1):
            expected = mcdrop.predict(here, x[:rows], **asked)  # type: ignore[arg-type]
            got = mcdrop.predict(other, x[:rows], **asked)  # type: ignore[arg-type]
            for field in FIELDS:
                assert apart(getattr(got, field), getattr(expected, field)) < 1e-6, (asked, field)


@pytest.mark.parametrize("task", ["classification", "gaussian", "regression"])
def test_every_task_has_its_statistics_there(task: str) -> None:
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
