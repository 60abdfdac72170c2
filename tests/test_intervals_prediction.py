from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made import classes, net, summary
from scipy import optimize, stats

import mcdrop
from mcdrop.errors import InputError
from mcdrop.intervals import INTERVALS, interval_of, predictive_cdf
from mcdrop.summaries import Summary, corrected_mutual_information, noise_from_weight_decay

RANDOM = np.random.default_rng(0)
SAMPLES = RANDOM.normal(size=(30, 5, 2)) * 2
NOISE = RANDOM.exponential(size=(30, 5, 2))


def mixed() -> Summary:
    mean, spread = SAMPLES.mean(axis=0), SAMPLES.var(axis=0, ddof=1)
    return summary(mean, spread, samples=SAMPLES, aleatoric=NOISE.mean(axis=0), log_noise=np.log(NOISE))


def test_mixture_bounds_solve_the_mixture_equation() -> None:
    found = interval_of("predictive", mixed(), 0.9)
    for row, output in ((0, 0), (4, 1)):
        means, stds = SAMPLES[:, row, output], np.sqrt(NOISE[:, row, output])
        for bound, share in ((found.lower, 0.05), (found.upper, 0.95)):
            expected = optimize.brentq(lambda u: np.mean(stats.norm.cdf(u, means, stds)) - share, -50, 50, xtol=1e-13)  # noqa: B023
            assert bound[row, output] == pytest.approx(expected, abs=1e-9)
    assert found.kind == "prediction"


def test_bounds_and_distribution_agree() -> None:
    made = mixed()
    for keep in (made, summary(made.mean, made.epistemic, aleatoric=made.aleatoric)):
        found = interval_of("predictive", keep, 0.8)
        np.testing.assert_allclose(predictive_cdf(keep, found.lower), 0.1, atol=1e-9)
        np.testing.assert_allclose(predictive_cdf(keep, found.upper), 0.9, atol=1e-9)


def test_without_passes_the_total_variance_is_normal() -> None:
    made = summary([[1.0]], 0.5, aleatoric=np.array([[1.5]]))
    found = interval_of("predictive", made, 0.95)
    assert [found.lower[0, 0], found.upper[0, 0]] == pytest.approx(stats.norm.interval(0.95, 1, np.sqrt(2)))


def test_scale_stretches_the_interval_around_the_mean() -> None:
    for one in (mixed(), summary([[1.0, 2.0]], 0.5, aleatoric=np.ones((1, 2)))):
        plain = interval_of("predictive", one, 0.9)
        scaled = interval_of("predictive", replace(one, scale=np.array([2.0, 1.0])), 0.9)
        np.testing.assert_allclose(scaled.upper[:, 0] - one.mean[:, 0], 2 * (plain.upper[:, 0] - one.mean[:, 0]))
        np.testing.assert_allclose(scaled.upper[:, 1], plain.upper[:, 1])


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_predictive_intervals_grow_with_the_level(one: float, other: float) -> None:
    low, high = (interval_of("predictive", mixed(), level) for level in sorted((one, other)))
    assert (high.lower <= low.lower + 1e-9).all()
    assert (low.upper <= high.upper + 1e-9).all()


def test_intervals_of_y_say_what_they_need() -> None:
    made = summary([[0.0]])
    with pytest.raises(InputError, match=r"'predictive' needs to know the noise .* mcdrop.calibrate"):
        interval_of("predictive", made, 0.9)
    with pytest.raises(InputError, match=r"'conformal' needs a calibration; .* mcdrop.calibrate"):
        interval_of("conformal", made, 0.9)
    with pytest.raises(InputError, match="about numbers, not classes"):
        interval_of("predictive", classes([[0.5, 0.5]]), 0.9)
    assert {name for name, one in INTERVALS.items() if one.kind == "prediction"} == {"predictive", "conformal"}


def test_a_gaussian_head_needs_no_calibration() -> None:
    x = np.zeros((4, 2))
    model = mcdrop.wrap(net(outputs=2), example=x, task="gaussian")
    kept = mcdrop.predict(model, x, interval="predictive", keep_samples=True)
    assert kept.interval_kind == "prediction"
    normal = mcdrop.predict(model, x, interval="predictive")
    np.testing.assert_allclose(kept.lower, normal.lower, rtol=0.2)


