"""Attention as one operation: torch's numbers, with masks in blocks on a GPU, and in networks of many kinds."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import Operations, apart, loop, passes
from devices import on_each_device
from torch import Tensor, nn

import mcdrop
from mcdrop.attention import run_attention
from mcdrop.blockwise import _one_by_one, attend, takes
from mcdrop.digits import digits

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])

# passes, rows, heads, steps of queries and of keys, units of keys and of values
SIZES = [
    (3, 2, 2, 5, 5, 4, 4),
    (2, 3, 2, 64, 64, 32, 32),
    (2, 1, 1, 70, 130, 20, 12),  # which triton multiplies wrongly in blocks of 64
    (2, 1, 3, 17, 100, 128, 70),
    (2, 2, 1, 300, 300, 128, 128),
    (2, 1, 2, 100, 70, 64, 16),
    (2, 1, 2, 70, 100, 16, 64),
]


def plain(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention in float64, as it is written down."""
    scores = torch.einsum("...ld,...ds->...ls", query.double(), keys.double()) * scale
    scores = scores + (0 if bias is None else bias.double())
    parts = scores.exp()
    return torch.einsum("...ls,...se->...le", parts / parts.sum(-1, keepdim=True) * mask.double(), values.double())


@HERE
@pytest.mark.parametrize("few_digits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_with_a_mask_is_that_of_float64(
    sizes: tuple[int, ...], dtype: torch.dtype, few_digits: bool, device: str
) -> None:
    """With queries of each pass or of all, as views; with a bias for each row, and one that hides steps to come."""
    if device == "cpu" and few_digits:
        pytest.skip("the CPU has one way")
    torch.manual_seed(0)
    t, n, h, length, seen, d, e = sizes
    hidden = torch.zeros(length, seen).masked_fill(torch.ones(length, seen).triu(1).bool(), -torch.inf)
    for each, bias in itertools.product((True, False), (None, hidden, torch.randn(t, n, 1, 1, seen))):
        lead = (t, n) if each else (n,)
        query = torch.randn(*lead, length, h, d).transpose(-2, -3)
        keys, values = torch.randn(t, n, seen, h, d).permute(0, 1, 3, 4, 2), torch.randn(*lead, h, seen, e)
        mask = (torch.rand(t, 1, h, length, seen) > 0.3) * 1.4
        query, keys, values, mask = (one.to(device, dtype) for one in (query, keys, values, mask))
        added = None if bias is None else bias.to(device, dtype)
        expected = plain(query, keys, values, mask, 0.3, added)
        if device == "cpu":
            found = _one_by_one(query, keys, values, mask, 0.3, added)
        else:
            with digits(query.device, tf32=few_digits):
                found = attend(query, keys, values, mask, 0.3, added)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        rounding = 1e-5 if dtype == torch.float32 and not few_digits else 4e-2
        assert apart(found.double().cpu(), expected.cpu()) < rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_row_of_which_all_is_hidden_has_no_numbers_and_leaves_others_alone() -> None:
    query, keys, values, mask = (torch.ones(1, 1, 1, 2, 2, device="cuda") for _ in range(4))
    hidden = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]], device="cuda")
    found = attend(query, keys, values, mask, 1.0, hidden)[0, 0, 0]
    assert found[0].isnan().all()
    assert found[1].tolist() == [1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heads_that_are_too_wide_are_left_to_torch() -> None:
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(takes(device, dtype, *units) for units in ((8, 8), (64, 64), (128, 128), (20, 100)))
        assert not takes(device, dtype, 256, 256)
    assert not takes(torch.device("cpu"), torch.float32, 8, 8)


@on_each_device
def test_attention_without_a_draw_is_torchs_with_any_axes(device: str) -> None:
    """Whatever is the same for all passes, and however many axes there are for them."""
    torch.manual_seed(0)
    for shapes in (
        ((2, 2, 4, 5), (2, 2, 4, 5)),
        ((3, 2, 2, 4, 5), (1, 2, 2, 4, 5)),
        ((1, 2, 2, 4, 5), (3, 2, 2, 4, 5)),
    ):
        query, keys = (torch.randn(shape, device=device) for shape in shapes)
        for mask in (None, torch.randn(4, 4), torch.randn(2, 1, 4, 4), torch.randn(*keys.shape[:-2], 1, 4)):
            given = None if mask is None else mask.to(device)
            found = run_attention(query, keys, keys, given, False, 0.4)
            scores = query @ keys.transpose(-1, -2) * 0.4 + (0 if given is None else given)
            assert apart(found.cpu(), (scores.softmax(-1) @ keys).cpu()) < 1e-5


class Net(nn.Module):
    """Attention of heads (N, 2, 5, 4) after a draw, and before another with a way around it and a norm."""

    def __init__(self, attention: Callable[["Net", Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.three, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 8)
        self.drop, self.norm, self.attention = nn.Dropout(0.2), nn.LayerNorm(8), attention

    def heads(self, x: Tensor) -> list[Tensor]:
        return [one(x).unflatten(-1, (2, 4)).transpose(-2, -3) for one in self.three]

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self, x, *self.heads(self.drop(x)))
        out: Tensor = self.norm(x + self.drop(self.last(h.transpose(-2, -3).flatten(-2))))
        return out.flatten(1)


def _own(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-1, -2) / 2).softmax(-1), 0.1, net.training) @ v


