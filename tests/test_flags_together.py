"""Flags of modules of one class, of which most do the same: they are told as if each had a class of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made import in_plain_python
from torch import Tensor, nn

import mcdrop
from mcdrop.audit import Audit
from mcdrop.errors import UncontrolledDraw

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class _Block(nn.Module):
    """A layer, then what an instance is told to do; ``rows`` counts what all blocks together have run."""

    rows = 0
    step: Tensor

    def __init__(self, act: Callable[["_Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        _Block.rows += len(x)
        return self.act(self, self.layer(x))


def _drops(block: _Block, x: Tensor) -> Tensor:
    return x * torch.empty_like(x).bernoulli_(0.8) / 0.8 if block.training else x


def _drops_twice(block: _Block, x: Tensor) -> Tensor:
    return F.dropout(F.dropout(x, 0.1, block.training), 0.1, block.training)


def _reads(block: _Block, x: Tensor) -> Tensor:
    return x.contiguous() if block.training else x


def _doubles(block: _Block, x: Tensor) -> Tensor:
    return 2 * x if block.training else x


def _writes(block: _Block, x: Tensor) -> Tensor:
    if block.training:
        block.step += 1
    return x


def _fails(block: _Block, x: Tensor) -> Tensor:
    if block.training:
        raise ValueError("a batch of one")
    return x


def _shuffles(block: _Block, x: Tensor) -> Tensor:
    return x[:, torch.multinomial(torch.ones(6), 6)] if block.training else x


def _pads(block: _Block, x: Tensor) -> Tensor:
    return F.pad(x, (0, 1)).relu()[:, :6] + F.dropout(x, 0.2, block.training)


BLOCKS: dict[str, Sequence[Callable[[_Block, Tensor], Tensor]]] = {
    "all drop": [_drops] * 4,
    "all draw twice": [_drops_twice] * 3,
    "none draws": [_reads] * 3 + [_drops],
    "the first alone does nothing": [_reads, _drops, _drops, _drops],
    "the last alone computes something else": [_drops, _drops, _drops, _doubles],
    "one computes something else among those without effect": [_reads, _reads, _doubles, _reads, _drops],
    "one writes": [_drops, _drops, _writes, _drops],
    "one fails": [_drops, _drops, _fails, _drops],
    "one draws more": [_drops, _drops_twice, _drops, _drops],
    "various": [_pads, _drops, _drops_twice, _reads],
}


def _net(acts: Sequence[Callable[[_Block, Tensor], Tensor]], *, apart: bool) -> nn.Module:
    torch.manual_seed(0)
    kinds = [type(f"_Block{i}", (_Block,), {}) if apart else _Block for i in range(len(acts))]
    return nn.Sequential(*(kind(act) for kind, act in zip(kinds, acts, strict=True)), nn.Linear(6, 2)).eval()


def _told(audit: Audit) -> Any:
    sites = [(one.path, one.kind, one.p, one.shape, one.verdict, one.reason) for one in audit.sites]
    return sites, audit.stochastic, audit.kept, audit.warnings


@pytest.mark.parametrize("acts", BLOCKS.values(), ids=BLOCKS)
def test_modules_of_one_class_are_told_as_those_of_classes_of_their_own(
    acts: Sequence[Callable[[_Block, Tensor], Tensor]],
) -> None:
    one, other = (mcdrop.wrap(_net(acts, apart=apart), example=X, tuning={}) for apart in (False, True))
    assert _told(one.audit) == _told(other.audit)
    drawing = [str(i) for i, act in enumerate(acts) if act in (_drops, _drops_twice, _pads)]
    assert [*one.audit.stochastic] == drawing
    assert {site.path for site in one.audit.live} == set(drawing)


def test_what_two_of_a_class_do_is_told_though_it_cancels_out() -> None:
    def adds(number: float) -> _Block:
        return _Block(lambda block, x: x + number * block.training)

    net = nn.Sequential(adds(0), adds(1), adds(-1), nn.Dropout(0.5), nn.Linear(6, 2)).eval()
    audit = mcdrop.wrap(net, example=X).audit
    assert audit.kept == dict.fromkeys(["1", "2"], "computes something else in training mode, without a draw")


@pytest.mark.parametrize("place", range(4))
def test_one_of_a_class_whose_draw_no_mask_controls_is_refused_by_name(place: int) -> None:
    acts = [_drops] * 4
    acts[place] = _shuffles
    with pytest.raises(UncontrolledDraw, match=f"multinomial.* in {place}"):
        mcdrop.wrap(_net(acts, apart=False), example=X)


@pytest.mark.parametrize("seed", range(6))
def test_what_several_of_a_class_do_by_chance_from_a_generator_of_their_own_is_refused(seed: int) -> None:
    """Stochastic depth at a rate of 0.3: each look misses it at all of six blocks with a chance of 0.12."""
    numbers = in_plain_python(seed)

    def skips(block: _Block, x: Tensor) -> Tensor:
        return x if block.training and next(numbers) < 0.3 else x + torch.tanh(x)

    with pytest.raises(UncontrolledDraw, match="a generator out of sight"):
        mcdrop.wrap(_net([skips] * 6 + [_drops], apart=False), example=X, tuning={})


def test_what_changes_with_the_seed_of_no_draw_is_refused_though_it_comes_again() -> None:
    numbers = iter([0.1, 0.9, *[0.1] * 1000])

    def skips(block: _Block, x: Tensor) -> Tensor:
        return x if block.training and next(numbers) < 0.3 else x + torch.tanh(x)

    with pytest.raises(
        UncontrolledDraw, match="0, which gives other numbers at each call, from a generator out of sight"
    ):
        mcdrop.wrap(_net([skips, _drops], apart=False), example=X, tuning={})


def test_a_further_block_takes_a_row_for_its_proof_and_a_forward_for_its_share_alone() -> None:
    def rows(blocks: int) -> float:
        _Block.rows = 0
        mcdrop.wrap(_net([_drops] * blocks, apart=False), example=X, tuning={})
        return _Block.rows / blocks

    assert rows(12) - rows(8) == 4 * (1 + len(X))


def test_a_draw_that_the_first_row_does_not_show_is_proved_by_the_others() -> None:
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 2, bias=False)).eval()
    audit = mcdrop.wrap(net, example=torch.cat([torch.zeros(1, 6), X[1:]])).audit
    assert [site.verdict for site in audit.sites] == ["live"]
