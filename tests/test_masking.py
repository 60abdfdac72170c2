"""The kernel of what follows a layer on a GPU: torch's own numbers, whatever the shapes, and where there is none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcdrop.masking import _one_by_one, after_conv, masked, runs_on, summed

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_a_gpu(test: Any) -> Any:
    """Skips a test where there is none."""
    for mark in GPU:
        test = mark(test)
    return test


# values, a mask, on how many of the last axes it is the same
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((5, 3, 7), (5, 1, 7), 0),
    ((3, 7), (5, 1, 7), 0),
    ((1, 1, 1), (1, 1, 1), 0),
    ((20, 33, 1024), (20, 1, 1024), 0),
    ((4, 3, 6, 5, 2), (4, 1, 6, 1, 1), 2),
    ((3, 6, 5, 2), (4, 1, 6, 1, 1), 2),
    ((4, 3, 6, 5), (4, 1, 1, 1), 2),
    ((4, 3, 6, 5), (4, 1, 6, 5), 0),
    ((2, 70_000, 1000), (2, 1, 1000), 0),  # more than one grid takes
]


@on_a_gpu
def test_it_runs_here() -> None:
    assert runs_on(torch.device("cuda"))
    assert not runs_on(torch.device("cpu"))


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("values", "mask", "trailing"), SHAPES)
def test_a_product_is_torchs(
    values: tuple[int, ...], mask: tuple[int, ...], trailing: int, relu: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(values, device="cuda").to(dtype)
    factor = ((torch.rand(mask, device="cuda") > 0.5) * 1.25).to(dtype)
    assert torch.equal(masked(x, factor, trailing, relu), (x.relu() if relu else x) * factor)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(masked(turned, factor, trailing, relu), (x.relu() if relu else x) * factor)


@on_a_gpu
def test_no_number_stays_none() -> None:
    x = torch.tensor([[[float("nan"), -1.0, float("inf")]]], device="cuda")
    got = masked(x, torch.ones(1, 1, 3, device="cuda"), 0, True)
    assert torch.equal(got.isnan(), x.isnan())
    assert got[0, 0, 1:].tolist() == [0.0, float("inf")]


# outputs of convolutions, of all passes and of one for all, and how many axes their places have
CONVS: list[tuple[tuple[int, ...], int]] = [
    ((4, 3, 6, 5), 1),
    ((3, 6, 5), 1),
    ((4, 3, 6, 5, 2), 2),
    ((5, 33, 16, 9, 8), 2),
    ((3, 6, 5, 2), 2),
    ((2, 3, 6, 5, 2, 3), 3),
    ((3, 6, 5, 2, 3), 3),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axes"), CONVS)
@pytest.mark.parametrize(("run", "device"), [pytest.param(after_conv, "cuda", marks=GPU), (_one_by_one, "cpu")])
def test_what_follows_a_convolution_is_torchs(
    run: Any, device: str, shape: tuple[int, ...], axes: int, dtype: torch.dtype, last: bool
) -> None:
    """Each part alone and all together, also with channels last in memory, which they stay; and without the kernel."""
    torch.manual_seed(0)
    channels, passes = shape[-axes - 1], shape[0] if len(shape) == axes + 3 else 4

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    def by_channel(one: Tensor) -> Tensor:
        return one.double().view(-1, *(1,) * axes)

    def as_cudnn(one: Tensor) -> Tensor:
        return one.movedim(-axes - 1, -1).contiguous().movedim(-1, -axes - 1) if last else one

    x, other, bias = as_cudnn(made(*shape)), as_cudnn(made(*shape)), made(channels)
    mean, variance, gain, shift = made(channels), made(channels).abs() + 0.1, made(channels), made(channels)
    mask = (torch.rand(passes, 1, channels, *(1,) * axes, device=device) > 0.5).to(dtype) * 2
    nothing: Any = (None, None, None, None, None, 0.0, None, False, None)
    norm = (mean, variance, gain, shift, 1e-5)
    plain = (x.double() - by_channel(mean)) / (by_channel(variance) + 1e-5).sqrt()
    normed = plain * by_channel(gain) + by_channel(shift)
    cases: dict[str, tuple[Any, Tensor]] = {
        "bias": ((bias, *nothing[1:]), x.double() + by_channel(bias)),
        "norm": ((None, *norm, None, False, None), normed),
        "norm without weights": ((None, mean, variance, None, None, 1e-5, None, False, None), plain),
        "sum": ((*nothing[:6], other, False, None), x.double() + other.double()),
        "ReLU": ((*nothing[:7], True, None), x.double().relu()),
        "mask": ((*nothing[:8], mask), x.double() * mask),
        "norm, sum and ReLU": ((None, *norm, other, True, None), (normed + other.double()).relu()),
        "norm, ReLU and mask": ((None, *norm, None, True, mask), normed.relu() * mask),
    }
    for name, (given, expected) in cases.items():
        found = run(x, axes, *given)
        assert found.dtype == dtype
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((found.double() - expected).abs().max()) < rounding * float(expected.abs().max()), name
        if run is after_conv:
            assert found.movedim(-axes - 1, -1).is_contiguous() == last, name


@on_a_gpu
def test_what_is_no_number_before_a_norm_stays_none() -> None:
    x = torch.full((1, 2, 3, 2, 2), float("nan"), device="cuda")
    one = torch.ones(3, device="cuda")
    assert after_conv(x, 2, one, one, one, one, one, 1e-5, x, True, None).isnan().all()


# values, a mask, what is added
SUMS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((5, 3, 7), (5, 1, 7), (5, 3, 7)),
    ((3, 7), (5, 1, 7), (3, 7)),
    ((5, 3, 4, 7), (5, 1, 4, 7), (3, 4, 7)),
    ((20, 9, 64, 256), (20, 1, 64, 256), (20, 9, 64, 256)),
    ((4, 3, 2, 2000), (4, 1, 2, 2000), (4, 3, 2, 2000)),
]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", SUMS)
def test_a_mask_a_sum_and_a_norm_are_torchs(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, mask, other = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    gain, shift = (torch.randn(shapes[0][-1], device="cuda").to(dtype) for _ in range(2))
    whole = x.double() * mask.double() + other.double()
    rounding = 1e-5 if dtype == torch.float32 else 2e-2

    def close(found: Tensor, expected: Tensor) -> bool:
        return found.dtype == dtype and float((found - expected).abs().max()) < rounding * float(expected.abs().max())

    assert close(summed(x, mask, other, False, None, None, 0.0), whole)
    for by, plus in ((gain, shift), (gain, None), (None, None)):
        doubled = (None if one is None else one.double() for one in (by, plus))
        expected = F.layer_norm(whole, shapes[0][-1:], next(doubled), next(doubled), 1e-3)
        assert close(summed(x, mask, other, True, by, plus, 1e-3), expected)


@on_a_gpu
def test_no_number_stays_none_in_a_norm() -> None:
    x, one = torch.ones(1, 2, 3, device="cuda"), torch.ones(1, 1, 3, device="cuda")
    x[0, 1, 2] = float("nan")
    got = summed(x, one, x, True, None, None, 1e-5)
    assert got[0, 1].isnan().all()
    assert not got[0, 0].isnan().any()
