"""The trace: which draws a pass makes, whose rows they are, and what escapes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdrop.errors import UncontrolledDraw
from mcdrop.layouts import Layout
from mcdrop.outputs import picker
from mcdrop.record import record
from mcdrop.rows import Rows
from mcdrop.trace import Trace, one_pass, trace, widened

ROWS = Rows.of(torch.linspace(-1, 1, 8).reshape(2, 4))
PICK = picker(None)


class Net(nn.Module):
    """Draws inside its submodule ``part``, as told."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part = Part(act)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(self.linear(x))
        return out


class Part(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def traced(act: Callable[[Tensor], Tensor]) -> Trace:
    return trace(Net(act), ROWS, PICK)


def columns_first(x: Tensor) -> Tensor:
    return F.dropout(x.t(), 0.5).t()


def by_heads(x: Tensor) -> Tensor:
    """Two heads of two units each, merged with the rows as attention does."""
    return F.dropout(x.reshape(len(x) * 2, 2), 0.5).reshape(len(x), 4)


def by_steps(x: Tensor) -> Tensor:
    """Two steps of two units each, the first ones of all rows before the second ones."""
    steps = x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 2)
    return F.dropout(steps, 0.5).reshape(2, -1, 2).transpose(0, 1).reshape(-1, 4)


def by_steps_and_heads(x: Tensor) -> Tensor:
    """Two steps of two heads each: the first step of all rows, head after head, before the second one."""
    steps = x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 1)
    return F.dropout(steps, 0.5).reshape(2, -1, 2).transpose(0, 1).reshape(-1, 4)


def averaged_copies(x: Tensor) -> Tensor:
    """The mean over three copies of two steps: a wrong order of the masks shows only where rows get one mask twice."""
    return F.dropout(x.repeat(3, 1).reshape(-1, 2), 0.5).reshape(3, -1, 2, 2).mean((0, 2))


def beside_a_count(x: Tensor) -> Tensor:
    """Counts entries, which has nothing to do with its draw."""
    return by_heads(x) + x.flatten().nonzero().numel()


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], Layout | None]] = {
    "rows first": (lambda x: F.dropout(x, 0.5), (4,), Layout(0)),
    "rows second": (columns_first, (4,), Layout(1)),
    "heads merged with rows": (by_heads, (2, 2), Layout(0, 2)),
    "steps before rows": (by_steps, (2, 2), Layout(0, 2, outer=2)),
    "steps before rows, heads after": (by_steps_and_heads, (4, 1), Layout(0, 4, outer=2)),
    "copies that are averaged": (averaged_copies, (6, 2), Layout(0, 6, outer=3)),
    "beside a count of entries": (beside_a_count, (2, 2), Layout(0, 2)),
    "channels": (lambda x: F.dropout2d(x[:, :, None, None], 0.5)[:, :, 0, 0], (4,), Layout(0)),
    "a weight, shared by all rows": (lambda x: x @ F.dropout(torch.eye(4), 0.5), (4, 4), None),
    "one number a row": (lambda x: x * torch.bernoulli(x[:, :1], 0.5), (1,), Layout(0)),
}


