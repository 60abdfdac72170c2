"""Captured passes of every network of the zoo: the loop's, at other sizes than those they were proved at."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mcdrop.backends.torch import TorchBackend

from . import ROWS
from .wrapped import CONTROLLED, HEAVY, Wrapped, same, taken, tolerance, wrapped

every = pytest.mark.parametrize("name", CONTROLLED)

PASSES = 4
MORE, FEWER = [*range(ROWS), 0], [2, 1]  # rows: the proof has all four, and one


# What no graph holds: decisions by values, states of its own, shapes that follow from values or from the batch, and
# what torch's own tracing or vmap does not take.
NO_GRAPH = {
    "attention_over_rows", "autocast", "batch_statistics", "branch_on_value", "custom_autograd", "drawn_rate",
    "draws_follow_values", "dynamic_shape", "fake_quantised", "gradient_inside", "gru_packed", "layer_drop",
    "lstm_packed", "numpy_inside",
}  # fmt: skip
if torch.__version__ < "2.13":
    NO_GRAPH.add("checkpointed")
# Decides by values until torch's compiler is used, which switches the checks of distributions off for good.
EITHER = {"distribution_normal"}


def captured(name: str) -> tuple[Wrapped, TorchBackend]:
    """Gives a specimen that is captured, and its backend."""
    made = wrapped(name)
    if made.model.audit.tier != "captured":
        pytest.skip(f"runs by {made.model.audit.tier}: {made.model.audit.tier_reason}")
    assert isinstance(made.model.backend, TorchBackend)
    return made, made.model.backend


@every
def test_all_are_captured_but_those_that_no_graph_holds(name: str) -> None:
    audit = wrapped(name).model.audit
    assert (audit.tier != "captured") == (name in NO_GRAPH) or name in EITHER, audit.tier_reason


@every
@pytest.mark.parametrize("which", [MORE, FEWER], ids=["more rows", "fewer rows"])
def test_a_captured_network_gives_what_the_loop_gives_at_other_sizes(name: str, which: Sequence[int]) -> None:
    made, backend = captured(name)
    rows = made.model.rows(taken(made.example, which))
    loop = backend.run(rows, PASSES, only=None, tier="loop").float()
    got = backend.forward(rows, PASSES, seed=0, start=0, sampler="iid")
    assert same(got, loop, tolerance(made.module))


@every
@pytest.mark.parametrize("sampler", ["balanced", "iid"])
def test_passes_are_the_same_in_any_chunks(name: str, sampler: str) -> None:
    """Nineteen passes, as they come at once and in parts that cut a balanced block."""
    made, backend = captured(name)
    count, cuts = (5, (1, 2, 2)) if name in HEAVY else (19, (1, 2, 13, 3))
    whole = backend.forward(made.rows, count, seed=3, start=0, sampler=sampler)
    block = backend.block(made.rows)
    starts = np.cumsum((0, *cuts)).tolist()
    parts = [block.forward(n, seed=3, start=at, sampler=sampler) for n, at in zip(cuts, starts, strict=False)]
    assert same(np.concatenate(parts), whole, tolerance(made.module))
    assert same(block.deterministic(), backend.deterministic(made.rows), tolerance(made.module))


@every
def test_weights_are_those_of_today(name: str) -> None:
    """A bias, or what else stands last among its parameters, is changed in place and back."""
    made, backend = captured(name)
    parameters = [p for p in made.module.parameters() if p.is_floating_point()]
    if not parameters:
        pytest.skip("has no weights")
    before = parameters[-1].detach().clone()
    try:
        with torch.no_grad():
            parameters[-1].mul_(1.5).add_(0.25)
        loop = backend.run(made.rows, PASSES, only=None, tier="loop").float()
        assert same(backend.forward(made.rows, PASSES, seed=0, start=0, sampler="iid"), loop, tolerance(made.module))
    finally:
        with torch.no_grad():
            parameters[-1].copy_(before)
