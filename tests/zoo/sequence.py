"""Attention, transformers and recurrent networks: draws that hide inside fused functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .specimen import ROWS, Built, specimen

WIDTH, HEADS, STEPS = 16, 2, 5
Kind = type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]


def sequences(width: int = WIDTH) -> Tensor:
    return torch.randn(ROWS, STEPS, width)


# Attention.


class Attention(nn.Module):
    """nn.MultiheadAttention over a sequence, then the mean over its steps."""

    def __init__(self, *, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out, _ = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(out.mean(1 if self.batch_first else 0))  # type: ignore[no-any-return]


@specimen(draws=1, note="MultiheadAttention that returns its weights")
def attention_weights() -> Built:
    return Attention(need_weights=True), sequences()


@specimen(draws=1, note="MultiheadAttention by scaled_dot_product_attention")
def attention_fused() -> Built:
    return Attention(need_weights=False), sequences()


@specimen(draws=1, note="MultiheadAttention with the rows on axis 1")
def attention_steps_first() -> Built:
    return Attention(need_weights=False, batch_first=False), sequences()


class HandAttention(nn.Module):
    """Scaled dot product attention with a rate that is 0 in eval, as most model code writes it."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, steps, width = x.shape
        q, k, v = self.qkv(x).view(rows, steps, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        rate = 0.3 if self.training else 0.0
        allowed = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, allowed, dropout_p=rate, is_causal=self.causal)
        return self.head(y.transpose(1, 2).reshape(rows, steps, width).mean(1))  # type: ignore[no-any-return]


@specimen(draws=1, note="dropout_p=p if self.training else 0")
def hand_attention() -> Built:
    return HandAttention(), sequences()


@specimen(draws=1, note="the same, causal")
def hand_attention_causal() -> Built:
    return HandAttention(causal=True), sequences()


@specimen(draws=1, note="the same with a boolean padding mask as a second input")
def hand_attention_padded() -> Built:
    return HandAttention(), (sequences(), torch.arange(STEPS) < torch.tensor([[5], [4], [3], [5]]))


# Transformers.


class Pooled(nn.Module):
    """A network over sequences, the mean over the steps, and a head."""

    def __init__(self, body: nn.Module, *, batch_first: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.batch_first = body, nn.Linear(WIDTH, 3), batch_first

    def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.body(x, *more, **named).mean(1))  # type: ignore[no-any-return]
        turned = [t.transpose(0, 1) for t in (x, *more)]
        return self.head(self.body(*turned).mean(0))  # type: ignore[no-any-return]


def _encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.2, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@specimen(draws=8, note="nn.TransformerEncoder; in eval the fused kernel would skip all of its draws")
def encoder() -> Built:
    return Pooled(_encoder(batch_first=True)), sequences()


@specimen(draws=8, note="the same with a padding mask by keyword")
def encoder_padded() -> Built:
    padding = torch.arange(STEPS) >= torch.tensor([[5], [4], [3], [5]])
    return Pooled(_encoder(batch_first=True)), {"x": sequences(), "src_key_padding_mask": padding}


@specimen(draws=8, note="the same with the rows on axis 1, norm first and gelu")
def encoder_steps_first() -> Built:
    return Pooled(_encoder(norm_first=True, activation="gelu"), batch_first=False), sequences()


@specimen(draws=12, note="nn.TransformerDecoder: self attention and attention to a memory, the second input")
def decoder() -> Built:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.2, batch_first=True)
    return Pooled(nn.TransformerDecoder(layer, 2)), (sequences(), sequences())


@specimen(draws=10, note="nn.Transformer, one layer each way, rows on axis 1")
def transformer() -> Built:
    body = nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.2)
    return Pooled(body, batch_first=False), (sequences(), sequences())


# Recurrent networks.


class Recurrent(nn.Module):
    """A recurrent network of torch and a head on the last step."""

    def __init__(self, kind: Kind, *, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.body = kind(8, WIDTH, dropout=0.3, batch_first=batch_first, **options)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)[0] if self.batch_first else self.body(x.transpose(0, 1))[0].transpose(0, 1)
        return self.head(out[:, -1])  # type: ignore[no-any-return]


