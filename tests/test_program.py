"""Programs: a captured graph in stages, each run no oftener than what it reads changes."""

from typing import Any

import pytest
import torch
from captures import NETS, Operations, apart, backend_of, loop, made, passes, program_of, tensors, wrapped
from devices import on_each_device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mcdrop
from mcdrop.engine import PassPlan, PassResult, run_passes
from mcdrop.masks import Site, sample_masks
from mcdrop.onednn import FLOPS
from mcdrop.stacks import Span
from mcdrop.summaries import TASKS

ROWS, PASSES = 24, 50
every = pytest.mark.parametrize("name", NETS)


def image_net(device: str) -> tuple[nn.Module, Tensor]:
    """A convolution, then dropout, then a linear layer: what comes before the draw is most of the work."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.4), nn.Linear(100, 3))
    return net.eval().to(device), torch.randn(ROWS, 2, 5, 5, device=device)


CONV = 2 * 4 * 25 * 2 * 9  # operations of a row: a product and a sum for each weight and place
LINEAR = 2 * 100 * 3


def run(model: mcdrop.Model, x: Tensor, **plan: object) -> PassResult:
    asked = PassPlan(**plan)  # type: ignore[arg-type]
    return run_passes(model.backend, model.rows(x), asked, statistics=TASKS["regression"].statistics)


# -- how often a stage runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 3_000, 30_000, 300_000, 10**9])
@on_each_device
def test_what_comes_before_the_first_draw_runs_once_a_row(chunk_bytes: int, device: str) -> None:
    """Counted by torch: whatever the chunks of rows and passes; the deterministic output costs one pass more."""
    net, x = image_net(device)
    model = mcdrop.wrap(net, example=x[:4])
    model.backend.chunk_bytes = chunk_bytes
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        run(model, x, passes=PASSES)
    counts = counter.get_flop_counts()["Global"]
    conv = sum(count for name, count in counts.items() if "convolution" in str(name))
    assert conv == ROWS * CONV
    assert counter.get_total_flops() - conv <= ROWS * (PASSES + 1) * LINEAR


@on_each_device
@pytest.mark.parametrize("idle", [nn.Dropout(0.0), nn.AlphaDropout(0.0), nn.Dropout2d(0.0)])
def test_what_drops_nothing_keeps_no_layer_in_the_passes(idle: nn.Module, device: str) -> None:
    """A rate of 0 is common in trained networks: all before the first draw that drops something runs once a row."""
    net, x = image_net(device)
    conv, relu, flat, _, linear = net.children()
    with_idle = nn.Sequential(idle, conv, idle, *[*net.children()][1:]).eval()
    model = mcdrop.wrap(with_idle, example=x[:4])
    assert [site.verdict for site in model.audit.sites] == ["idle", "idle", "live"]
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        got = run(model, x, passes=PASSES)
    counts = counter.get_flop_counts()["Global"]
    assert sum(count for name, count in counts.items() if "convolution" in str(name)) == ROWS * CONV
    bytes_each = [
        backend_of(one).plans.plan(one.rows(x)).trace.pass_bytes for one in (model, mcdrop.wrap(net, example=x))
    ]
    assert bytes_each[0] == bytes_each[1]  # what chunks go by
    third = Site("site2", (100,), 0.4)
    masks = sample_masks([third], PASSES, seed=0, sampler="balanced")[third.name]
    outputs = [linear(flat(relu(conv(x))) * torch.from_numpy(mask).to(x) / 0.6) for mask in masks]
    assert apart(got.mean, torch.stack(outputs).mean(0).detach().cpu()) < 1e-5


@on_each_device
def test_the_deterministic_output_rides_along_with_the_passes(device: str) -> None:
    """No forward of the network is run for it, at no number of chunks."""
    net, x = image_net(device)
    model = mcdrop.wrap(net, example=x[:4])
    with torch.no_grad():
        expected = net(x).cpu()
    calls: list[object] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *given: calls.append(given)):
        assert apart(run(model, x, passes=PASSES).deterministic, expected) < 1e-6
    assert not calls


def test_a_stage_of_the_rows_is_the_same_for_all_rows_or_some() -> None:
    model, x = wrapped("residual")
    program, rows = program_of(model, x[:6])
    (leaf,) = (leaf for _, leaf in rows.named())
    with torch.no_grad():
        weights = program.weights()
        whole = tensors(program.rows(weights, [leaf], 6))
        halves = [tensors(program.rows(weights, [part], 3)) for part in leaf.split(3)]
    assert whole
    for together, *parts in zip(whole, *halves, strict=True):
        axis = next(i for i, size in enumerate(together.shape) if size == 6)
        assert apart(torch.cat(parts, dim=axis), together) < 1e-6


@every
@on_each_device
def test_what_follows_from_masks_alone_is_kept(name: str, device: str) -> None:
    model, x = wrapped(name, device)
    backend = backend_of(model)
    plan, _ = backend.plans.prepare(model.rows(x[:4]))
    span = Span(5, 11, 0, "balanced")
    first = backend.plans.values(plan, span, ride=True)
    again = backend.plans.values(plan, span, ride=True)
    other = backend.plans.values(plan, Span(5, 12, 0, "balanced"), ride=True)
    assert first
    assert all(one is two for one, two in zip(first, again, strict=True))
    assert all(len(tensor) == 6 for tensor in tensors(first))  # five passes, and the one that rides
    assert any(not torch.equal(one, two) for one, two in zip(tensors(first), tensors(other), strict=True))


def test_a_second_call_makes_nothing_of_the_masks_again() -> None:
    net, x = made("encoder")
    model = mcdrop.wrap(net, example=x[:4])
    counts = []
    for _ in range(3):
        with Operations() as ran:
            mcdrop.predict(model, x, passes=20, seed=5)
        counts.append(len(ran.seen))
    assert counts[0] > counts[1] == counts[2]


# -- the deterministic output ------------------------------------------------------------------------------------------


@every
@on_each_device
def test_the_deterministic_output_is_plain_eval(name: str, device: str) -> None:
    model, x = wrapped(name, device)
    with torch.no_grad():
        expected = model.module(x).cpu()
    for rows in (1, 2, 64):
        for chunk in (2_000, 10**9):
            before = model.backend.chunk_bytes
            model.backend.chunk_bytes = chunk
            try:
                assert apart(run(model, x[:rows], passes=3).deterministic, expected[:rows]) < 2e-6
            finally:
                model.backend.chunk_bytes = before


@on_each_device
def test_where_masks_do_not_keep_the_mean_the_deterministic_output_is_plain_eval_all_the_same(device: str) -> None:
    """At the expectation of a squared mask the output is not that with all draws off."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.dropout = nn.Linear(4, 9), nn.Linear(9, 2), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            mask = self.dropout(torch.ones_like(x[:, :1]))
            out: Tensor = self.two(self.one(x) * mask**2)
            return out if self.dropout.training else self.two(self.one(x) * 5)

    torch.manual_seed(0)
    x = torch.randn(6, 4, device=device)
    net = Squared().eval().to(device)
    model = mcdrop.wrap(net, example=x)
    with torch.no_grad():
        assert apart(mcdrop.predict(model, x, passes=4).deterministic, net(x).cpu()) < 1e-6


