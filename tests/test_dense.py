"""Networks that answer for every pixel."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mcdrop

ROOT = Path(__file__).parent.parent

PEAK = """
import resource, torch, mcdrop
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(16, 1, 3, padding=1))
x = torch.randn(1, 1, 224, 224)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
p = mcdrop.predict(mcdrop.wrap(net, example=x), x, passes=100, interval="quantile")
assert p.lower.shape == p.mean.shape == (1, 1, 224, 224)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def dense(outputs: int) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(8, outputs, 3, padding=1)]
        return nn.Sequential(*layers).eval(), torch.randn(3, 1, 10, 12)


def test_quantiles_of_an_image_at_a_hundred_passes_take_bounded_memory() -> None:
    # 20 MB of kept passes and some copies of them; every activation of 100 passes at once would be 320 MB and more
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
    )
    assert int(done.stdout) < 250


def test_every_statistic_has_the_shape_of_the_output() -> None:
    net, x = dense(2)
    p = mcdrop.predict(net, x, passes=60, interval="quantile", keep_samples=True)
    assert p.samples is not None
    assert p.samples.shape == (60, 3, 2, 10, 12)
    for name in ("mean", "variance", "std", "lower", "upper", "standard_error", "deterministic"):
        assert getattr(p, name).shape == (3, 2, 10, 12), name
    np.testing.assert_allclose(p.mean, p.samples.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-9)
    # floor(61 * 0.05 / 2) = 1: the smallest and the largest pass
    np.testing.assert_array_equal(p.lower, p.samples.min(axis=0))
    np.testing.assert_array_equal(p.upper, p.samples.max(axis=0))


def test_classes_of_pixels_are_told_apart_along_the_channel_axis() -> None:
    net, x = dense(5)
    p = mcdrop.predict(net, x, task="classification", passes=40, keep_samples=True)
    assert p.mean.shape == (3, 10, 12, 5)
    assert p.label is not None
    assert p.label.shape == (3, 10, 12)
    np.testing.assert_allclose(p.mean.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(p.label, p.mean.argmax(axis=-1))