@pytest.mark.parametrize(("act", "shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_axis_of_the_rows_is_told_from_two_row_counts(
    act: Callable[[Tensor], Tensor], shape: tuple[int, ...], layout: Layout | None
) -> None:
    found = traced(act)
    assert [site.shape for site in found.sites] == [shape]
    assert found.layouts == (layout,)
    assert found.unclear == ()


def of_entries(x: Tensor) -> Tensor:
    """Drops those entries of all rows that are above -2: another row may have another number of them."""
    there = (x.flatten() > -2).nonzero().flatten()
    return torch.zeros(x.numel()).index_put((there,), F.dropout(x.flatten()[there], 0.5)).reshape(x.shape)


def test_a_draw_that_mixes_the_rows_is_unclear() -> None:
    found = traced(lambda x: x + torch.rand(len(x), len(x)).sum())
    assert found.unclear == ("site0",)


def test_a_draw_for_entries_that_are_counted_takes_rows_that_have_as_many() -> None:
    net = Net(of_entries)
    net.linear.weight, net.linear.bias = nn.Parameter(torch.eye(4)), nn.Parameter(torch.zeros(4))
    found = trace(net, ROWS, PICK)
    assert found.layouts == (Layout(0, 4),)
    fewer = Rows.of(ROWS.args[0] - torch.tensor([2.0, 0.0, 0.0, 0.0]))  # one of the first row, none of the second
    with pytest.raises(UncontrolledDraw, match="draws for 7 entries of 2 rows"):
        one_pass(net, fewer, PICK, found, [torch.ones(4)])
    assert trace(net, fewer, PICK).unclear == ("site0",)


def under_a_mask(x: Tensor) -> Tensor:
    """Drops those entries of all rows that are above 0."""
    return x.masked_scatter(x > 0, F.dropout(x[x > 0], 0.5))


def under_lengths(x: Tensor) -> Tensor:
    """Drops the first entries of each row, as many as its numbers say, in torch of Python's slices."""
    counts = [int(count) for count in (x > 0).sum(1).tolist()]
    parts = F.dropout(torch.cat([row[:count] for row, count in zip(x, counts, strict=True)]), 0.5).split(counts)
    return torch.stack([torch.cat([part, row[len(part) :]]) for part, row in zip(parts, x, strict=True)])


@pytest.mark.parametrize("act", [under_a_mask, under_lengths])
def test_entries_whose_number_follows_from_values_have_masks_of_their_own(act: Callable[[Tensor], Tensor]) -> None:
    """Also where the example has as many in each row: other rows may have others, and as many together."""
    net, rows = Net(act), Rows.of(torch.tensor([[1.0, 2.0, -1.0, -2.0], [-1.0, 3.0, -2.0, 1.0]]))
    net.linear.weight, net.linear.bias = nn.Parameter(torch.eye(4)), nn.Parameter(torch.zeros(4))
    found = trace(net, rows, PICK)
    assert found.unclear == ("site0",)
    assert [site.shape for site in found.sites] == [(4,)]


def as_long_as_the_longest(x: Tensor) -> Tensor:
    """Drops steps of all rows, as many as the first number of one of them says."""
    return F.dropout(torch.ones(int(x[:, 0].max()), len(x)), 0.5).sum(0)[:, None] + x


@pytest.mark.parametrize("longest", range(6))
def test_the_axis_of_the_rows_is_told_whichever_of_them_is_the_longest(longest: int) -> None:
    net, x = Net(as_long_as_the_longest), torch.ones(6, 4)
    net.linear.weight, net.linear.bias = nn.Parameter(torch.eye(4)), nn.Parameter(torch.zeros(4))
    x[longest] = 7.0
    found = trace(net, Rows.of(x), PICK)
    assert (found.layouts, found.unclear) == ((Layout(1),), ())
    assert [site.shape for site in found.sites] == [(7,)]
    short = trace(net, Rows.of(torch.ones(6, 4)), PICK)
    assert [site.shape for site in short.sites] == [(1,)]
    assert widened(short, net, Rows.of(x), PICK).sites == found.sites


def test_a_draw_that_is_larger_for_more_rows_is_not_taken_for_one_of_longer_rows() -> None:
    net = Net(lambda x: x + F.dropout(torch.ones(-(-len(x) // 8), 4), 0.5).repeat_interleave(8, 0)[: len(x)])
    with pytest.raises(UncontrolledDraw, match=r"\(3, 4\) for 20 rows and of \(5, 4\) for twice as many"):
        widened(trace(net, ROWS, PICK), net, Rows.of(torch.ones(20, 4)), PICK)


def siamese(x: Tensor) -> Tensor:
    """One layer for the first and the others of three: its entries stand in no order of rows and entries."""
    own = x.reshape(-1, 4, 1)
    first, others = F.dropout(torch.cat([own[:, 0], own[:, 1:].flatten(0, 1)]), 0.5).split([len(x), 3 * len(x)])
    return torch.cat([first, others.reshape(-1, 3)], 1)


def test_a_draw_whose_entries_stand_in_no_order_has_masks_for_each() -> None:
    net = Net(siamese)
    found = trace(net, ROWS, PICK)
    assert found.unclear == ("site0",)
    assert [site.shape for site in found.sites] == [(ROWS.count * 4, 1)]
    masks = torch.arange(1.0, 1 + ROWS.count * 4)[:, None]
    with torch.no_grad():
        passed = one_pass(net, ROWS, PICK, found, [masks]) / net.linear(ROWS.args[0])
    torch.testing.assert_close(passed, 2 * torch.tensor([[1.0, 3, 4, 5], [2, 6, 7, 8]]))


def rows_cut(x: Tensor) -> Tensor:
    return torch.cat([F.dropout(part, 0.5) for part in x.split(8)])


def test_where_rows_are_cut_into_parts_it_is_said_how_many_are_taken() -> None:
    found, many = traced(rows_cut), Rows.of(torch.ones(20, 4))
    with pytest.raises(UncontrolledDraw, match="at most 8 rows at a time"):
        one_pass(Net(rows_cut), many, PICK, found, [torch.ones(4)])


def gated_steps(x: Tensor) -> Tensor:
    """Noise on some entries, the first steps of all rows before the second ones: neither draw shows alone."""
    steps = x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 2)
    steps = steps + torch.randn_like(steps) * (torch.rand_like(steps) < 0.3)
    return steps.reshape(2, -1, 2).transpose(0, 1).reshape(-1, 4)


def test_orders_that_only_show_together_are_told() -> None:
    assert traced(gated_steps).layouts == (Layout(0, 2, outer=2),) * 2


@pytest.mark.parametrize("value", [1e3, 1e4])
def test_an_offset_does_not_hide_an_order(value: float) -> None:
    assert traced(lambda x: by_steps(x) + value).layouts == (Layout(0, 2, outer=2),)


@pytest.mark.parametrize("value", [-1e4, -1e9, float("-inf")])
def test_masked_logits_do_not_hide_an_order(value: float) -> None:
    steps = traced(lambda x: by_steps(x).index_fill(1, torch.tensor([3]), value))
    assert steps.layouts == (Layout(0, 2, outer=2),)


def centred(x: Tensor) -> Tensor:
    dropped = by_steps(x)
    return dropped - dropped.mean(0)


def of_several_rows(x: Tensor) -> Tensor:
    if len(x) < 2:
        raise ValueError("one row")
    return by_steps(x)


@pytest.mark.parametrize("act", [of_several_rows, centred])
def test_an_order_is_told_where_a_row_alone_says_nothing(act: Callable[[Tensor], Tensor]) -> None:
    """It is not taken, or answers otherwise than among others, whatever the order."""
    assert traced(act).layouts == (Layout(0, 2, outer=2),)


def test_a_draw_for_each_row_by_itself_is_refused() -> None:
    with pytest.raises(UncontrolledDraw, match=r"depends on the number of rows.* exclude=\['part'\]"):
        traced(lambda x: torch.stack([F.dropout(row, 0.5) for row in x]))


def test_draws_are_numbered_in_order_with_the_module_that_draws() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2))
            self.shared = self.block[1]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.shared(self.block(F.dropout(x, 0.3)))
            return out + torch.randn_like(x)

    net = Two()
    net.block.train()
    found = trace(net.train(), ROWS, PICK)
    assert [(site.name, site.path, site.kind) for site in found.sites] == [
        ("site0", "", "bernoulli"), ("site1", "block.0", "bernoulli"), ("site2", "block.1", "bernoulli"),
        ("site3", "block.1", "bernoulli"), ("site4", "", "normal"),
    ]  # fmt: skip
    assert [site.p for site in found.sites[:4]] == [0.3, 0.1, 0.2, 0.2]


ESCAPES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "multinomial": (lambda x: x * torch.multinomial(torch.ones(4), 1), "part", "multinomial"),
    "permutation": (lambda x: x[:, torch.randperm(4)], "part", "randperm"),
    "poisson": (lambda x: x * torch.poisson(torch.ones(4)), "part", "poisson"),
    "Tensor.geometric_": (lambda x: x * torch.ones(4).geometric_(0.5), "part", "geometric_"),
    "Tensor.cauchy_": (lambda x: x * torch.ones(4).cauchy_(), "part", "cauchy_"),
}


@pytest.mark.parametrize(("act", "path", "operation"), ESCAPES.values(), ids=ESCAPES)
def test_a_draw_without_a_rule_is_named_with_its_module(
    act: Callable[[Tensor], Tensor], path: str, operation: str
) -> None:
    escaped = traced(act).escaped
    assert {where for where, _ in escaped} == {path}
    assert all(what.startswith(operation) for _, what in escaped)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda x: x * float(np.random.rand()), "numpy.random"),  # noqa: NPY002
        (lambda x: x * __import__("random").random(), "Python's random"),
    ],
    ids=["numpy.random", "random"],
)
def test_a_draw_from_a_foreign_generator_is_noticed(act: Callable[[Tensor], Tensor], named: str) -> None:
    assert {what for _, what in traced(act).escaped} == {named}


