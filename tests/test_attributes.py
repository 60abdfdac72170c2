"""What a network keeps beside its weights and buffers: tensors that passes read."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captures import apart, backend_of, loop, passes
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError
from mcdrop.features import tensors_digest


class Keeping(nn.Module):
    """Keeps tensors as plain attributes: positions, an order of steps, and what the last forward saw."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(4, 2)
        self.positions, self.order, self.last = torch.randn(5, 4), torch.tensor([3, 0, 1]), torch.zeros(0)
        self.view = self.one.weight.data[:1]

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.drop(self.one(x)) + self.positions + self.view
        out: Tensor = self.two(self.last[:, self.order])
        return out.flatten(1)


def test_tensors_that_are_kept_as_attributes_are_followed() -> None:
    """Written to in place they are seen at once; what a forward leaves behind makes no new plan."""
    torch.manual_seed(0)
    net, x = Keeping().eval(), torch.randn(9, 5, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    plans = dict(backend_of(model).plans._plans)
    writes: list[Callable[[], Tensor]] = [
        lambda: net.positions.mul_(-2),
        lambda: net.order.copy_(net.order.flip(0)),
        lambda: net.view.add_(1),
    ]
    for write in writes:
        before = passes(model, x[:5], 4)
        write()
        after = passes(model, x[:5], 4)
        assert apart(after, before) > 1e-3
        for rows in (5, 9, 1):
            assert apart(passes(model, x[:rows], 3), loop(model, x[:rows], 3)) < 1e-5
        with torch.no_grad():
            assert apart(mcdrop.predict(model, x, passes=2).deterministic, net(x)) < 1e-5
    assert backend_of(model).plans._plans == plans


OFFSET = torch.tensor([0.5, -1.0])


class Reading(nn.Module):
    """Reads tensors from lists, tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop = nn.Linear(4, 8), nn.Dropout(0.4)
        self.listed, self.named = [torch.randn(2, 8)], {"bias": [torch.randn(2)]}
        self.orders = (torch.tensor([1, 0]),)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(self.drop(self.one(x)), self.listed[0], self.named["bias"][0])
        return out[:, self.orders[0]] + torch.tensor([0.0, 1.0])


def reading() -> tuple[nn.Module, list[Tensor]]:
    """Gives a network, and the tensors that it reads from what it keeps."""
    torch.manual_seed(0)
    net = Reading().eval()
    return net, [net.listed[0], net.named["bias"][0]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensors_in_lists_and_dicts_are_part_of_captured_passes(precision: str) -> None:
    net, tensors = reading()
    x, near = torch.randn(9, 4), 1e-5 if precision == "fp32" else 3e-2
    model = mcdrop.wrap(net, example=x[:4], precision=precision)
    assert model.audit.tier == "captured", model.audit.tier_reason
    plans = dict(backend_of(model).plans._plans)
    for tensor in tensors:
        before, held = passes(model, x, 4), tensor.clone()
        tensor.mul_(-1.5)
        assert apart(passes(model, x, 4), before) > 1e-2
        assert apart(passes(model, x, 4), loop(model, x, 4)) < near
        tensor.copy_(held)
    assert backend_of(model).plans._plans == plans


def test_several_devices_follow_tensors_in_lists() -> None:
    net, tensors = reading()
    x = torch.randn(8, 4)
    one, two = (mcdrop.wrap(net, example=x[:4], devices=devices) for devices in ((), ("cpu", "cpu")))
    tensors[-1].add_(1)
    ours, theirs = (mcdrop.predict(model, x, passes=20).mean for model in (one, two))
    assert apart(ours, theirs) < 1e-6


def test_what_a_training_step_left_on_a_network_does_not_keep_it_from_being_copied() -> None:
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(6), torch.randn(8, 5, 4)
    net = nn.Sequential(Keeping(), norm)
    net(x).sum().backward()
    assert net[0].last.grad_fn is not None
    one, two = (mcdrop.wrap(net, example=x[:4], devices=devices) for devices in ((), ("cpu", "cpu")))
    assert apart(*(mcdrop.predict(model, x, passes=20).mean for model in (one, two))) < 1e-6
    recalibrated = mcdrop.recalibrate_batchnorm(one, x).get_submodule("1")
    assert apart(recalibrated.running_var, norm.running_var) > 1e-3


def test_a_tensor_from_outside_of_the_network_may_be_another_one_later() -> None:
    """Nothing says where it stands, so that passes run the network's own code, which reads the one of today."""
    shifts = SimpleNamespace(now=OFFSET)

    class Shifted(Reading):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x) * shifts.now
            return out

    torch.manual_seed(0)
    net, x = Shifted().eval(), torch.randn(9, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier != "captured"
    before = passes(model, x, 4)
    shifts.now = OFFSET * 2
    assert apart(passes(model, x, 4), before * 2) < 1e-6


class Caching(nn.Module):
    """Keeps positions for the last shape of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(4, 2)
        self.size: tuple[int, ...] = ()
        self.positions = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, 4)
        if self.size != tuple(x.shape[1:3]):
            self.size = tuple(x.shape[1:3])
            down, across = torch.arange(self.size[0]), torch.arange(self.size[1])
            self.positions = (down[:, None] * 10.0 + across).reshape(-1, 1).expand(-1, 4).sin()
        out: Tensor = self.two(self.drop(self.one(x)).flatten(1, 2) + self.positions)
        return out.mean(1)


def test_what_a_forward_keeps_for_rows_of_another_shape_is_not_mixed_up() -> None:
    """Both shapes have as many places, so that only the numbers differ; and neither is planned again."""
    torch.manual_seed(0)
    net = Caching().eval()
    wide, high = torch.randn(6, 2, 8, 4), torch.randn(6, 8, 2, 4)
    model = mcdrop.wrap(net, example=wide[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    first = [passes(model, x, 3) for x in (wide, high)]
    plans = dict(backend_of(model).plans._plans)
    for _ in range(2):
        for x, before in zip((wide, high), first, strict=True):
            assert np.array_equal(passes(model, x, 3), before)
            assert apart(before, loop(mcdrop.wrap(net, example=x[:4]), x, 3)) < 1e-5
    assert backend_of(model).plans._plans == plans


def test_known_shapes_are_answered_while_others_are_captured() -> None:
    torch.manual_seed(0)
    net, x = Caching().eval(), torch.randn(3, 2, 2, 4)
    model = mcdrop.wrap(net, example=x)
    expected, wrong, done = passes(model, x, 3), list[object](), threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                wrong.extend([] if np.array_equal(passes(model, x, 3), expected) else ["another answer"])
            except Exception as error:
                wrong.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for width in range(3, 8):
        passes(model, torch.randn(3, 2, width, 4), 3)
    done.set()
    asking.join()
    assert wrong == []


@pytest.mark.parametrize("kept", [torch.eye(3).to_sparse(), torch.zeros(2, device="meta")])
def test_a_tensor_of_another_kind_may_be_kept(kept: Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(4, 2)).eval()
    net.__dict__["kept"] = kept
    assert mcdrop.wrap(net, example=torch.randn(3, 4)).audit.tier == "captured"


class Scaled(nn.Module):
    """Scales its output by a tensor that no state dict holds."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 1))
        if buffer:
            self.register_buffer("scale", torch.ones(1), persistent=False)
        else:
            self.scale = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) * self.scale
        return out


