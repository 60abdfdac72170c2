"""Whatever happens, the user's module, inputs and generators are as they were."""

import contextlib
import copy
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Everything(nn.Module):
    """Dropout of several kinds, a norm, a hook, a parametrization, and plain attributes that a forward changes."""

    scale: Tensor
    lazy: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4, bias=False))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("lazy", None)
        self.calls, self.history, self.cache = 0, [0], {"last": 0}
        self.body[0].register_forward_hook(lambda module, args, output: output + 1)
        self.body.register_forward_pre_hook(lambda module, args: (args[0] * 1,))
        self.body.register_full_backward_hook(lambda module, gradient, given: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        self.cache["last"] = self.calls
        x *= 2  # writes to its input
        h = F.dropout(self.body(x) * self.scale, 0.2, self.training)
        h = self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
        out: Tensor = self.spectral(h)
        return out


class CountsInEval(Everything):
    def forward(self, x: Tensor) -> Tensor:
        self.scale += 1
        return super().forward(x)


class AssignsInEval(Everything):
    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale + 1
        self.lazy = x.mean()
        return super().forward(x)


class Fails(Everything):
    """Raises on its n-th call, of all threads and shadows together."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = iter(range(call - 1))

    def forward(self, x: Tensor) -> Tensor:
        if next(self.left, None) is None:
            raise RuntimeError("the network broke")
        return super().forward(x)


class DrawsInEval(Everything):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5) + torch.rand(2)


class Escapes(Everything):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.multinomial(torch.ones(4), 1)


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything about a module tree that a user could see: identities, contents, order."""
    found: dict[str, Any] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        state = child.__dict__
        found[path] = {
            "class": type(child),
            "identity": id(child),
            "keys": list(state),
            "training": child.training,
            "plain": {
                k: copy.copy(v) for k, v in state.items() if isinstance(v, int | float | str | list | set | dict)
            },
            "identities": {k: id(v) for k, v in state.items() if not isinstance(v, int | float | str)},
            "tensors": {
                k: None if t is None else (id(t), t.requires_grad, t.dtype, t.detach().numpy().tobytes())
                for k, t in (*child._parameters.items(), *child._buffers.items())
            },
            "hooks": {k: list(v.items()) for k, v in state.items() if k.endswith("_hooks") and v is not None},
            "gradients": [p.grad is None for p in child._parameters.values() if p is not None],
        }
    return found


def generators() -> list[Any]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy, dict)
    return [random.getstate(), numpy["state"]["key"].tolist(), numpy["state"]["pos"], torch.get_rng_state().tolist()]


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    before, drawn, grad = fingerprint(module), generators(), torch.is_grad_enabled()
    names = sorted(module.state_dict())
    with contextlib.suppress(mcdrop.errors.MCDropError, RuntimeError):
        yield
    after = fingerprint(module)
    assert after.keys() == before.keys()
    for path in before:
        for what, value in before[path].items():
            assert after[path][what] == value, (path, what)
    assert generators() == drawn
    assert torch.is_grad_enabled() == grad
    assert sorted(module.state_dict()) == names


MAKERS: dict[str, Any] = {
    kind.__name__: kind for kind in (Everything, CountsInEval, AssignsInEval, DrawsInEval, Escapes)
}
MAKERS |= {f"Fails at call {n}": functools.partial(Fails, n) for n in (1, 2, 3, 4, 5, 8, 12, 30, 60, 70, 80, 100)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_network_is_as_it_was_after_any_call(make: Any, mode: bool) -> None:
    net = make().train(mode)
    with untouched(net):
        model = mcdrop.wrap(net, example=X)
        mcdrop.predict(model, X, passes=10, interval="mean")
        mcdrop.predict(model, X[:1], passes=3, seed=4)
    with untouched(net):
        mcdrop.predict(net, X, passes=10)


@pytest.mark.parametrize("x", [X[:, :3], X[:0], [["a"]], np.full((2, 4), np.nan), X[0, 0], (X, X)], ids=str)
def test_a_network_is_as_it_was_after_inputs_that_it_cannot_take(x: Any) -> None:
    net = Everything().train()
    with untouched(net):
        mcdrop.predict(net, x, passes=10)
    model = mcdrop.wrap(net, example=X)
    with untouched(net), pytest.raises(mcdrop.errors.InputError):
        mcdrop.predict(model, x, passes=10)


def test_a_network_in_the_middle_of_training_keeps_its_gradients() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    net(torch.from_numpy(X)).sum().backward()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    mcdrop.predict(net, X, passes=10)
    after = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(after) == len(before) == 4
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 1), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.dropout(x)
        x[0] = 7
        out: Tensor = self.linear(x)
        return out


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(X.copy(), id="array"),
        pytest.param(torch.from_numpy(X).clone(), id="tensor"),
        pytest.param(np.asfortranarray(X).astype(np.float64), id="fortran float64"),
        pytest.param(torch.from_numpy(X).clone().requires_grad_(), id="tensor with a gradient"),
        pytest.param({"x": X.copy()}, id="by name"),
        pytest.param((torch.from_numpy(X).clone(),), id="tuple"),
    ],
)
def test_the_users_input_is_unchanged_by_a_network_that_writes_to_it(x: Any) -> None:
    before = copy.deepcopy(x)
    answers = [mcdrop.predict(WritesToItsInput(), x, passes=10).mean.shape for _ in range(2)]
    assert answers == [(3, 1)] * 2
    for given, kept in zip(*(leaf.values() if isinstance(leaf, dict) else [leaf] for leaf in (x, before)), strict=True):
        left, right = (torch.as_tensor(np.asarray(v.detach() if isinstance(v, Tensor) else v)) for v in (
            given[0] if isinstance(given, tuple) else given, kept[0] if isinstance(kept, tuple) else kept
        ))  # fmt: skip
        assert torch.equal(left, right)


