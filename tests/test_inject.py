"""Dropout put into networks that were trained without any."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, NoStochasticSite, UnknownName
from mcdrop.inject import CRITERIA, KINDS


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.branch(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def network() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual().eval(), torch.randn(6, 3, 8, 8)


def placed(kind: str) -> dict[str, Any]:
    """Where a kind fits this network; the linear layer is its only one, and so must be named."""
    return {} if kind in ("dropblock", "dropconnect", "dropout2d") else {"where": ["branch"]}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_injected_network_draws_and_keeps_every_weight(kind: str) -> None:
    net, x = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    keys = [sorted(vars(module)) for module in net.modules()]
    injected = mcdrop.inject(net, kind=kind, p=0.2, **placed(kind))
    model = mcdrop.wrap(injected, example=x)
    assert model.audit.live
    assert mcdrop.predict(model, x).std.min() > 0
    assert all(ours is theirs for ours, theirs in zip(injected.parameters(), net.parameters(), strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert [sorted(vars(module)) for module in net.modules()] == keys
    assert all(not module._forward_hooks for module in net.modules())
    with pytest.raises(NoStochasticSite):
        mcdrop.wrap(net, example=x)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_with_its_draws_off_an_injected_network_is_the_old_one(kind: str) -> None:
    net, x = network()
    injected = mcdrop.inject(net, kind=kind, p=0.2, **placed(kind))
    with torch.no_grad():
        torch.testing.assert_close(injected.eval()(x), net(x), rtol=0, atol=0)


def test_dropout_injected_before_a_linear_layer_has_its_closed_form() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = nn.Linear(4, 50), nn.Linear(50, 1)
    net, x, p = nn.Sequential(first, second).eval(), torch.eye(4), 0.3
    found = mcdrop.predict(mcdrop.inject(net, p=p), x, passes=4000, sampler="iid")
    with torch.no_grad():
        # inverted dropout on h: Var[w . h] = p / (1 - p) sum w^2 h^2 (Srivastava et al. 2014, section 9)
        variance = p / (1 - p) * (first(x).square() @ second.weight.square().T)
    relative = np.sqrt(2 / 4000)  # one standard error of a normal's variance
    np.testing.assert_allclose(found.variance, variance.numpy(), rtol=4 * relative)


def test_the_audit_calls_it_uncalibrated_until_it_is_calibrated() -> None:
    net, x = network()
    model = mcdrop.wrap(mcdrop.inject(net, kind="dropout2d", p=0.2), example=x)
    assert model.audit.injected == "dropout2d with p=0.2 at stem"
    assert "injected, uncalibrated" in str(model.audit)
    held = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = net(held).numpy()
    calibrated = model.with_calibration(mcdrop.calibrate(model, held, y))
    assert "injected, calibrated" in str(calibrated.audit)


def test_where_chooses_by_path_or_by_function() -> None:
    net, x = network()
    by_path = mcdrop.wrap(mcdrop.inject(net, kind="dropout2d", where=["stem", "branch"]), example=x)
    by_type = mcdrop.wrap(mcdrop.inject(net, kind="dropout2d", where=lambda _, m: isinstance(m, nn.Conv2d)), example=x)
    assert [site.path for site in by_path.audit.live] == ["stem", "branch"]
    assert by_type.audit.live == by_path.audit.live


@pytest.mark.parametrize("where", ["10", ["10", "10"]])
def test_a_single_path_is_one_path_and_a_path_given_twice_drops_once(where: Any) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    model = mcdrop.wrap(mcdrop.inject(net, where=where), example=torch.ones(2, 4))
    assert [site.path for site in model.audit.live] == ["10"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kind": "nope"}, "choose one of: dropblock"),
        ({"p": 0.0}, "between 0 and 1, got 0.0"),
        ({"p": 1.0}, "between 0 and 1, got 1.0"),
        ({"p": "0.1"}, "p must be a number between 0 and 1, got '0.1'"),
        ({"where": ["nowhere"]}, "no module 'nowhere'"),
        ({"where": "nowhere"}, "no module 'nowhere'"),
        ({"where": [3]}, r"where takes paths as in named_modules\(\), got 3"),
        ({"where": nn.Conv2d}, r"where takes no types; .* isinstance\(layer, Conv2d\)"),
        ({"kind": ["dropout"]}, r"unknown kind of injection \['dropout'\]"),
        ({"kind": "dropout"}, "needs two of Linear"),
        ({"kind": "stochastic_depth"}, "say where"),
        ({"kind": "dropconnect", "where": [""]}, "fits Linear and Conv2d layers, not Residual"),
    ],
)
def test_what_cannot_be_injected_is_said(asked: dict[str, Any], said: str) -> None:
    net, _ = network()
    with pytest.raises(InputError, match=said):
        mcdrop.inject(net, **asked)


def held_out() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """An exact linear network and targets with the spread that dropout of 0.2 gives it, times a little."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 200), nn.Linear(200, 1)).eval()
        x = torch.randn(400, 4)
        with torch.no_grad():
            h = net[0](x)
            y = net[1](nn.functional.dropout(h, 0.2, training=True))  # a mask of its own for every row
    return net, x.numpy(), y.numpy()


