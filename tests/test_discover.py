"""Discovery: what is switched on, what stays in eval, what is refused, and what the refusal says."""

import random
import re
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import in_plain_python
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, ModelRefused, NoStochasticSite, UncontrolledDraw

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    """Linear, then what a test asks for, in a submodule called ``part``."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(4, 4), part

    def forward(self, x: Tensor) -> Any:
        return self.part(self.linear(x))


class Act(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Any:
        return self.act(x, self.training)


def wrapped(act: Any, **options: Any) -> mcdrop.Model:
    return mcdrop.wrap(Net(Act(act)), example=X, **options)


def spread(model: mcdrop.Model) -> float:
    return float(mcdrop.predict(model, X, passes=20).std.max())


# -- what is switched on -----------------------------------------------------------------------------------------------


def test_the_audit_names_each_draw_with_its_module_and_rate() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Sequential(nn.Tanh(), nn.AlphaDropout(0.1)))
    audit = mcdrop.wrap(net, example=X).audit
    assert [(site.path, site.kind, site.p, site.shape, site.verdict) for site in audit.sites] == [
        ("1", "bernoulli", 0.2, (6,), "live"), ("2.1", "bernoulli", 0.1, (6,), "live"),
    ]  # fmt: skip
    assert audit.stochastic == ("1", "2.1")
    assert audit.modules == 6
    assert not audit.mean_preserving  # alpha dropout keeps the variance of its units, not their mean
    assert "2 of 2 random draws live" in str(audit)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_that_the_network_is_in_does_not_matter(mode: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
    expected = mcdrop.predict(net.eval(), X, passes=20)
    np.testing.assert_array_equal(mcdrop.predict(net.train(mode), X, passes=20).mean, expected.mean)


NORMS = {
    "BatchNorm1d": nn.BatchNorm1d(4),
    "InstanceNorm1d": nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "LazyBatchNorm1d after a batch": nn.LazyBatchNorm1d(),
    "BatchNorm1d with dropout": nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3)),
}  # fmt: skip


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_keep_their_running_statistics_and_use_them(norm: nn.Module) -> None:
    """The passes average to dropout around the norm in eval: its masks in closed form."""
    torch.manual_seed(0)
    net = nn.Sequential(norm, nn.Dropout(0.5)).train()
    for _ in range(5):
        net(torch.randn(20, 4) * 3 + 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = mcdrop.wrap(net, example=X)
    passes = model.backend.forward(model.rows(X), 30, seed=0, start=0, sampler="iid")
    with torch.no_grad():
        base = net[0].eval()(X).numpy()
    if not any(isinstance(module, nn.Dropout) for module in norm.modules()):
        kept = passes != 0
        np.testing.assert_allclose(passes[kept], np.broadcast_to(2 * base, passes.shape)[kept], rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert any("norm" in reason for reason in model.audit.kept.values())


def test_a_training_flag_that_changes_the_output_without_a_draw_stays_off() -> None:
    net = nn.Sequential(nn.Dropout(0.5), Act(lambda x, on: x * 100 if on else x))
    model = mcdrop.wrap(net, example=X)
    assert model.audit.kept == {"1": "computes something else in training mode, without a draw"}
    assert np.abs(mcdrop.predict(model, X, passes=20).mean).max() <= 2


def test_an_auxiliary_head_of_training_stays_off() -> None:
    net = Net(Act(lambda x, on: (F.relu(x), x) if on else F.relu(x)))
    both = nn.Sequential(nn.Dropout(0.5), net)
    assert mcdrop.wrap(both, example=X).audit.kept == {"1.part": "returns something else in training mode"}


@pytest.mark.parametrize("rate", [1e-4, 0.9999])
def test_rare_and_frequent_drops_are_live(rate: float) -> None:
    assert len(mcdrop.wrap(nn.Sequential(nn.Linear(4, 1), nn.Dropout(rate)), example=X).audit.live) == 1


def test_the_user_can_exclude_and_include() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.5))
    assert [site.path for site in mcdrop.wrap(net, example=X, exclude=["0"]).audit.live] == ["1"]
    assert [site.path for site in mcdrop.wrap(net, example=X, exclude=[nn.AlphaDropout]).audit.live] == ["0"]
    with pytest.raises(InputError, match="no module of the network matches 'nope'"):
        mcdrop.wrap(net, example=X, exclude=["nope"])
    with pytest.raises(NoStochasticSite, match="excluded by the user"):
        mcdrop.wrap(net, example=X, exclude=["0", "1"])


# -- nothing random ----------------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[nn.Module, str]] = {
    "no dropout at all": (nn.Linear(4, 1), "no draw at all"),
    "a rate of 0": (nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.0)), "1: bernoulli, its drop rate is 0"),
    "a rate no mask has": (nn.Sequential(nn.Linear(4, 1), nn.Dropout(1e-10)), "its drop rate is 1e-10: all passes"),
    "all dropped after it": (
        nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3), nn.Dropout(1.0), nn.Linear(3, 1)),
        "0: bernoulli, no mask on it changes the output; 2: bernoulli, its drop rate is 1",
    ),
    "dropout after the output is taken": (
        Net(Act(lambda x, on: (F.dropout(x, 0.5, on), x)[1])), "part: bernoulli, no mask on it changes the output",
    ),
    "dropout times 0": (Net(Act(lambda x, on: x + 0 * F.dropout(x, 0.5, on))), "part: bernoulli, no mask on it"),
    "dropout switched off by hand": (Net(Act(lambda x, on: F.dropout(x, 0.5, False))), "switched off in part"),
    "only a norm": (nn.BatchNorm1d(4), "running statistics stay frozen"),
}  # fmt: skip


@pytest.mark.parametrize(("net", "said"), NOTHING.values(), ids=NOTHING)
def test_a_network_without_a_live_draw_is_refused(net: nn.Module, said: str) -> None:
    with pytest.raises(NoStochasticSite) as caught:
        mcdrop.wrap(net, example=X)
    text = str(caught.value)
    assert said in text
    assert "no live stochastic site" in text
    assert "Train it with dropout" in text
    with pytest.raises(NoStochasticSite):
        mcdrop.predict(net, X)


def test_dropout_switched_off_by_hand_can_be_forced() -> None:
    assert spread(wrapped(lambda x, on: F.dropout(x, 0.5, False), force_literal=True)) > 0


# -- draws out of control ----------------------------------------------------------------------------------------------

ESCAPES = {
    "torch.multinomial": (lambda x: x[:, torch.multinomial(torch.ones(4), 1)], r"multinomial\S* in part"),
    "torch.randperm": (lambda x: x[:, torch.randperm(4)], r"randperm\S* in part"),
    "numpy.random": (lambda x: x * float(np.random.rand()), "numpy.random"),  # noqa: NPY002
    "random": (lambda x: x * random.random(), "Python's random"),
}


@pytest.mark.parametrize(("draw", "said"), ESCAPES.values(), ids=ESCAPES)
@pytest.mark.parametrize("in_eval_too", [False, True])
def test_a_draw_that_no_mask_controls_is_refused_by_name(draw: Any, said: str, in_eval_too: bool) -> None:
    """Also beside a dropout that is under control: the answers could not be repeated."""

    def act(x: Tensor, on: bool) -> Tensor:
        out: Tensor = draw(x) if on or in_eval_too else x
        return out + F.dropout(x, 0.5, on)

    with pytest.raises(UncontrolledDraw) as caught:
        wrapped(act)
    text = str(caught.value)
    assert re.search(said, text)
    assert "draws random numbers that no mask controls" in text
    assert "torch.bernoulli" in text


OWN = {
    "numpy Generator": np.random.default_rng(0).random,
    "in plain Python": in_plain_python(0).__next__,
    "Random": random.Random(0).random,
    "SystemRandom": random.SystemRandom().random,
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("in_eval_too", [False, True])
def test_a_generator_of_the_networks_own_is_refused(own: Any, in_eval_too: bool) -> None:
    """No global state moves and torch sees no draw; of some only the answers tell."""

    def alone(x: Tensor, on: bool) -> Tensor:
        return x * own() if on or in_eval_too else x

    def beside(x: Tensor, on: bool) -> Tensor:
        return F.dropout(alone(x, on), 0.5, on)

    said = "a generator out of sight|a numpy.random.Generator|a random.Random"
    for act in (beside, alone):
        net = nn.Sequential(Net(Act(act)), nn.Dropout(0.5))
        with pytest.raises(UncontrolledDraw, match=said):
            mcdrop.wrap(net, example=X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_of_the_last_digits_is_refused_too(dtype: torch.dtype) -> None:
    """Of 16 bits they are larger than what other kernels may change, and yet the same when they are done again."""
    own = in_plain_python(0)

    def noisy(x: Tensor, on: bool) -> Tensor:
        every = F.dropout(x, 0.5, on).sum(1, keepdim=True) * x  # moved by any mask
        noise = np.reshape([next(own) - 0.5 for _ in range(x.numel())], x.shape)
        return every + 3 + torch.as_tensor(noise * 1.4e-2, dtype=dtype)

    rows = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    with pytest.raises(UncontrolledDraw, match="a generator out of sight"):
        mcdrop.wrap(nn.Sequential(nn.Linear(4, 4), Act(noisy)).to(dtype), example=rows.to(dtype))


def test_a_torch_generator_of_the_networks_own_is_under_control() -> None:
    generator = torch.Generator()
    before = generator.get_state()
    for act in (
        lambda x, on: F.dropout(x, 0.5, on) + torch.rand(4, generator=generator),
        lambda x, on: F.dropout(x, 0.5, on) + torch.empty(4).uniform_(generator=generator),
        lambda x, on: F.dropout(x, 0.5, on) * torch.bernoulli(torch.full((4,), 0.5), generator=generator),
    ):
        model = wrapped(act)
        first, again = (mcdrop.predict(model, X, passes=10).mean for _ in range(2))
        np.testing.assert_array_equal(first, again)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kept", [True, False], ids=["seeded again", "made anew"])
def test_a_generator_that_every_pass_seeds_gives_no_random_numbers(kept: bool) -> None:
    own = torch.Generator()

    def projected(x: Tensor, on: bool) -> Tensor:
        generator = (own if kept else torch.Generator()).manual_seed(0)
        return F.dropout(x @ torch.randn(4, 4, generator=generator), 0.5, on)

    with pytest.raises(UncontrolledDraw, match="a generator that every pass seeds anew are always the same: keep"):
        wrapped(projected)
    own.manual_seed(0)  # before the first pass, and never again
    before = own.get_state()
    assert len(wrapped(lambda x, on: F.dropout(x, 0.5, on) + torch.randn(4, generator=own)).audit.live) == 2
    assert torch.equal(own.get_state(), before)


# -- examples that do not fit ------------------------------------------------------------------------------------------


def test_an_example_that_the_network_cannot_take_is_refused_with_its_shape() -> None:
    with pytest.raises(InputError, match=r"cannot take these inputs \(0: \(3, 4\) torch.float32\)"):
        mcdrop.wrap(nn.Sequential(nn.Linear(5, 1), nn.Dropout(0.5)), example=X)


def test_functions_that_run_out_of_sight_are_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match=r"^the network calls torch's 'cond', whose functions run out of sight"):
        wrapped(lambda x, on: torch.cond(x.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (F.dropout(x, 0.5, on),)))


def test_what_a_network_compiles_is_captured_as_it_stands() -> None:
    def act(x: Tensor, on: bool) -> Tensor:
        return F.dropout(x.relu() + 1, 0.5, on)

    spreads = []
    for one in (act, torch.compile(act, backend="eager")):
        torch.manual_seed(0)
        model = wrapped(one)
        assert model.audit.tier == "captured"
        spreads.append(spread(model))
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-6)


def test_a_compiled_function_that_must_be_one_graph_is_taken_or_refused_with_a_remedy() -> None:
    """Torch 2.11 runs it as it stands where others look on, torch 2.13 refuses to."""
    act = torch.compile(lambda x, on: F.dropout(x.relu() + 1, 0.5, on), backend="eager", fullgraph=True)
    said = ""
    try:
        wrapped(act)
    except InputError as refused:
        said = str(refused)
    assert re.fullmatch(r"(the network cannot take these inputs .{,300}set_stance\('force_eager'\).{,60})?", said)
    with torch.compiler.set_stance("force_eager"):
        assert wrapped(act).audit.tier == "captured"


OUTPUTS = {
    "a sum over the rows": lambda x, on: F.dropout(x, 0.5, on).sum(dim=0),
    "a single number": lambda x, on: F.dropout(x, 0.5, on).sum(),
    "rows last": lambda x, on: F.dropout(x, 0.5, on).t(),
}


@pytest.mark.parametrize("act", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_without_rows_is_refused(act: Any) -> None:
    with pytest.raises(InputError, match="its first axis must be the rows"):
        wrapped(act)


def test_several_outputs_need_a_choice() -> None:
    net = Net(Act(lambda x, on: {"a": F.dropout(x, 0.5, on), "b": x * 2}))
    with pytest.raises(InputError, match="the network returns several outputs; choose one with output=: a, b"):
        mcdrop.wrap(net, example=X)
    with pytest.raises(InputError, match="the network returns no output 'c'; choose one with output=: a, b"):
        mcdrop.wrap(net, example=X, output="c")
    with pytest.raises(NoStochasticSite):
        mcdrop.wrap(net, example=X, output="b")
    for output in ("a", 0, lambda result: result["a"]):
        assert spread(mcdrop.wrap(net, example=X, output=output)) > 0
    both = namedtuple("both", ["plain", "dropped"])
    fields = Net(Act(lambda x, on: both(x * 2, F.dropout(x, 0.5, on))))
    with pytest.raises(InputError, match="choose one with output=: plain, dropped"):
        mcdrop.wrap(fields, example=X)
    for output in ("dropped", 1):
        assert spread(mcdrop.wrap(fields, example=X, output=output)) > 0
    pair = Net(Act(lambda x, on: (x * 2, F.dropout(x, 0.5, on))))
    assert spread(mcdrop.wrap(pair, example=X, output=1)) > 0
    alone = Net(Act(lambda x, on: (torch.arange(len(x)), F.dropout(x, 0.5, on))))
    assert spread(mcdrop.wrap(alone, example=X)) > 0


@pytest.mark.parametrize(("output", "said"), [(None, "several outputs; choose"), ("c", "no output 'c'; choose")])
def test_of_token_ids_the_error_of_whole_numbers_is_told(output: str | None, said: str) -> None:
    """Whole numbers are tried as real ones too, which an embedding does not take: that says nothing."""
    table = nn.Embedding(9, 4)
    net = Act(lambda x, on: {"a": F.dropout(table(x), 0.5, on), "b": table(x)})
    ids = torch.arange(12).reshape(4, 3) % 9
    with pytest.raises(InputError, match=said):
        mcdrop.wrap(net, example=ids, output=output)
    with pytest.raises(InputError, match=r"cannot take these inputs .*int64.*: index out of range"):
        mcdrop.wrap(net, example=ids + 9, output="a")
    assert len(mcdrop.wrap(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), example=ids).audit.live) == 1


def test_every_refusal_is_an_error_of_this_library() -> None:
    assert issubclass(NoStochasticSite, ModelRefused)
    assert issubclass(UncontrolledDraw, ModelRefused)
    assert issubclass(ModelRefused, mcdrop.errors.MCDropError)


class FewNumbers(nn.Module):
    """Draws so few numbers that another draw may be the same, or the network may see no difference in its opposite."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(4, 2), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.layer(x))


FEW_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "an even function of a normal": lambda h: h * torch.randn(1).abs(),
    "squares of one for each row": lambda h: h * torch.randn(len(h), 1).square(),
    "the sign alone": lambda h: h * torch.randn(len(h), 1).sign(),
    "one keeps all": lambda h: h * (torch.rand(()) > 0.3),
    "a row at a time": lambda h: F.dropout(h.new_ones(len(h), 1), 0.01) * h,
}


@pytest.mark.parametrize("answer", FEW_NUMBERS.values(), ids=FEW_NUMBERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_draw_of_few_numbers_is_seen_to_be_live(answer: Callable[[Tensor], Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    model = mcdrop.wrap(FewNumbers(answer), example=torch.randn(4, 4))
    assert [site.verdict for site in model.audit.sites] == ["live"] * len(model.audit.sites)


def test_each_of_many_draws_in_a_row_is_live_though_no_unit_passes_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Dropout(0.8) for _ in range(12)), nn.Linear(4, 1)).eval()
    model = mcdrop.wrap(net, example=torch.randn(4, 4))
    graph = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="onnx"))
    for one in (model, graph):
        assert [site.verdict for site in one.audit.sites] == ["live"] * 12