def test_a_read_only_array_can_be_predicted() -> None:
    x = X.copy()
    x.flags.writeable = False
    assert np.isfinite(mcdrop.predict(WritesToItsInput(), x, passes=5).mean).all()


@pytest.mark.parametrize(
    "x",
    [
        X[::-1],
        X[:, ::-1],
        X.astype(">f4"),
        X.astype(np.longdouble),
        X.astype(np.float16),
        np.broadcast_to(X[:1], (3, 4)),
    ],
    ids=["rows reversed", "columns reversed", "another byte order", "long double", "half", "broadcast"],
)
def test_any_array_of_numbers_gives_what_its_plain_copy_gives(x: Any) -> None:
    model = mcdrop.wrap(WritesToItsInput(), example=x)
    one, other = (mcdrop.predict(model, given, passes=5).mean for given in (x, np.array(x, np.float32)))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.bool_])
def test_whole_numbers_are_read_as_real_ones_where_the_network_takes_those(kind: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5))
    model, x = mcdrop.wrap(net, example=X), (X > 0).astype(kind)
    expected = mcdrop.predict(model, x.astype(np.float32), passes=5).mean
    for given in (x, torch.from_numpy(x), x.tolist()):
        np.testing.assert_array_equal(mcdrop.predict(model, given, passes=5).mean, expected)


def test_token_ids_may_come_as_real_tensors_if_they_are_whole() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Dropout(0.5), nn.Flatten())
    model = mcdrop.wrap(net, example=np.array([[1, 2], [3, 4]]))
    ids = torch.tensor([[8.0, 0.0]])
    expected = mcdrop.predict(model, [[8, 0]], passes=5).mean
    np.testing.assert_array_equal(mcdrop.predict(model, ids, passes=5).mean, expected)
    for given in (ids / 3, (ids / 3).numpy()):
        with pytest.raises(mcdrop.errors.InputError, match=r"must be whole numbers, got 2\.666"):
            mcdrop.predict(model, given)


def test_a_network_without_weights_yet_is_refused() -> None:
    with pytest.raises(mcdrop.errors.ModelRefused, match=r"has no weights yet .*run it once"):
        mcdrop.wrap(nn.Sequential(nn.LazyLinear(3), nn.Dropout(0.5)), example=X)


class SetsAnewInTraining(nn.Module):
    """A moving average that training sets anew, beside dropout: the flag is not switched on, nothing is lost."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean(dim=0)
        return x - self.average


def test_a_moving_average_that_is_set_anew_in_training_stays() -> None:
    net = nn.Sequential(SetsAnewInTraining(), nn.Dropout(0.5)).train()
    with untouched(net):
        model = mcdrop.wrap(net, example=X)
    assert model.audit.kept == {"0": "writes to 0.average in training mode"}


def test_passes_that_write_to_a_buffer_in_eval_all_start_from_the_same() -> None:
    for kind in (CountsInEval, AssignsInEval):
        model = mcdrop.wrap(kind().eval(), example=X)
        first, again = (mcdrop.predict(model, X, passes=6, keep_samples=True).samples for _ in range(2))
        assert first is not None
        assert again is not None
        np.testing.assert_array_equal(first, again)
        assert any("scale is written to even in eval mode" in text for text in model.audit.warnings)