class _Crosswise(nn.Module):
    """A recurrent layer whose steps are the rows, as where ``batch_first`` is forgotten: its blank states hold none."""

    def __init__(self, kind: Any, both_ways: bool) -> None:
        super().__init__()
        self.dropout, self.layer = nn.Dropout(0.2), kind(3, 4, bidirectional=both_ways)
        self.out = nn.Linear(8 if both_ways else 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(self.dropout(x))[0][:, -1])
        return out


@on_each_device
@pytest.mark.parametrize(("kind", "both_ways"), [(nn.LSTM, False), (nn.LSTM, True), (nn.GRU, True), (nn.RNN, False)])
def test_states_that_follow_from_the_passes_alone_have_one_more_for_the_pass_that_rides(
    kind: Any, both_ways: bool, device: str
) -> None:
    """Where they lacked it, torch's LSTM wrote past the end of memory, and the process died."""
    torch.manual_seed(0)
    net, x = _Crosswise(kind, both_ways).eval().to(device), torch.randn(4, 8, 3, device=device)
    model = mcdrop.wrap(net, example=x)
    plan, _ = backend_of(model).plans.prepare(model.rows(x))
    assert (plan.tier, plan.rides) == ("captured", True)
    assert any("depends on its batch" in warning for warning in model.audit.warnings)
    assert apart(passes(model, x, 9), loop(model, x, 9)) < 1e-5
    with torch.no_grad():
        assert apart(run(model, x, passes=9).deterministic, net(x).cpu()) < 1e-5


# -- samplers and shapes -----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("sampler", ["balanced", "iid"])
def test_passes_come_out_the_same_in_any_chunks(name: str, sampler: str) -> None:
    model, x = wrapped(name)
    rows = model.rows(x[:3])
    whole = model.backend.forward(rows, 37, seed=3, start=0, sampler=sampler)
    block = model.backend.block(rows)
    at = 0
    for count in (1, 2, 13, 20, 1):
        part = block.forward(count, seed=3, start=at, sampler=sampler)
        assert apart(part, whole[at : at + count]) < 1e-5
        at += count
    assert at == 37


@on_each_device
def test_weights_of_another_shape_are_planned_anew(device: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 2)).eval().to(device)
    x = torch.randn(9, 4, device=device)
    model = mcdrop.wrap(net, example=x[:4])
    passes(model, x, 3)
    for width in (50, 3, 6):
        wider = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)).to(device)
        for path, layer in (("0", wider[0]), ("3", wider[1])):
            net.get_submodule(path).weight, net.get_submodule(path).bias = layer.weight, layer.bias
        got = passes(model, x, 8)
        assert apart(got, loop(model, x, 8)) < 1e-5
        assert backend_of(model).tier(model.rows(x))[0] == "captured"
        with torch.no_grad():
            assert apart(mcdrop.predict(model, x, passes=2).deterministic, net(x).cpu()) < 1e-6
