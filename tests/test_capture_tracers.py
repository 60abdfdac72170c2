"""What torch's tracers do not take, or take only where they ask as an exporter does, and is captured all the same."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import apart, loop, passes
from devices import on_each_device
from torch import Tensor, nn

import mcdrop
from mcdrop.capture import _TELLING


class Body(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))


def check_captured(made: Callable[[], nn.Module], device: str) -> None:
    """Captured, and equal to the loop for several rows and for one."""
    torch.manual_seed(0)
    net, x = made().to(device), torch.randn(9, 4, device=device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows in (x, x[:1]):
        assert apart(passes(model, rows, 4), loop(model, rows, 4)) < 1e-5


class Peeking(Body):
    """Looks into its mask to save work, as attention in transformers does, but not where a graph is asked for."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not mask.all():
            x = x * mask[:, None]
        out: Tensor = self.body(x)
        return out


@pytest.mark.parametrize("kept", [1.0, 0.0], ids=["nothing masked", "a row masked"])
def test_who_looks_into_a_mask_but_not_for_an_exporter_is_captured_for_all_masks(kept: float) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(9, 4), torch.ones(9)
    mask[2] = kept
    model = mcdrop.wrap(Peeking(), example={"x": x[:4], "mask": mask[:4]})
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert not torch.compiler.is_compiling()
    for last in (1.0, 0.0):
        mask[8] = last
        rows = {"x": x, "mask": mask}
        assert apart(passes(model, rows, 4), loop(model, rows, 4)) < 1e-5


COUNTING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shaped": lambda x, h: h.reshape(len(x), -1),
    "flattened": lambda x, h: h.reshape(-1).view(len(x), 6),
    "made": lambda x, h: h + torch.ones(len(h), 6).to(h) + torch.full((len(x), 1), 0.5).to(h),
    "numbered": lambda x, h: h[torch.arange(len(x), device=h.device)],
    "cut": lambda x, h: torch.cat([h, h.square()])[len(x) :],
    "twice": lambda x, h: h.repeat(2, 1).view(2, len(x), 6).mean(0),
    "by shape": lambda x, h: h + torch.ones(x.shape[0], 1).to(h),
}


