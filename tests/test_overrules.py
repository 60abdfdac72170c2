"""What users may overrule: the probe's verdicts, literal switches, layers and functions out of sight, memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, NoStochasticSite, UncontrolledDraw


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x).relu(), 0.3, training=False))  # type: ignore[no-any-return]


class Drawn(nn.Module):
    """Draws with numpy, out of torch's sight."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.from_numpy(np.random.binomial(1, 0.8, tuple(x.shape))).float() / 0.8  # noqa: NPY002


class Switched(nn.Module):
    """Drops by a flag of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mc = False

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3) if self.mc else x


def chain(*middle: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 32), *middle, nn.Linear(32, 2)).eval()


def rows() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def test_a_literal_false_is_respected_until_it_is_forced() -> None:
    with pytest.raises(NoStochasticSite, match="force_literal=True"):
        mcdrop.wrap(Literal(), example=rows())
    model = mcdrop.wrap(Literal(), example=rows(), force_literal=True)
    assert [site.p for site in model.audit.live] == [0.3]
    assert mcdrop.predict(model, rows()).std.min() > 0


@pytest.mark.parametrize("which", ["1", nn.Dropout])
def test_an_excluded_module_does_not_draw(which: str | type) -> None:
    net = chain(nn.Dropout(0.3), nn.AlphaDropout(0.3))
    model = mcdrop.wrap(net, example=rows(), exclude=[which])
    alone = mcdrop.wrap(chain(nn.Identity(), nn.AlphaDropout(0.3)), example=rows())
    assert [site.path for site in model.audit.live] == ["2"]
    assert model.audit.kept["1"] == "excluded by the user"
    ours, theirs = (mcdrop.predict(m, rows(), seed=3) for m in (model, alone))
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5)


def test_a_single_path_or_type_is_one_path_or_type() -> None:
    net = chain(nn.Dropout(0.3), *(nn.Identity() for _ in range(9)), nn.AlphaDropout(0.3))
    for which in ("11", nn.AlphaDropout, ["11", "11"]):
        kept = mcdrop.wrap(net, example=rows(), exclude=which, tuning={}).audit
        assert [site.path for site in kept.live] == ["1"]
    assert "11" in mcdrop.wrap(net, example=rows(), include="11", tuning={}).audit.stochastic


@pytest.mark.parametrize("which", [3, None, [nn.Dropout(0.3)], [["1"]]])
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_an_overrule_that_is_neither_path_nor_type_is_an_error(name: str, which: Any) -> None:
    with pytest.raises(InputError, match=rf"{name} takes paths as in named_modules\(\) or types of modules, got"):
        mcdrop.wrap(chain(nn.Dropout(0.3)), example=rows(), **{name: which})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tuning": 3}, "tuning must be a dict .*, got 3"),
        ({"task": ["regression"]}, r"unknown task \['regression'\]; choose one of"),
        ({"precision": ["fp32"]}, r"unknown precision \['fp32'\]; choose one of"),
        ({"example": rows().to_sparse()}, "an example must be dense, got a tensor of layout torch.sparse_coo"),
        ({"example": {"input": rows().to_sparse()}}, "an example must be dense, got a tensor of layout"),
        ({"memory": np.float64(9)}, "memory must be 'auto' or a whole number"),
    ],
)
def test_what_wrap_cannot_read_is_said(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mcdrop.wrap(chain(nn.Dropout(0.3)), **{"example": rows(), "tuning": {}, **asked})


def test_memory_may_be_a_whole_number_of_numpy() -> None:
    model = mcdrop.wrap(chain(nn.Dropout(0.3)), example=rows(), memory=np.int64(10**6), tuning={})  # type: ignore[arg-type]
    assert model.backend.chunk_bytes == 10**6


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">i8"])
def test_the_order_of_an_examples_bytes_is_not_the_models(dtype: str) -> None:
    whole = np.arange(8).reshape(2, 4)
    swapped, native = (
        mcdrop.wrap(chain(nn.Dropout(0.3)), example=whole.astype(kind), tuning={})
        for kind in (dtype, np.dtype(dtype).newbyteorder("="))
    )
    assert swapped.inputs == native.inputs
    ours, theirs = (mcdrop.predict(model, whole.astype(dtype), passes=4).mean for model in (swapped, native))
    np.testing.assert_array_equal(ours, theirs)


def test_an_included_module_is_in_training_whatever_the_probe_says() -> None:
    net = chain(nn.BatchNorm1d(32), nn.Dropout(0.3))
    model = mcdrop.wrap(net, example=rows(), include=["1"], strict=False)
    assert "1" in model.audit.stochastic


def test_an_overrule_that_names_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="no module of the network matches 'nowhere'"):
        mcdrop.wrap(chain(nn.Dropout(0.3)), example=rows(), exclude=["nowhere"])


def test_partial_coverage_is_an_error_and_a_warning_where_asked() -> None:
    net = chain(nn.Dropout(0.3), Drawn())
    with pytest.raises(UncontrolledDraw, match=r"numpy.random.*mcdrop.register"):
        mcdrop.wrap(net, example=rows())
    model = mcdrop.wrap(net, example=rows(), strict=False)
    assert any("numpy.random" in warning for warning in model.audit.warnings)


@pytest.fixture
def taught() -> Iterator[None]:
    """Forgets afterwards what a test has taught."""
    yield
    for target in (Drawn, Switched, torch.multinomial):
        mcdrop.unregister(target)


def as_torch(layer: nn.Module, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x, 0.8)) / 0.8


@pytest.mark.usefixtures("taught")
def test_a_taught_layer_is_controlled_and_the_users_own_stays() -> None:
    net = chain(Drawn())
    mcdrop.register(Drawn, as_torch)
    model = mcdrop.wrap(net, example=rows())
    assert [site.path for site in model.audit.live] == ["1"]
    first, again = (mcdrop.predict(model, rows(), seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.mean, again.mean)
    assert "forward" not in vars(net[1])  # type: ignore[index]
    mcdrop.unregister(Drawn)
    with pytest.raises(UncontrolledDraw):
        mcdrop.wrap(net, example=rows())


@pytest.mark.usefixtures("taught")
def test_a_taught_flag_is_set_on_the_shadow_alone() -> None:
    net = chain(Switched())
    with pytest.raises(NoStochasticSite):
        mcdrop.wrap(net, example=rows())
    mcdrop.register(Switched, flags={"mc": True})
    model = mcdrop.wrap(net, example=rows())
    assert len(model.audit.live) == 1
    assert net[1].mc is False  # type: ignore[index]
    with torch.no_grad():
        np.testing.assert_allclose(model.backend.deterministic(model.rows(rows())), net(rows()).numpy(), rtol=1e-6)


class Sampled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.multinomial(torch.ones(x.shape[-1]), x.shape[-1] // 2, replacement=True)
        return x * torch.bincount(kept, minlength=x.shape[-1]).clamp(max=1)


@pytest.mark.usefixtures("taught")
def test_a_taught_function_is_controlled() -> None:
    net = chain(Sampled())
    with pytest.raises(UncontrolledDraw, match="multinomial"):
        mcdrop.wrap(net, example=rows())

    def even(weights: Tensor, count: int, replacement: bool = False) -> Tensor:
        return (torch.rand(count) * len(weights)).long()

    mcdrop.register(torch.multinomial, even)
    model = mcdrop.wrap(net, example=rows())
    assert [site.kind for site in model.audit.live] == ["uniform"]


@pytest.mark.parametrize(
    ("given", "said"), [((Drawn,), "forward function or flags"), ((torch.multinomial,), "another function")]
)
def test_teaching_nothing_is_an_error(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mcdrop.register(*given)


class Hungry(nn.Module):
    """Has memory for so many rows at a time and no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.body, self.most, self.refused = chain(nn.Dropout(0.3)), most, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (said this network)")
        return self.body(x)  # type: ignore[no-any-return]