@pytest.mark.parametrize("interval", ["predictive", "conformal"])
def test_noise_beyond_the_numbers_of_the_network_has_bounds_with_kept_passes_too(interval: str) -> None:
    """A log-variance of 95 is a variance of 1e41, which float32 cannot hold."""
    x = RANDOM.normal(size=(40, 2)).astype(np.float32)
    head = net(outputs=2)
    with torch.no_grad():
        head[3].bias[1] = 95.0  # type: ignore[index]
    model = mcdrop.wrap(head, example=x, task="gaussian")
    std = np.exp(95 / 2)
    y = std * RANDOM.normal(size=40)
    method = "cqr" if interval == "conformal" else None
    calibration = mcdrop.calibrate(model, x, y, method=method, levels=[0.9])
    kept = mcdrop.predict(model, x, interval=interval, level=0.9, keep_samples=True, calibration=calibration)
    assert np.isfinite(kept.upper).all()
    assert ((0.5 * std < kept.upper) & (kept.upper < 4 * std)).all()


# -- summaries ---------------------------------------------------------------------------------------------------------


def test_noise_of_the_published_recipe() -> None:
    """Gal and Ghahramani's code for Concrete: reg = l^2 (1 - p) / (2 N tau), l = 0.01, p = 0.01, tau = 0.0557..."""
    tau, length, p, rows = 0.0557319157756, 1e-2, 0.01, 927
    decay = length**2 * (1 - p) / (2 * rows * tau)
    assert noise_from_weight_decay(decay, rows=rows, p=p, length_scale=length) == pytest.approx(1 / tau)
    with pytest.raises(InputError, match=r"p in \[0, 1\)"):
        noise_from_weight_decay(1e-4, rows=10, p=1.0)


@pytest.mark.statistical
def test_correction_removes_most_of_the_bias_of_mutual_information() -> None:
    """Passes are Dirichlet draws, whose mutual information is known: H(mean) less the mean entropy (digamma)."""
    from scipy.special import digamma, entr

    alpha = np.array([2.0, 3.0, 4.0])
    share, total = alpha / alpha.sum(), alpha.sum()
    true = entr(share).sum() - (digamma(total + 1) - (share * digamma(alpha + 1)).sum())
    random, passes, rows = np.random.default_rng(0), 10, 20_000
    draws = random.dirichlet(alpha, (passes, rows))
    made = classes(draws.mean(axis=0))
    expected = entr(draws).sum(axis=-1).mean(axis=0)
    assert made.classes is not None
    found = replace(made.classes, mutual_information=made.classes.entropy - expected)
    error = draws.std(axis=0, ddof=1) / np.sqrt(passes)
    whole = replace(made, classes=found, standard_error=error)
    plain, corrected = found.mutual_information.mean() - true, corrected_mutual_information(whole).mean() - true
    assert plain < -0.008
    assert abs(corrected) < 0.1 * abs(plain)


def test_dense_outputs() -> None:
    from torch import nn

    x = RANDOM.normal(size=(3, 2, 5, 4)).astype(np.float32)
    grid = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Dropout2d(0.3), nn.Conv2d(4, 4, 1))
    regression = mcdrop.predict(mcdrop.wrap(grid, example=x), x)
    assert regression.mean.shape == regression.lower.shape == (3, 4, 5, 4)
    gaussian = mcdrop.predict(mcdrop.wrap(grid, example=x, task="gaussian"), x)
    np.testing.assert_allclose(gaussian.mean, regression.mean[:, :2])
    assert gaussian.aleatoric is not None
    assert gaussian.aleatoric.shape == (3, 2, 5, 4)
    model = mcdrop.wrap(grid, example=x, task="classification")
    labels = RANDOM.integers(0, 4, (3, 5, 4))
    found = mcdrop.predict(model, x, calibration=mcdrop.calibrate(model, x, labels), level=0.6)
    assert found.mean.shape == (3, 5, 4, 4)
    np.testing.assert_allclose(found.mean.sum(axis=-1), 1)
    assert found.entropy is not None
    assert found.entropy.shape == (3, 5, 4)
    assert found.prediction_set is not None
    assert found.prediction_set.shape == (3, 5, 4, 4)
    screen = mcdrop.fit_screen(model, x, score="entropy", fpr=0.5)
    assert screen.scores == pytest.approx(found.entropy.sum(axis=(1, 2)))