def test_tracing_leaves_torchs_generator_as_it_was() -> None:
    net = Net(lambda x: F.dropout(x, 0.5) * torch.multinomial(torch.ones(4), 1))
    before = torch.get_rng_state()
    trace(net, ROWS, PICK)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["seen", "linear.weight"])
def test_a_write_to_the_networks_tensors_is_named_and_does_not_happen(name: str) -> None:
    net = Net(lambda x: F.dropout(x, 0.5))
    target = dict((*net.named_parameters(), *net.named_buffers()))[name]
    before = target.clone()
    net.part.act = lambda x: F.dropout(x, 0.5) + target.add_(1).sum() * 0
    assert trace(net, ROWS, PICK).written == (name,)
    assert torch.equal(target, before)


def test_batch_norms_silent_write_is_noticed() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = net.get_buffer("0.running_mean").clone()
    assert set(trace(net, ROWS, PICK).written) >= {"0.running_mean", "0.running_var"}
    assert torch.equal(net.get_buffer("0.running_mean"), before)


def test_memory_of_a_row_is_that_of_the_largest_result() -> None:
    wide = trace(nn.Sequential(nn.Linear(4, 1000), nn.Dropout(0.5), nn.Linear(1000, 1)).train(), ROWS, PICK)
    assert wide.row_bytes == 1000 * 4