@pytest.mark.parametrize("buffer", [True, False], ids=["a buffer", "an attribute"])
def test_what_was_fitted_sees_tensors_that_no_state_dict_holds(buffer: bool, tmp_path: Path) -> None:
    """Scores again where they have changed: of rows and references ten times as large p-values are the same."""
    torch.manual_seed(0)
    net, x = Scaled(buffer).eval(), torch.randn(60, 4)
    model = mcdrop.wrap(net, example=x[:4])
    calibration = mcdrop.calibrate(model, x, torch.randn(60, 1))
    screen = mcdrop.fit_screen(model, x[:40], fpr=0.05)
    before = mcdrop.predict(model, x[40:], screen=screen).p_value
    net.scale.mul_(10)
    np.testing.assert_array_equal(mcdrop.predict(model, x[40:], screen=screen).p_value, before)
    with pytest.raises(InputError, match="calibrate again"):
        mcdrop.predict(model, x, calibration=calibration)
    net.scale.div_(10)
    upper = mcdrop.predict(model, x, calibration=calibration).upper
    loaded = mcdrop.load(mcdrop.save(model.with_calibration(calibration), tmp_path / "net" / "1"))
    np.testing.assert_allclose(mcdrop.predict(loaded, x, interval="conformal").upper, upper, rtol=1e-5)
    again = mcdrop.load(mcdrop.save(loaded, tmp_path / "net" / "2"))
    assert again.digest == loaded.digest == model.digest