def _both(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.5 + _bias(x)).masked_fill(x[:, None, None, :, 0] > 1, -torch.inf)
    return F.dropout(scores.softmax(-1), 0.1, net.training) @ v


def _one_query(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q[:, :, :1] @ k.transpose(-1, -2) + _bias(x)).softmax(-1), 0.1, net.training) @ v


def _drawn_hidden(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = F.dropout(torch.ones(5, 5, device=x.device), 0.2, net.training) == 0
    scores = (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    return (F.dropout(scores.softmax(-1), 0.1, net.training) @ v).nan_to_num()


def _with_rows(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = net.drop(_own(net, x, q, k, v)) + x.shape[0]
    return out


def _other_axis(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-1, -2) / 2).softmax(-2), 0.1, net.training) @ v


def _read_twice(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout((q @ k.transpose(-1, -2) / 2).softmax(-1), 0.1, net.training)
    return weights @ v + weights.mean()


def _of_torch(**how: Any) -> Callable[[Net, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def attention(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = {name: value(x) if callable(value) else value for name, value in how.items()}
        p = given.pop("p", 0.1) * net.training
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, **given)

    return attention


def _grouped(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def _drawn_mask(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=net.drop(x)[:, None, None, :, 0])


def _mask_alone(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = net.heads(x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=net.drop(x)[:, None, None, :, 0])


def _values_alone(net: Net, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, _ = net.heads(x)
    return F.scaled_dot_product_attention(q, k, v)


def _bias(x: Tensor) -> Tensor:
    return torch.arange(25.0, device=x.device).view(5, 5) / 5


# With a draw in it, whether one kernel does it on a GPU; without one it is torch's own.
DRAWN: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "torch's": (_of_torch(), True),
    "causal": (_of_torch(is_causal=True), True),
    "with a bias": (_of_torch(attn_mask=_bias), True),
    "with hidden steps": (_of_torch(attn_mask=lambda x: (x[:, :, 0] < 1)[:, None, None]), True),
    "with a bias and hidden steps": (_both, True),
    "with a scale": (_of_torch(scale=0.3), True),
    "one's own": (_own, True),
    "of fewer queries than its bias has": (_one_query, False),
    "with hidden steps that are drawn": (_drawn_hidden, True),
    "with the number of rows added": (_with_rows, True),
    "over the other axis": (_other_axis, False),
    "with weights read twice": (_read_twice, False),
}
FIXED: dict[str, Callable[..., Tensor]] = {
    "torch's": _of_torch(p=0.0),
    "causal": _of_torch(p=0.0, is_causal=True),
    "with a bias": _of_torch(p=0.0, attn_mask=_bias),
    "with hidden steps": _of_torch(p=0.0, attn_mask=lambda x: (x[:, :, 0] < 1)[:, None, None]),
    "with a bias that is drawn": _drawn_mask,
    "with heads in groups": _grouped,
    "with values alone drawn": _values_alone,
    "with a bias alone drawn": _mask_alone,
}


def captured(attention: Callable[..., Tensor], device: str) -> tuple[mcdrop.Model, Tensor]:
    torch.manual_seed(0)
    net, x = Net(attention).eval().to(device), torch.randn(7, 5, 8).to(device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows, count in ((7, 5), (1, 3), (4, 1)):
        assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5
    return model, x


@on_each_device
@pytest.mark.parametrize("name", DRAWN)
def test_attention_with_a_draw_is_that_of_the_network(name: str, device: str) -> None:
    """And on a GPU no softmax, sum or norm of layers is left beside the kernels that do them."""
    attention, whole = DRAWN[name]
    model, x = captured(attention, device)
    if device == "cuda":
        with Operations() as ran:
            passes(model, x, 3)
        assert len(ran.named("softmax")) == (0 if whole else 1)
        assert ran.named("layer_norm") == ran.named("aten.mul") == []


@on_each_device
@pytest.mark.parametrize("name", FIXED)
def test_attention_without_a_draw_is_captured(name: str, device: str) -> None:
    captured(FIXED[name], device)


@on_each_device
def test_an_encoder_whose_attention_does_not_drop_is_captured(device: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    layer.dropout1.p = layer.dropout2.p = 0.3
    net, x = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten()).eval().to(device), torch.randn(6, 5, 8)
    model = mcdrop.wrap(net, example=x[:4].to(device))
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert apart(passes(model, x.to(device), 5), loop(model, x.to(device), 5)) < 1e-5