def test_a_number_of_draws_that_is_random_is_refused() -> None:
    def maybe(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) if float(torch.rand(1)) < 0.5 else x

    said = r"which random numbers a pass draws is random itself, after draw 1 of it: .* exclude=\['part'\]"
    with pytest.raises(UncontrolledDraw, match=said):
        traced(maybe)


class Decides(nn.Module):
    """A number says early whether the last of some layers is run."""

    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.read, self.drop = read, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        runs = self.read(torch.rand(1) < 0.5)
        x = self.drop(self.drop(x * (x.sum() < 100).item()))
        return self.drop(x) if runs else x


@pytest.mark.parametrize("read", [bool, Tensor.item, lambda runs: len(runs.nonzero())])
@pytest.mark.parametrize("by_flag", [True, False])
def test_the_draw_that_others_go_by_is_named_and_left_off_where_that_works(
    read: Callable[[Tensor], object], by_flag: bool
) -> None:
    net = Decides(read).train()
    net.training = by_flag
    with pytest.raises(UncontrolledDraw, match=r"after draw 1 of it: .* draws? of the root module") as caught:
        trace(net, ROWS, PICK)
    assert ("exclude=['']" in str(caught.value)) == by_flag
    assert ("exclude leaves it on" in str(caught.value)) != by_flag


def test_one_pass_with_expectations_is_eval() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    found = trace(net, ROWS, PICK)
    with torch.no_grad():
        torch.testing.assert_close(one_pass(net, ROWS, PICK, found, [None]), net[0](ROWS.args[0]))


def test_recording_does_not_write_to_the_rows() -> None:
    x = ROWS.args[0].clone()
    record(Net(lambda h: h), ROWS, PICK, seed=0)
    record(nn.Dropout(0.5, inplace=True).train(), ROWS, PICK, seed=0)
    assert torch.equal(ROWS.args[0], x)