def recurrent(kind: Kind, **options: Any) -> Built:
    net, example = Recurrent(kind, **options), sequences(8)
    net(example)  # the head learns its width
    return net, example


@specimen(draws=1, note="nn.LSTM of two layers, dropout between them")
def lstm() -> Built:
    return recurrent(nn.LSTM, num_layers=2)


@specimen(draws=1, note="nn.GRU of two layers")
def gru() -> Built:
    return recurrent(nn.GRU, num_layers=2)


@specimen(draws=1, note="nn.RNN of two layers with relu")
def rnn_relu() -> Built:
    return recurrent(nn.RNN, num_layers=2, nonlinearity="relu")


@specimen(draws=2, note="three bidirectional layers: two draws")
def lstm_bidirectional() -> Built:
    return recurrent(nn.LSTM, num_layers=3, bidirectional=True)


@specimen(draws=1, note="an LSTM with a projection")
def lstm_projected() -> Built:
    return recurrent(nn.LSTM, num_layers=2, proj_size=4)


@specimen(draws=1, note="a GRU with the rows on axis 1")
def gru_steps_first() -> Built:
    return recurrent(nn.GRU, num_layers=2, batch_first=False)


class Packed(nn.Module):
    """Sequences of unequal length, packed; the head sees the last state of each."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.body, self.head = kind(8, WIDTH, 2, dropout=0.3, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return self.head(out.sum(1) / lengths.unsqueeze(1))  # type: ignore[no-any-return]


@specimen(draws=1, note="a packed LSTM: the draw has no axis for the rows")
def lstm_packed() -> Built:
    return Packed(nn.LSTM), (sequences(8), torch.tensor([3, 5, 2, 5]))


@specimen(draws=1, note="a packed GRU")
def gru_packed() -> Built:
    return Packed(nn.GRU), (sequences(8), torch.tensor([3, 5, 2, 5]))


class CellLoop(nn.Module):
    """An LSTMCell stepped by hand, its state dropped at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.head = nn.LSTMCell(8, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], WIDTH)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
            h = self.drop(h)
        return self.head(h)  # type: ignore[no-any-return]


@specimen(draws=STEPS, note="nn.LSTMCell in a loop, one draw at each step")
def lstm_cell_loop() -> Built:
    return CellLoop(), sequences(8)


class OneMask(nn.Module):
    """Variational recurrent dropout: one mask for all steps (Gal and Ghahramani 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], WIDTH)
        mask = F.dropout(torch.ones_like(h), 0.3, self.training)
        for step in x.unbind(1):
            h = self.cell(step, h * mask)
        return self.head(h)  # type: ignore[no-any-return]


@specimen(draws=1, note="nn.GRUCell, one mask for all steps")
def gru_one_mask() -> Built:
    return OneMask(), sequences(8)


class WeightDropped(nn.Module):
    """DropConnect on the recurrent weight of an LSTM (Merity et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.body.get_parameter("weight_hh_l0"), 0.3, self.training)
        out, _ = torch.func.functional_call(self.body, {"weight_hh_l0": weight}, (x,))
        return self.head(out[:, -1])  # type: ignore[no-any-return]


@specimen(draws=1, note="an LSTM whose recurrent weight is dropped, one draw for the whole batch")
def lstm_weight_dropped() -> Built:
    return WeightDropped(), sequences(8)


class Words(nn.Module):
    """Integer inputs, channel dropout on the embedding, a convolution over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(20, 8), nn.Dropout1d(0.3)
        self.conv, self.head = nn.Conv1d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.drop(self.embedding(ids).mT)).relu().amax(-1))  # type: ignore[no-any-return]


@specimen(draws=1, note="integer inputs, Dropout1d on the embedding")
def embedding_dropout1d() -> Built:
    return Words(), torch.randint(20, (ROWS, 7))