def test_out_of_memory_halves_until_it_fits_and_changes_no_answer() -> None:
    x = torch.randn(41, 4, generator=torch.Generator().manual_seed(2))
    net = Hungry(most=10**6)
    whole = mcdrop.predict(mcdrop.wrap(net, example=x[:4]), x)
    net = Hungry(most=7)
    model = mcdrop.wrap(net, example=x[:4])
    before = model.backend.chunk_bytes
    halved = mcdrop.predict(model, x)
    np.testing.assert_allclose(halved.mean, whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(halved.variance, whole.variance, rtol=1e-4, atol=1e-7)
    assert model.backend.chunk_bytes < before


def test_memory_is_a_number_of_bytes() -> None:
    net = chain(nn.Dropout(0.3))
    small = mcdrop.wrap(net, example=rows(), memory=10_000)
    assert small.backend.chunk_bytes == 10_000
    large = mcdrop.wrap(net, example=rows())
    ours, theirs = (mcdrop.predict(model, rows()).mean for model in (small, large))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for wrong in (0, -1, 2.5, "much", True):
        with pytest.raises(InputError, match="memory must be 'auto' or a whole number of bytes"):
            mcdrop.wrap(net, example=rows(), memory=wrong)  # type: ignore[arg-type]


class Longer(nn.Module):
    """Drops more of longer rows; a dropout before them draws only there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if x.shape[1] > 6:
            h = F.dropout(h, 0.5, self.training)
        h = F.dropout(h, 0.0 if x.shape[1] < 6 else 0.2, self.training)
        return F.dropout(h, 0.1 if x.shape[1] < 8 else 0.0, self.training).mean((1, 2))


def test_what_is_left_off_is_told_for_each_shape_of_rows() -> None:
    """The first draw of a shape may be live where that of another drops nothing, and have another rate."""
    torch.manual_seed(0)
    net = Longer().eval()
    model = mcdrop.wrap(net, example=torch.randn(4, 5, 2))
    for length, rates in ((5, [0.1]), (6, [0.2, 0.1]), (7, [0.5, 0.2, 0.1]), (8, [0.5, 0.2])):
        x = torch.randn(4, length, 2)
        alone = mcdrop.wrap(net, example=x)
        assert [site.p for site in alone.audit.live] == rates
        ours, theirs = (mcdrop.predict(m, x, passes=50) for m in (model, alone))
        np.testing.assert_allclose(ours.variance, theirs.variance, rtol=1e-4)


class Shy(nn.Module):
    """Drops nothing of short rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.0 if x.shape[1] < 6 else 0.3, self.training).mean((1, 2))


def test_rows_of_a_shape_that_nothing_is_dropped_of_are_refused() -> None:
    model = mcdrop.wrap(Shy().eval(), example=torch.randn(4, 7, 2))
    assert mcdrop.predict(model, torch.randn(3, 9, 2)).std.min() > 0
    with pytest.raises(InputError, match=r"no draw of the network is on for inputs of the shape \(3, 5, 2\)"):
        mcdrop.predict(model, torch.randn(3, 5, 2))