class Around(nn.Module):
    """Multiplies rows, after a dropout of 0.3, by a tensor that is kept in one of several ways."""

    around: Tensor

    def __init__(self, around: Tensor, kept: str, outputs: int = 0) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        if kept == "parameter":
            self.around = nn.Parameter(around, requires_grad=False)
        elif kept == "attribute":
            self.around = around
        else:
            self.register_buffer("around", around, persistent=kept == "buffer")
        self.head = nn.Linear(around.shape[0], outputs) if outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((self.around @ self.drop(x).T).T)
        return out


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("kept", ["buffer", "parameter", "attribute"])
def test_sparse_tensors_have_no_memory_of_their_own_and_do_no_harm(layout: str, kept: str) -> None:
    """Of y = A m(x) with inverted dropout the variance is p / (1 - p) (A * A) (x * x), whatever A is kept as."""

    dense, x = torch.randn(7, 7).relu(), torch.randn(4, 7)
    around = dense.to_sparse_csr() if layout == "csr" else dense.to_sparse()
    found = mcdrop.predict(Around(around, kept), x, passes=4000, sampler="iid")
    variance = 0.3 / 0.7 * x.square() @ dense.square().T
    np.testing.assert_allclose(found.mean, x @ dense.T, atol=5 * float(variance.max() / 4000) ** 0.5)
    np.testing.assert_allclose(found.variance, variance, rtol=0.15, atol=1e-6)  # 5 standard errors: kurtosis below 3


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("kept", ["buffer", "unsaved buffer", "parameter", "attribute"])
def test_what_was_fitted_sees_the_numbers_of_sparse_tensors(layout: str, kept: str) -> None:
    torch.manual_seed(0)
    x, dense = torch.randn(60, 4), torch.randn(4, 4).relu()
    net = Around(dense.to_sparse_csr() if layout == "csr" else dense.to_sparse(), kept, 1)
    model = mcdrop.wrap(net, example=x[:4])
    first, screen = model.digest, mcdrop.fit_screen(model, x, fpr=0.05)
    calibration = mcdrop.calibrate(model, x, torch.randn(60, 1))
    assert mcdrop.predict(model, x, screen=screen, calibration=calibration).lower is not None
    with torch.no_grad():
        net.around.mul_(2)
    assert model.digest != first
    with pytest.raises(InputError, match="calibrate again"):
        mcdrop.predict(model, x, calibration=calibration)
    with torch.no_grad():
        net.around.mul_(0.5)
    assert model.digest == first


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_a_digest_names_sparse_tensors_by_their_layout_indices_and_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).to(dtype)
    other, less = tensor.clone(), tensor.clone()
    other[0, 1], other[0, 2], less[1, 3] = 0, 1, 0
    kinds = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
    found = {tensors_digest({"a": sparse(kind, one)}) for kind in kinds for one in (tensor, other, less)}
    assert len(found) == 3 * len(kinds)
    assert tensors_digest({"a": sparse("sparse_csr", tensor)}) in found


def sparse(kind: str, tensor: Tensor) -> Tensor:
    """The same numbers in another layout."""
    if kind == "strided":
        return tensor
    return tensor.to_sparse(
        layout=getattr(torch, kind), blocksize=(1, 2) if kind in ("sparse_bsr", "sparse_bsc") else None
    )


def test_a_digest_of_dense_tensors_is_the_one_that_saved_folders_hold() -> None:
    """Of one header for each tensor, in the order of names, and of its bytes."""
    said = (
        b"a torch.float32 (2,);" + np.array([1, 2], np.float32).tobytes() + b"b torch.int64 ();" + np.int64(7).tobytes()
    )
    found = tensors_digest({"b": torch.tensor(7), "a": torch.tensor([1.0, 2.0])})
    assert found == hashlib.sha256(said).hexdigest()
    entries = torch.sparse_coo_tensor(torch.tensor([[0, 0, 1]]), torch.ones(3), (3,), check_invariants=True)
    assert tensors_digest({"a": entries}) == tensors_digest({"a": entries.coalesce()})


@pytest.mark.parametrize("place", [0, 1])
def test_each_tensor_of_a_list_counts_in_the_digest(place: int) -> None:
    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.several = nn.Dropout(0.3), [torch.ones(4), torch.ones(4)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.drop(x * self.several[0] + self.several[1])
            return out

    net = Listing()
    model = mcdrop.wrap(net, example=torch.randn(5, 4))
    before = model.digest
    net.several[place].mul_(2)
    assert model.digest != before
    net.several[place].div_(2)
    assert model.digest == before
