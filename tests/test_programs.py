"""Programs that torch exported for one number of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError
from mcdrop.quiet import quiet

EXPORTED = 5

Kind = Any  # a class of recurrent layers, which torch has not typed


class _Recurrent(nn.Module):
    """A recurrent layer and a line, from blank states of its own or of torch's, or from learned ones."""

    def __init__(self, kind: Kind, start: str, *, rows_first: bool = True) -> None:
        super().__init__()
        self.layer = kind(3, 4, 2, dropout=0.4, batch_first=rows_first)
        self.other = kind(4, 4, 2, batch_first=rows_first) if start == "shared" else None
        self.line = nn.Linear(4, 1)
        self.learned = nn.Parameter(torch.randn(2, 1, 4))
        self.start, self.rows_first = start, rows_first

    def forward(self, x: Tensor) -> Tensor:
        starts: dict[str, Any] = {
            "none": lambda: None,
            "shared": lambda: torch.zeros(2, len(x), 4).to(x.device),
            "like": lambda: x.new_zeros(2, len(x), 4),
            "learned": lambda: self.learned.expand(2, len(x), 4).contiguous(),
        }
        state = starts[self.start]()
        if isinstance(self.layer, nn.LSTM) and state is not None:
            state = (state, state)
        steps = self.layer(x if self.rows_first else x.transpose(0, 1), state)[0]
        steps = steps if self.other is None else self.other(steps, state)[0]
        output: Tensor = self.line(steps[:, -1] if self.rows_first else steps[-1])
        return output


def _fixed(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """The file that ``torch.export`` writes where nobody says that the rows are free."""
    path = folder / "net.pt2"
    with quiet():
        torch.export.save(torch.export.export(module.eval(), (x,)), path)
    return path


@pytest.mark.parametrize(
    ("kind", "start", "rows_first"), [(nn.LSTM, "none", False), (nn.RNN, "like", True), (nn.GRU, "shared", True)]
)
def test_blank_states_of_one_number_of_rows_take_any(kind: Kind, start: str, rows_first: bool, tmp_path: Path) -> None:
    """Torch checks no states: with those of the exported rows it wrote past their end, and the process died."""
    torch.manual_seed(0)
    module, x = _Recurrent(kind, start, rows_first=rows_first), torch.randn(EXPORTED, 2, 3)
    loaded = mcdrop.load(_fixed(module, x, tmp_path), example=x)
    more, wrapped = torch.randn(EXPORTED + 1, 2, 3), mcdrop.wrap(module, example=x)
    found, expected = (mcdrop.predict(model, more, passes=3) for model in (loaded, wrapped))
    assert np.allclose(found.mean, expected.mean, atol=1e-5)
    assert np.allclose(found.std, expected.std, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_other_states_of_one_number_of_rows_are_refused(kind: Kind, tmp_path: Path) -> None:
    x = torch.randn(EXPORTED, 2, 3)
    with pytest.raises(InputError, match=r"states for 5 rows and got \d.*dynamic_shapes=\(\{0: torch\.export\.Dim"):
        mcdrop.load(_fixed(_Recurrent(kind, "learned"), x, tmp_path), example=x)


class _Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.line = nn.Dropout(0.4), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.line(self.drop(x.reshape(x.shape[0], -1)))
        return output


def test_a_program_that_holds_its_number_of_rows_says_how_to_free_them(tmp_path: Path) -> None:
    x = torch.randn(EXPORTED, 2, 3)
    path = _fixed(_Holds(), x, tmp_path)
    with pytest.raises(InputError, match=r"exported for 5 rows and takes no others.*Dim\('rows'\).*not len\(x\)"):
        mcdrop.load(path, example=x)
    wrong = {"finite": x * torch.nan, "2, 4": torch.randn(5, 2, 4), "inputs": (x, x)}
    for why, example in wrong.items():  # which no other export would take either
        with pytest.raises(InputError, match=why) as caught:
            mcdrop.load(path, example=example)
        assert "exported for" not in str(caught.value)


def test_a_program_that_takes_any_rows_is_not_blamed_for_another_error(tmp_path: Path) -> None:
    x = torch.randn(EXPORTED, 3)
    path = _fixed(nn.Sequential(nn.Dropout(0.4), nn.Linear(3, 1)), x, tmp_path)
    with pytest.raises(InputError) as caught:
        mcdrop.load(path, example=x, task="gaussian")
    assert "exported for" not in str(caught.value)


def test_a_program_of_one_number_of_rows_that_holds_it_nowhere_takes_any(tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Linear(4, 1)), torch.randn(EXPORTED, 3)
    loaded, more = mcdrop.load(_fixed(module, x, tmp_path), example=x), torch.randn(EXPORTED + 2, 3)
    found, expected = (mcdrop.predict(model, more, passes=9) for model in (loaded, mcdrop.wrap(module, example=x)))
    assert np.allclose(found.mean, expected.mean, atol=1e-6)