class Counting(Body):
    """Asks for the number of rows as a number."""

    def __init__(self, count: Callable[[Tensor, Tensor], Tensor], sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.count = count
        for size in sizes:
            self.register_buffer(f"of_{size}", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body[2](self.count(x, self.body[1](self.body[0](x.view(len(x), 4)))))
        return out


@pytest.mark.parametrize("count", COUNTING.values(), ids=COUNTING)
@on_each_device
def test_who_asks_for_the_number_of_rows_is_captured_for_any(
    count: Callable[[Tensor, Tensor], Tensor], device: str
) -> None:
    torch.manual_seed(0)
    net, x = Counting(count).to(device), torch.randn(70, 4, device=device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows in (1, 2, 31, 70):
        assert apart(passes(model, x[:rows], 4), loop(model, x[:rows], 4)) < 1e-5


@pytest.mark.parametrize(
    "net",
    [
        Counting(lambda x, h: h * (2 if len(x) > 20 else 1)),
        Counting(lambda x, h: h * (2 if len(x) > 65 else 1)),
        Counting(COUNTING["shaped"], _TELLING),
        Counting(lambda x, h: torch.cat([h[i : i + 1] for i in range(len(h))])),
    ],
    ids=["decides by few", "decides by many", "no number tells it", "goes row by row"],
)
def test_where_a_number_of_rows_cannot_be_told_the_network_itself_runs(net: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "vmap", model.audit.tier_reason
    for rows in (1, 31, 70):
        assert apart(passes(model, x[:rows], 4), loop(model, x[:rows], 4)) < 1e-5


@on_each_device
def test_who_asks_for_the_number_of_rows_is_halved_too(device: str) -> None:
    torch.manual_seed(0)
    net, x = Counting(COUNTING["made"]).to(device), torch.randn(20, 4, device=device)
    expected = passes(mcdrop.wrap(net, example=x[:4]), x, 4)
    assert apart(passes(mcdrop.wrap(net, example=x[:4], precision="bf16"), x, 4), expected) < 3e-2


ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU,
    nn.SiLU, lambda inplace: nn.Threshold(0.1, -0.2, inplace),
]  # fmt: skip


@pytest.mark.parametrize("make", ACTIVATIONS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before the draw", "after it"])
@on_each_device
def test_an_activation_may_write_over_what_is_read_again(
    make: Callable[..., nn.Module], after: bool, device: str
) -> None:
    class Net(Body):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.linear, self.drop = make(inplace=True), nn.Linear(4, 4), nn.Dropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            h = self.drop(h) if after else h
            self.act(h)  # its answer is left lying
            out: Tensor = self.body(h)
            return out

    torch.manual_seed(0)
    net, x = Net().to(device), torch.randn(9, 4, device=device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert apart(passes(model, x, 4), loop(model, x, 4)) < 1e-5


@pytest.mark.parametrize(("shape", "groups"), [((6,), 2), ((6, 5), 1), ((6, 5), 6), ((6, 4, 3), 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@on_each_device
def test_groups_of_channels_are_normalised_after_a_draw(
    shape: tuple[int, ...], groups: int, affine: bool, device: str
) -> None:
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(groups, 6, affine=affine), torch.randn(9, *shape, device=device)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    last = nn.Linear(math.prod(shape), 2)
    net = nn.Sequential(nn.Dropout(0.4), norm, nn.Tanh(), nn.Flatten(), last).to(device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert apart(passes(model, x, 4), loop(model, x, 4)) < 1e-5


@pytest.mark.parametrize("axis", [{"dim": -1}, {"axis": -1}, {"dim": 1}], ids=str)
def test_a_cache_that_begins_empty_is_added_to(axis: dict[str, Any]) -> None:
    class Cached(Body):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body[1](self.body[0](x))
            out: Tensor = torch.cat([torch.tensor([]), h, h.square()], **axis)
            return out.sum(-1, keepdim=True)

    torch.manual_seed(0)
    x = torch.randn(9, 4)
    model = mcdrop.wrap(Cached(), example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert apart(passes(model, x, 4), loop(model, x, 4)) < 1e-5


def _indexed(x: Tensor) -> list[Tensor]:
    """Reads and writes at places that are the same for all rows, or that follow from a row."""
    own = (x.detach() > 0).long()
    same = torch.tensor([[2, 0, 1]]).to(x.device).expand(x.shape[0], 3)
    scattered = torch.zeros_like(x).scatter(1, same, x[:, :3]), x.scatter_add(-1, own, x), x.scatter(1, same, 0.5)
    written = torch.zeros(x.shape[0], 4).to(x).scatter_(1, own, x), x.clone().scatter_add_(dim=-1, index=own, src=x)
    selected = x.index_select(-1, own.new_tensor([3, 0])), torch.index_select(x, dim=1, index=own.new_tensor([1]))
    gathered = x.gather(1, own), torch.gather(x, dim=-1, index=same)
    return [*scattered, *written, *selected, *gathered]


@pytest.mark.parametrize("after", [True, False], ids=["after a draw", "before it"])
@on_each_device
def test_places_within_a_row_are_read_by_index(after: bool, device: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            h = torch.cat(_indexed(self.drop(h) if after else h), 1)
            out: Tensor = self.last(h if after else self.drop(h))
            return out

    check_captured(Net, device)


def test_places_and_products_are_captured_in_a_program(tmp_path: Path) -> None:
    class Net(Body):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.pairs, self.last = nn.GroupNorm(2, 4), nn.Bilinear(4, 4, 2), nn.Linear(28, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.4, self.training)
            other = self.norm(x)
            alike, sums = (
                F.cosine_similarity(x, other)[:, None],
                torch.baddbmm(x[:, None], x[:, :1, None], other[:, None]),
            )
            where = (x.detach() > 0).long()
            read = [x.gather(1, where), x.index_select(1, where.new_tensor([3, 0])), x.scatter_add(1, where, x)]
            read += [x.scatter(1, where, other), x.scatter(1, where, 0.5), self.pairs(x, other)]
            out: Tensor = self.body(self.last(torch.cat([*read, alike, sums.flatten(1), x[:, :3]], 1)))
            return out

    torch.manual_seed(0)
    x = torch.randn(9, 4)
    model = mcdrop.wrap(Net().eval(), example=x[:4])
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="pt2"))
    assert loaded.audit.tier == model.audit.tier == "captured", loaded.audit.tier_reason
    assert apart(passes(loaded, x, 4), loop(model, x, 4)) < 1e-5


def test_rows_that_are_read_by_index_are_not_taken_for_places_within_one() -> None:
    class FirstRow(Body):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body[1](self.body[0](x))
            first = h.gather(0, torch.zeros(1, 6, dtype=torch.long)) + h.index_select(0, torch.tensor([0]))
            out: Tensor = self.body[2](h + first)
            return out

    torch.manual_seed(0)
    x = torch.randn(9, 4)
    model = mcdrop.wrap(FirstRow(), example=x[:4])
    for rows in (x, x[:1]):
        assert apart(passes(model, rows, 4), loop(model, rows, 4)) < 1e-5


def _causal(count: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(count)


class Words(nn.Module):
    """Torch's own layers over words, the mask of what is padding made from the words."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.last = kind, nn.Embedding(20, 8), nn.Linear(8, 2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.both = nn.Transformer(8, 2, 1, 1, 16, 0.3, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        x, padding = self.embed(words), words.eq(0)
        if self.kind == "attention with its weights":
            x, weights = self.attention(x, x, x, key_padding_mask=padding)
            x = x + weights.amax(-1, keepdim=True)
        elif self.kind == "encoder":
            x = self.encoder(x, src_key_padding_mask=padding)
        elif self.kind == "encoder that looks back":
            x = self.encoder(x, mask=_causal(words.shape[1]).to(x.device))
        else:
            masks = {"src_key_padding_mask": padding, "tgt_mask": _causal(words.shape[1]).to(x.device)}
            x = self.both(x, x, **masks)
        out: Tensor = self.last(x.masked_fill(padding[..., None], 0).sum(1))
        return out


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    "kind", ["attention with its weights", "encoder", "encoder that looks back", "encoder and decoder"]
)
@on_each_device
def test_torchs_own_layers_over_words_are_captured(kind: str, device: str) -> None:
    torch.manual_seed(0)
    words = torch.randint(1, 20, (9, 5), device=device)
    net = Words(kind).to(device).eval()
    model = mcdrop.wrap(net, example=words[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    words[1, 3:], words[7, 2:] = 0, 0
    for rows in (words, words[7:8]):
        assert apart(passes(model, rows, 4), loop(model, rows, 4)) < 1e-5


@on_each_device
def test_products_of_rows_with_themselves_and_with_weights_are_captured(device: str) -> None:
    class Net(Body):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(13, 4)
            self.classes, self.pairs = nn.Parameter(torch.randn(6, 4)), nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(self.first(x))
            other = h.flip(1).tanh()
            sums = torch.baddbmm(h[:, None], h[:, :1, None], other[:, None], beta=0.5, alpha=2.0).flatten(1)
            alike = F.cosine_similarity(h, other)[:, None], F.cosine_similarity(h[:, None], self.classes, -1)
            out: Tensor = self.body(self.last(torch.cat([sums, *alike, self.pairs(h, other)], 1)))
            return out

    check_captured(Net, device)
