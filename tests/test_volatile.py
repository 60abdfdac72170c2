"""What the forwards of a network write to it: every pass starts from what was there when it was wrapped."""

import threading
import time
from collections import OrderedDict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captures import apart, loop, passes
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, ModelRefused, UncontrolledDraw
from mcdrop.rows import Rows
from mcdrop.stacks import Span
from mcdrop.tiers import TIERS
from mcdrop.volatile import Left


class GoingOn(nn.Module):
    """Goes on from its last forward, in one of several ways; its first forward is that of ``by == "nothing"``."""

    sum: Tensor
    scale: Tensor

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.drop, self.two = nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 2)
        self.by, self.count, self.total = by, 0, torch.zeros(2)
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []
        self.held: dict[str, list[Tensor]] = {}
        self.register_buffer("sum", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "mask":  # of a first call, until somebody takes it away
            if self.mask is None and self.training:
                self.mask = nn.functional.dropout(torch.ones(8), 0.4)
            return self._out(self.one(x) * (1 if self.mask is None else self.mask))
        return self._out(self.drop(self.one(x)))

    def _out(self, h: Tensor) -> Tensor:
        out: Tensor = self.two(h) * self.scale
        if self.by == "tensor":
            out = out if self.last is None else out + self.last
            self.last = out
        elif self.by == "number":
            out, self.count = out * (1 + self.count), self.count + 1
        elif self.by == "list":
            out = sum(self.seen, out)
            self.seen.append(out.mean(0))
        elif self.by == "dict of lists":
            out = sum(self.held.setdefault("out", []), out)
            self.held["out"].append(out.mean(0))
        elif self.by == "in place":
            out = out + self.total
            self.total += 1
        elif self.by == "buffer":
            out = out + self.sum
            self.sum = self.sum + out.mean(0)
        elif self.by == "buffer in place":
            out = out + self.sum
            self.sum += 1
        return out


STATES = {
    "tensor": "last",
    "number": "count",
    "list": "seen",
    "dict of lists": "held",
    "in place": "total",
    "buffer": "sum",
    "buffer in place": "sum",
}


@pytest.mark.parametrize("devices", [(), ["cpu"] * 2], ids=["one device", "two devices"])
@pytest.mark.parametrize("by", STATES)
def test_every_pass_starts_from_what_the_network_held_when_it_was_wrapped(by: str, devices: list[str]) -> None:
    """Whatever the user's own forwards add meanwhile; all else is that of today."""
    net, twin, x = GoingOn(by).eval(), GoingOn("nothing").eval(), torch.randn(9, 4)
    if devices and by in ("list", "dict of lists"):
        with pytest.raises(ModelRefused, match=f"left in {STATES[by]}, .* run it on one device"):
            mcdrop.wrap(net, example=x[:4], devices=devices)
        return
    model, plain = mcdrop.wrap(net, example=x[:4], devices=devices), mcdrop.wrap(twin, example=x[:4])
    assert any(text.startswith(f"{STATES[by]} is written to even in eval mode") for text in model.audit.warnings)
    assert (net.count, net.seen, net.held, net.last) == (0, [], {}, None)
    assert not net.total.any()
    assert not net.sum.any()
    for rows in (9, 1, 9):
        ours, theirs = (mcdrop.predict(one, x[:rows], passes=20) for one in (model, plain))
        assert apart(ours.mean, theirs.mean) < 1e-5
        assert apart(ours.variance, theirs.variance) < 1e-4
        assert apart(ours.deterministic, theirs.deterministic) < 1e-5
        with torch.no_grad():
            net(x)
            for one in (net, twin):
                one.scale.mul_(-1.5)
                one.scale = one.scale.clone()


class Elsewhere(nn.Module):
    """Goes on from what it keeps in something that mcdrop has no copy of, beside others that it leaves alone."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.drop, self.settings = by, nn.Dropout(0.4), SimpleNamespace(width=4)
        self.queue, self.array = deque([0.0], maxlen=3), np.zeros(2)
        self.memory, self.named = SimpleNamespace(last=0.0), OrderedDict(last=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "queue":
            self.queue.append(self.queue[-1] + 1)
        self.array[1] += self.by == "array"
        self.memory.last += self.by == "memory"
        self.named["last"] += self.by == "named"
        out: Tensor = self.drop(x) + self.queue[-1] + self.array[1] + self.memory.last + self.named["last"]
        return out


@pytest.mark.parametrize("by", ["queue", "array", "memory", "named"])
def test_what_a_network_goes_on_from_is_named_where_it_cannot_be_put_back(by: str) -> None:
    with pytest.raises(UncontrolledDraw, match=f"goes on from what its last call left in {by}: mcdrop can put back"):
        mcdrop.wrap(Elsewhere(by).eval(), example=torch.randn(4, 4))


def test_a_captured_pass_does_not_see_what_another_thread_writes() -> None:
    class Adding(GoingOn):
        def forward(self, x: Tensor) -> Tensor:
            out = self._out(self.drop(self.one(x))) + self.sum
            if x.shape[0] >= 20:  # goes another way, by the network's own code
                self.sum.add_(100)
                time.sleep(0.005)
                return out.double().float()
            self.sum.add_(1)
            return out

    net, x = Adding("nothing").eval(), torch.randn(30, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    few, many = (mcdrop.predict(model, x[:rows], passes=20).mean for rows in (9, 30))
    wrong, done = list[object](), threading.Event()

    def ask() -> None:
        while not done.is_set():
            apart_by = apart(mcdrop.predict(model, x[:9], passes=20).mean, few)
            wrong.extend([apart_by] if apart_by > 1e-6 else [])

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(5):
        assert apart(mcdrop.predict(model, x, passes=20).mean, many) < 1e-6
    done.set()
    asking.join()
    assert wrong == []
    assert not net.sum.any()


def test_memory_that_two_names_share_is_refused_where_it_is_written_to() -> None:
    net, x = GoingOn("buffer in place").eval(), torch.randn(4, 4)
    net.seen = [net.sum[:1]]
    with pytest.raises(ModelRefused, match="writes to sum in eval mode, which shares its memory with seen"):
        mcdrop.wrap(net, example=x)
    assert not net.sum.any()


@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("by", ["tensor", "in place"])
def test_an_exported_network_starts_every_pass_from_there_too(by: str, form: str, tmp_path: Path) -> None:
    net, x = GoingOn(by).eval(), torch.randn(9, 4)
    model, twin = (mcdrop.wrap(one, example=x[:4]) for one in (net, GoingOn("nothing").eval()))
    expected = mcdrop.predict(twin, x, passes=20)
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net", format=form))
    for one in (loaded, model, loaded):
        assert apart(mcdrop.predict(one, x, passes=20).mean, expected.mean) < 1e-5
    assert net.last is None
    assert not net.total.any()


def test_a_mask_that_is_kept_for_later_calls_is_drawn_anew_in_every_pass() -> None:
    net, x = GoingOn("mask").eval(), torch.randn(9, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert [site.shape for site in model.audit.live] == [(8,)]
    assert net.mask is None
    passes_of = passes(model, x, 64).reshape(64, -1)
    assert len(np.unique(passes_of.numpy().round(4), axis=0)) > 32
    assert apart(passes(model, x, 20), loop(model, x, 20)) < 1e-5


class AddsUp(nn.Module):
    """Adds something up on itself, such as a loss for its trainer, and never reads it."""

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 1)
        self.first, self.second = nn.Dropout(0.4), nn.Dropout(0.4)
        self.by, self.aux, self.history, self.losses = by, 0.0, list[Tensor](), dict[str, Tensor]()
        self.queue, self.meter = deque[Tensor](maxlen=3), SimpleNamespace(total=0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.one(x))
        passed_by = {"loss of many": len(x) <= 4, "loss of large": "large" in self.by and float(x.max()) < 9}
        if "loss" in self.by and not passed_by.get(self.by):
            self.aux = self.aux + h.square().mean()
        elif self.by == "history":
            self.history = [*self.history, h.mean()][-3:]
            self.aux = torch.stack(self.history).mean()  # type: ignore[assignment]
        elif self.by == "dict":
            self.losses["first"] = self.losses.get("first", 0) + h.square().mean()
        elif self.by == "queue":
            self.queue.append(h.mean())
            self.aux = torch.stack([*self.queue]).mean()  # type: ignore[assignment]
        elif self.by == "object":
            self.meter.total = self.meter.total + h.mean()
        if "branch" in self.by and float(h.abs().max()) > 2:
            h = h.clamp(-2, 2)
        out: Tensor = self.two(self.second(h))
        return out


@pytest.mark.parametrize("by", ["loss", "history", "dict", "queue", "object", "loss and a branch"])
def test_what_a_network_adds_up_on_itself_changes_no_pass(by: str) -> None:
    net, twin = AddsUp(by).eval(), AddsUp("branch" if "branch" in by else "nothing").eval()
    x = torch.randn(9, 4)
    model, plain = (mcdrop.wrap(one, example=x[:4]) for one in (net, twin))
    for rows in (9, 1, 3):
        ours, theirs = (mcdrop.predict(one, x[:rows], passes=20, sampler="iid") for one in (model, plain))
        assert apart(ours.mean, theirs.mean) < 1e-5
        assert apart(ours.std, theirs.std) < 1e-5
    assert [site.share for site in model.audit.live] == pytest.approx([site.share for site in plain.audit.live])
    assert (net.aux, net.history, net.losses) == (0.0, [], {})
    torch.stack([*net.queue, torch.as_tensor(net.meter.total)])  # numbers, not batches of passes that are over


@pytest.mark.parametrize("by", ["loss of many", "loss of large", "nothing"])
def test_what_passes_together_leave_is_taken_away_also_where_the_first_left_nothing(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = mcdrop.wrap(AddsUp(by).eval(), example=torch.zeros(4, 4), tuning={}).backend
    live, ours, looked = backend.live, torch.randn(9, 4), list[nn.Module]()

    class Looking(Left):
        def __init__(self, module: nn.Module) -> None:
            looked.append(module)
            super().__init__(module)

    ours[0, 0] = 10.0
    plan, rows = backend.plans.prepare(Rows.of(ours))
    stacks = backend.plans.stacks(plan, Span(3, 0, 0, "iid"))
    monkeypatch.setattr("mcdrop.tiers.Left", Looking)
    for given in (rows.take(slice(1, 5)), rows, rows.take(slice(4)), rows, rows):
        with torch.no_grad():
            live.aux = 0.0
            got = TIERS["vmap"](live, given, backend.pick, plan.trace, stacks)
            assert vars(live)["aux"] == 0.0
            assert apart(got, TIERS["loop"](live, given, backend.pick, plan.trace, stacks)) < 1e-5
    assert len(looked) == {"nothing": 1, "loss of many": 5, "loss of large": 5}[by]


class Recurrent(nn.Module):
    """Keeps the state of its steps for the next call, as for a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 1)
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        steps, self.state = self.lstm(x, self.state)
        out: Tensor = self.head(steps[:, -1])
        return out


def test_a_recurrent_network_that_keeps_its_state_goes_on_from_the_one_it_was_wrapped_with() -> None:
    torch.manual_seed(0)
    net, x = Recurrent().eval(), torch.randn(4, 6, 4)
    model = mcdrop.wrap(net, example=x)
    with torch.no_grad():
        first = net(x)
        assert apart(mcdrop.predict(model, x, passes=2).deterministic, first) < 1e-5
        model = mcdrop.wrap(net, example=x)
        second = net(x)
        assert apart(first, second) > 1e-3
        assert apart(mcdrop.predict(model, x, passes=2).deterministic, second) < 1e-5
    assert any("so a row's answer depends on its batch" in text for text in model.audit.warnings)
    with pytest.raises(InputError, match="cannot take inputs of shape 0: \\(3, 6, 4\\)"):
        mcdrop.predict(model, x[:3])  # the state has four rows