@pytest.mark.statistical
def test_the_likelihood_finds_the_rate_that_made_the_data() -> None:
    net, x, y = held_out()
    best, values = mcdrop.choose_rate(net, x, y, rates=(0.02, 0.2, 0.6))
    assert best == 0.2
    assert values[0.2] == max(values.values())


@pytest.mark.statistical
def test_coverage_finds_it_too() -> None:
    net, x, y = held_out()
    assert mcdrop.choose_rate(net, x, y, rates=(0.02, 0.2, 0.6), criterion="coverage")[0] == 0.2


@pytest.mark.parametrize(
    ("y", "said"),
    [
        ([0, 1, 2, -1], "labels must be whole numbers from 0 to 2, got -1"),
        ([0, 1, 2, 3], "labels must be whole numbers from 0 to 2, got 3"),
        ([0, 1, 2, 0.5], "labels must be whole numbers from 0 to 2, got 0.5"),
        ([0, 1], r"labels must have the shape \(4,\)"),
    ],
)
def test_labels_that_do_not_fit_choose_no_rate(y: Any, said: str) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    with pytest.raises(InputError, match=said):
        mcdrop.choose_rate(net, torch.ones(4, 2), y, rates=[0.1], task="classification", passes=4)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize(
    ("y", "said"),
    [
        ([[0, 1], [np.nan, 1], [2, 3]], "targets must be finite numbers; row 1 holds nan"),
        ([[0, 1, 2], [3, 4, 5]], r"targets must have the shape \(3, 2\) of the outputs, got \(2, 3\)"),
    ],
)
def test_targets_that_do_not_fit_choose_no_rate(criterion: str, y: Any, said: str) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with pytest.raises(InputError, match=said):
        mcdrop.choose_rate(net, torch.ones(3, 2), y, rates=[0.1], criterion=criterion, passes=4)


def test_targets_that_say_the_same_give_the_same_likelihood() -> None:
    net = mcdrop.inject(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)).eval(), p=0.3)
    x, labels = torch.eye(2).repeat(3, 1), np.array([0, 1, 2, 0, 1, 2])
    classifier = mcdrop.wrap(net, example=x, task="classification", tuning={})
    chances = mcdrop.predict(classifier, x, passes=4).mean
    by_hand = np.log([row[label] for row, label in zip(chances, labels, strict=True)]).mean()
    for y in (labels, labels[:, None], torch.tensor(labels)):
        assert CRITERIA["likelihood"](classifier, x, y, 0.9, 4, 0) == pytest.approx(by_hand)
    model, learnt = mcdrop.wrap(net, example=x, tuning={}), torch.arange(18.0, requires_grad=True).reshape(6, 3)
    ours, theirs = (CRITERIA["likelihood"](model, x, y, 0.9, 4, 0) for y in (learnt, learnt.detach().numpy()))
    assert ours == theirs


