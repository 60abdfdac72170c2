"""Plans: what a short timing chooses, and that no choice of it changes an answer."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from captures import apart, backend_of, made
from torch import nn

import mcdrop
from mcdrop.engine import PassPlan, run_passes
from mcdrop.plan import CHUNK_BYTES
from mcdrop.stacks import Kept
from mcdrop.summaries import TASKS


def wide() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 400), nn.Dropout(0.4), nn.ReLU(), nn.Linear(400, 2))
    return net.eval(), torch.randn(50, 4)


@pytest.mark.parametrize("chunk", [0.25, 1.0, 4.0])
def test_the_chunk_that_a_timing_chose_changes_no_answer(chunk: float) -> None:
    net, x = wide()
    model = mcdrop.wrap(net, example=x[:4])
    backend = backend_of(model)
    expected = mcdrop.predict(model, x, passes=300)
    backend.plans._plans = {key: replace(plan, chunk=chunk) for key, plan in backend.plans._plans.items()}
    found = mcdrop.predict(model, x, passes=300)
    assert apart(found.mean, expected.mean) < 1e-5
    assert apart(found.variance, expected.variance) < 1e-4


def test_a_chunk_takes_the_memory_that_was_measured_unless_it_was_given() -> None:
    net, x = wide()
    model = mcdrop.wrap(net, example=x[:4])
    backend, rows = backend_of(model), model.rows(x)
    plan = backend.plan(rows)
    usual = 4 * plan.trace.pass_bytes
    backend.plans._plans = {key: replace(held, chunk=4.0) for key, held in backend.plans._plans.items()}
    assert backend.pass_bytes(rows) == usual // 4
    backend.chunk_bytes = CHUNK_BYTES // 2
    assert backend.pass_bytes(rows) == usual


def test_the_audit_says_what_preparing_took_and_how_chunks_were_chosen() -> None:
    net, x = wide()
    audit = mcdrop.wrap(net, example=x[:4]).audit
    assert audit.prepare_seconds is not None
    assert audit.prepare_seconds > 0
    assert audit.chunk in (0.25, 1.0, 4.0)
    assert ("times the usual memory" in str(audit)) == (audit.chunk != 1 or audit.kept_from is not None)


def test_a_store_of_tensors_keeps_the_latest_within_its_bound() -> None:
    kept = Kept(most=100)
    makers = {name: torch.zeros(size, dtype=torch.uint8) for name, size in (("a", 40), ("b", 50), ("c", 30))}
    for name in ("a", "b", "a", "c"):  # b is the one that was used longest ago
        assert torch.equal(kept.get(name, lambda name=name: makers[name]), makers[name])  # type: ignore[misc]
    assert [*kept.held] == ["a", "c"]
    assert kept.size == 70
    assert kept.get("too large", lambda: torch.zeros(101, dtype=torch.uint8)).nbytes == 101
    assert [*kept.held] == ["a", "c"]
    several = (torch.zeros(60, dtype=torch.uint8), [torch.zeros(39, dtype=torch.uint8)])
    found = kept.get("several", lambda: several)
    assert kept.get("several", lambda: pytest.fail("it is kept")) is found
    assert [found[0].nbytes, found[1][0].nbytes] == [60, 39]
    assert kept.size == 99


GROWTH = """
import resource, sys, torch, mcdrop
from torch import nn
torch.set_num_threads(1)
layers = [nn.Linear(16, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5)]
net, x = nn.Sequential(*layers, nn.Linear(512, 2)), torch.randn(256, 16)
model = mcdrop.wrap(net, example=x[:8], tuning={"kept_from": 64} if sys.argv[1] == "kept" else {})
model.backend.chunk_bytes = 2**22
for passes in (32, 400):
    mcdrop.sample(model, x, mcdrop.PassPlan(passes))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("way", ["kept", "whole"])
def test_what_is_kept_does_not_break_up_memory(way: str) -> None:
    """Masks that stay between activations that go: a hole for each chunk would take 400 MiB here."""
    done = subprocess.run([sys.executable, "-c", GROWTH, way], stdout=subprocess.PIPE, text=True, check=True)
    few, many = (int(line) for line in done.stdout.split())
    assert many - few < 150


def test_running_again_draws_no_random_number() -> None:
    """Masks are kept: a plan that comes again finds them."""
    net, x = made("mlp")
    model = mcdrop.wrap(net, example=x[:4])
    plan = PassPlan(40, seed=3)
    statistics = TASKS["regression"].statistics
    run_passes(model.backend, model.rows(x), plan, statistics=statistics)
    held = {key: value[0] for key, value in backend_of(model).plans._values.held.items()}
    run_passes(model.backend, model.rows(x), plan, statistics=statistics)
    again = {key: value[0] for key, value in backend_of(model).plans._values.held.items()}
    assert held.keys() == again.keys()
    assert all(again[key] is value for key, value in held.items())


def test_arrays_and_tensors_share_a_plan() -> None:
    """Else a network that was wrapped with one would be captured again for the other."""
    net, x = made("mlp")
    model = mcdrop.wrap(net, example=x[:4])
    backend = backend_of(model)
    assert backend.plan(model.rows(x.numpy())) is backend.plan(model.rows(x))
    assert len(backend.plans._plans) == 1


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.float64, torch.bfloat16])
def test_real_numbers_of_any_type_are_run_by_the_plan_of_the_example(kind: Any) -> None:
    """A network is captured once, at wrap: a first request does not pay for it again."""
    net, x = wide()[0], np.random.default_rng(0).normal(size=(8, 4))
    example = torch.as_tensor(x).to(kind) if isinstance(kind, torch.dtype) else x.astype(kind)
    model = mcdrop.wrap(net, example=example[:4])
    plans = backend_of(model).plans._plans
    assert len(plans) == 1
    means = [mcdrop.predict(model, given, passes=10).mean for given in (example, x, torch.as_tensor(x).float())]
    assert len(plans) == 1
    assert apart(means[0], means[2]) < 0.05  # half precision has few digits
    assert apart(means[1], means[2]) < 1e-6
