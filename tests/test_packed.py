"""Packed sequences: packing and unpacking by index is torch's own, and the passes of packed rows keep their masks."""

import pytest
import torch
from captures import Operations, apart, backend_of, loop, passes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mcdrop
from mcdrop.errors import ModelRefused
from mcdrop.intercept import Expected, Interception
from mcdrop.rules import RULES

STEPS, UNITS, RATE = 5, 8, 0.4


@given(
    st.lists(st.integers(1, STEPS), min_size=1, max_size=7), st.booleans(), st.sampled_from([(), (2,), (2, 3)]),
    st.integers(0, 2), st.sampled_from([0.0, -1.5]),
)  # fmt: skip
def test_packing_and_unpacking_are_torchs(
    lengths: list[int], batch_first: bool, units: tuple[int, ...], more: int, padding: float
) -> None:
    lead = (len(lengths), STEPS) if batch_first else (STEPS, len(lengths))
    x, total = torch.randn(*lead, *units), max(lengths) + more

    def there_and_back() -> tuple[PackedSequence, Tensor, Tensor]:
        rows = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted=False)
        return rows, *pad_packed_sequence(rows, batch_first, padding, total)

    expected = there_and_back()
    with Interception(Expected(), RULES):
        got = there_and_back()
    for one, other in zip((*got[0], *got[1:]), (*expected[0], *expected[1:]), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize(("lengths", "said"), [([5, 0], "has to be greater than 0"), ([2, 5], "must be sorted")])
def test_what_torch_does_not_pack_is_not_packed(lengths: list[int], said: str) -> None:
    with Interception(Expected(), RULES), pytest.raises(RuntimeError, match=said):
        pack_padded_sequence(torch.randn(2, STEPS, UNITS), torch.tensor(lengths), batch_first=True)


class Packed(nn.Module):
    """A recurrent network over packed rows, dropped between its layers or before it."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between, self.drop = between, nn.Dropout(RATE)
        self.body = nn.LSTM(UNITS, UNITS, 2, dropout=RATE if between else 0.0, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[0],), STEPS)
        rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        if not self.between:
            rows = PackedSequence(self.drop(rows.data), *rows[1:])
        steps = pad_packed_sequence(self.body(rows)[0], batch_first=True)[0]
        return self.head(steps.sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("between", [True, False], ids=["between layers", "before them"])
def test_packed_rows_of_one_length_keep_their_masks(between: bool) -> None:
    """Torch may put rows of one length in any order where there are more than 16, such as rows times passes."""
    torch.manual_seed(0)
    x = torch.randn(9, STEPS, UNITS)
    model = mcdrop.wrap(Packed(between).eval(), example=x[:4])
    got = passes(model, x, 4)
    assert apart(got, loop(model, x, 4)) < 1e-5
    assert apart(passes(model, x[7:8], 4), got[:, 7:8]) < 1e-5
    assert model.audit.tier == "vmap"
    with pytest.raises(ModelRefused, match="packed rows are put in order of their lengths"):
        backend_of(model).run(model.rows(x), 4, only=None, tier="fold")


class Of(nn.Module):
    """A recurrent network over packed rows of the lengths that it is given, dropped between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(UNITS, UNITS, 2, dropout=RATE, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.body(rows)[1][-1])  # type: ignore[no-any-return]


def of(lengths: list[int], x: Tensor) -> mcdrop.Model:
    torch.manual_seed(0)
    return mcdrop.wrap(Of().eval(), example=(x, torch.tensor(lengths)), tuning={})


X = torch.randn(9, 7, UNITS, generator=torch.Generator().manual_seed(1))
SHORT = [3] * 9


@pytest.mark.parametrize("place", [0, 2, 3, 4, 8])
def test_a_longer_row_may_stand_anywhere(place: int) -> None:
    """Its masks are those that it has where the example was as long, also where it is an example's last row."""
    lengths = [*SHORT]
    lengths[place] = 7
    expected = passes(of([7] * 9, X), (X, torch.tensor(lengths)), 5)
    for example in (SHORT, lengths):
        model = of(example, X)
        assert model.audit.warnings == ()
        assert apart(passes(model, (X, torch.tensor(lengths)), 5), expected) < 1e-5
        others = [row for row in range(9) if row != place]
        assert apart(passes(model, (X, torch.tensor(SHORT)), 5)[:, others], expected[:, others]) < 1e-5


def test_answers_of_packed_rows_do_not_follow_what_was_asked_before() -> None:
    """Rows of one shape and several lengths, before and after rows of that shape and one length."""
    mixed, even = (X[:8], torch.arange(7).clamp(1).repeat(2)[:8]), (X[:5], torch.full((5,), 6))
    model, later = of([5] * 9, X[:, :5]), of([5] * 9, X[:, :5])
    one, two = passes(model, mixed, 5), passes(model, even, 5)
    assert torch.equal(passes(model, mixed, 5), one)
    assert apart(passes(later, even, 5), two) < 1e-5
    assert apart(passes(later, mixed, 5), one) < 1e-5
    assert apart(passes(later, (X[3:4], mixed[1][3:4]), 5), one[:, 3:4]) < 1e-5


def test_one_longer_row_of_many_keeps_its_masks() -> None:
    x, lengths = torch.randn(50, 7, UNITS), torch.full((50,), 3)
    lengths[20] = 7
    rows = of([7] * 9, X)
    expected = torch.cat(
        [passes(rows, (one[None], length[None]), 5) for one, length in zip(x, lengths, strict=True)], 1
    )
    assert apart(passes(of(SHORT, X), (x, lengths), 5), expected) < 1e-5


def test_rows_of_a_new_shape_take_no_look_at_each() -> None:
    """Before the first passes of a shape, and for these."""
    model = of([5] * 9, X[:, :5])
    for rows, steps in ((100, 6), (300, 4)):
        x, lengths = torch.randn(rows, steps, UNITS), torch.randint(1, steps + 1, (rows,))
        with Operations() as ran:
            passes(model, (x, lengths), 2)
        assert 0 < len(ran.named("aten._pack_padded_sequence")) < 100