@pytest.mark.parametrize(
    ("rates", "said"), [([], "holds no drop rate"), (0.1, "must be a list of drop rates"), (["0.1"], "got '0.1'")]
)
def test_rates_that_are_none_are_refused(rates: Any, said: str) -> None:
    net, x, y = held_out()
    with pytest.raises(InputError, match=said):
        mcdrop.choose_rate(net, x, y, rates=rates)


def test_an_unknown_criterion_is_named() -> None:
    net, x, y = held_out()
    with pytest.raises(UnknownName, match=", ".join(sorted(CRITERIA))):
        mcdrop.choose_rate(net, x, y, criterion="luck")


@pytest.mark.parametrize("kind", ["dropout", "stochastic_depth"])
def test_of_several_tensors_of_a_layer_the_first_is_dropped(kind: str) -> None:
    """As an LSTM gives its output beside its states: by hand from the injected layer and the one below it."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.line = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.line(self.layer(x)[0][:, -1])
            return output

    net, x = Recurrent().eval(), torch.randn(64, 2, 3)
    injected = mcdrop.inject(net, kind=kind, p=0.5, where="layer")
    assert mcdrop.predict(mcdrop.wrap(injected, example=x), x, passes=20).std.min() > 0
    with torch.no_grad():
        output, states = injected.train().get_submodule("layer")(x)
        whole, own = net.get_submodule("layer")(x)
    kept = output != 0
    assert not kept.all()
    torch.testing.assert_close(output[kept], 2 * whole[kept])
    torch.testing.assert_close(states, own)


def test_a_layer_that_gives_no_tensor_is_named() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.line = Named(), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.line(self.layer(x)["x"])
            return output

    with pytest.raises(InputError, match="after Named, which gives dict and no tensor; choose another layer"):
        mcdrop.wrap(mcdrop.inject(Net(), where="layer"), example=torch.randn(4, 3))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_injected_network_is_saved_and_copied_with_what_was_put_into_it(kind: str, tmp_path: Path) -> None:
    net, x = network()
    injected = mcdrop.inject(net, kind=kind, p=0.2, **placed(kind))
    torch.save(injected, tmp_path / "net.pth")
    read = torch.load(tmp_path / "net.pth", weights_only=False)
    models = [mcdrop.wrap(one, example=x, tuning={}) for one in (injected, read, copy.deepcopy(injected))]
    assert len({model.audit.injected for model in models}) == 1
    first, *others = [mcdrop.predict(model, x, passes=16) for model in models]
    assert first.std.min() > 0
    for other in others:
        np.testing.assert_array_equal(other.variance, first.variance)


def test_the_audit_names_what_was_put_into_a_part_and_in_two_turns() -> None:
    part = mcdrop.inject(mcdrop.inject(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), p=0.2), kind="dropconnect")
    model = mcdrop.wrap(nn.Sequential(part, nn.Linear(2, 1)), example=torch.ones(2, 4), tuning={})
    assert model.audit.injected == "dropout with p=0.2 at 0; dropconnect with p=0.1 at 0, 1"


def test_a_loaded_model_is_still_called_injected(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(40, 4)
    model = mcdrop.wrap(mcdrop.inject(net, p=0.2), example=x[:4], tuning={})
    fitted = mcdrop.calibrate(model, x, x[:, :1], passes=4)
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="onnx"))
    held = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "2", format="onnx", calibration=fitted))
    assert loaded.audit.injected == held.audit.injected == model.audit.injected is not None
    assert "injected, uncalibrated" in str(loaded.audit)
    assert "injected, calibrated" in str(held.audit)
