"""Summaries: what is read from the moments equals what brute force reads from all passes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import special, stats

from mcdrop.engine import PassPlan, PassResult
from mcdrop.errors import InputError
from mcdrop.intervals import predictive_cdf
from mcdrop.moments import Gathered
from mcdrop.summaries import TASKS, Summary

Array = NDArray[np.float64]

passes = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 20), st.integers(1, 4), st.sampled_from([2, 4])), elements=st.floats(-8, 8)
)


def read(outputs: Array, task: str) -> Summary:
    """The summary of given passes (T, N, D), as the engine would make it."""
    statistics = TASKS[task].statistics
    values = statistics.of(outputs)
    gathered = Gathered()
    for part in np.array_split(values, 3):
        if len(part):
            gathered.add(part.copy())
    kept = statistics.kept(values).astype(np.float32)
    plan = PassPlan(len(outputs), sampler="iid", keep_samples=True)
    return TASKS[task].read(PassResult.of(gathered, values[0], kept, plan))


def close(left: Any, right: Any) -> None:
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-10)


@given(outputs=passes, task=st.sampled_from([*TASKS]))
def test_tensors_are_read_as_arrays_are(outputs: Array, task: str) -> None:
    statistics = TASKS[task].statistics
    close(statistics.there(torch.tensor(outputs)), statistics.of(outputs))


def test_maps_of_tensors_are_read_as_arrays_are() -> None:
    outputs = np.random.default_rng(0).normal(size=(5, 3, 4, 2, 6))
    for task in TASKS.values():
        close(task.statistics.there(torch.tensor(outputs)), task.statistics.of(outputs))


# -- regression --------------------------------------------------------------------------------------------------------


@given(passes)
def test_a_regression_is_read_as_mean_and_variance_of_the_passes(outputs: Array) -> None:
    summary = read(outputs, "regression")
    close(summary.mean, outputs.mean(axis=0))
    close(summary.epistemic, outputs.var(axis=0, ddof=1))
    close(summary.variance, summary.epistemic)
    close(summary.standard_error, stats.sem(outputs))
    assert summary.aleatoric is None
    assert summary.classes is None
    assert set(summary.passes) == {len(outputs)}
    assert set(summary.degrees) == {len(outputs) - 1}


# -- gaussian ----------------------------------------------------------------------------------------------------------


@given(passes)
def test_a_gaussian_head_is_read_by_the_law_of_total_variance(outputs: Array) -> None:
    """Kendall and Gal 2017, eq. 9: the variance of the mixture of the passes' normals (T - 1 in the first part)."""
    half = outputs.shape[-1] // 2
    mean, noise = outputs[..., :half], np.exp(outputs[..., half:])
    summary = read(outputs, "gaussian")
    close(summary.mean, mean.mean(axis=0))
    close(summary.epistemic, mean.var(axis=0, ddof=1))
    assert summary.aleatoric is not None
    close(summary.aleatoric, noise.mean(axis=0))
    second_moment = (noise + mean**2).mean(axis=0)
    correction = mean.var(axis=0, ddof=1) / len(outputs)
    close(summary.variance, second_moment - mean.mean(axis=0) ** 2 + correction)
    assert summary.samples is not None
    np.testing.assert_allclose(summary.samples, mean, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("log_variance", [-95.0, 95.0])
def test_kept_noise_may_be_larger_than_the_numbers_of_the_network(log_variance: float) -> None:
    outputs = np.zeros((4, 2, 2))
    outputs[..., 1] = log_variance
    summary = read(outputs, "gaussian")  # which keeps in float32, whose largest number is e^88.7
    assert summary.log_noise is not None
    close(np.exp(summary.log_noise, dtype=np.float64), np.exp(outputs[..., 1:]))
    close(predictive_cdf(summary, summary.mean + 2 * np.sqrt(summary.aleatoric)), special.ndtr(2))  # type: ignore[arg-type]


def test_a_head_without_a_log_variance_for_each_mean_is_refused() -> None:
    with pytest.raises(InputError, match="an even number of outputs; this one gives 3"):
        read(np.zeros((4, 2, 3)), "gaussian")


# -- classes -----------------------------------------------------------------------------------------------------------


@given(passes)
def test_classes_equal_brute_force_over_all_passes(outputs: Array) -> None:
    chances = special.softmax(outputs, axis=-1)
    average = chances.mean(axis=0)
    summary = read(outputs, "classification")
    assert summary.classes is not None
    close(summary.mean, average)
    close(summary.epistemic, chances.var(axis=0, ddof=1))
    close(summary.classes.entropy, stats.entropy(average, axis=-1))
    close(summary.classes.expected_entropy, stats.entropy(chances, axis=-1).mean(axis=0))
    kullback = stats.entropy(chances, np.broadcast_to(average, chances.shape), axis=-1)
    close(summary.classes.mutual_information, kullback.mean(axis=0))  # the mean divergence from the average
    close(np.take_along_axis(average, summary.classes.label[:, None], axis=-1)[:, 0], average.max(axis=-1))  # or a tie
    for row in range(outputs.shape[1]):
        votes = np.bincount(chances[:, row].argmax(axis=-1), minlength=outputs.shape[-1])
        close(summary.classes.variation_ratio[row], 1 - votes.max() / len(outputs))


@given(passes)
def test_bounds_that_hold_for_every_classifier(outputs: Array) -> None:
    count, classes = len(outputs), outputs.shape[-1]
    summary = read(outputs, "classification")
    found = summary.classes
    assert found is not None
    close(summary.mean.sum(axis=-1), 1)
    assert (found.mutual_information >= 0).all()
    assert (found.mutual_information <= min(np.log(count), np.log(classes)) + 1e-9).all()
    assert (found.entropy <= np.log(classes) + 1e-9).all()
    assert (found.expected_entropy <= found.entropy + 1e-9).all()
    assert (found.variation_ratio >= -1e-12).all()
    assert (found.variation_ratio <= 1 - 1 / min(count, classes) + 1e-9).all()
    assert (summary.epistemic <= 0.25 * count / (count - 1) + 1e-9).all()


def test_passes_that_agree_have_no_mutual_information_and_passes_that_split_have_log_2() -> None:
    agree = np.tile(np.array([[[3.0, 0.0]]]), (10, 1, 1))
    split = np.array([[[800.0, 0.0]], [[0.0, 800.0]]] * 5)
    for outputs, expected, ratio in ((agree, 0.0, 0.0), (split, np.log(2), 0.5)):
        found = read(outputs, "classification").classes
        assert found is not None
        close(found.mutual_information, [expected])
        close(found.variation_ratio, [ratio])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_pass_without_probabilities_leaves_nothing_known_of_its_row(bad: float) -> None:
    outputs = np.random.default_rng(0).normal(size=(6, 3, 4))
    fine = read(outputs, "classification").classes
    outputs[2, 1, 3] = bad
    there = TASKS["classification"].statistics.there(torch.tensor(outputs))
    assert there[2, 1, [0, -1]].isnan().all()  # its chances and its entropy
    found = read(outputs, "classification").classes
    assert fine is not None
    assert found is not None
    for name in ("entropy", "expected_entropy", "mutual_information", "variation_ratio"):
        assert np.isnan(getattr(found, name)).tolist() == [False, True, False]
        close(getattr(found, name)[[0, 2]], getattr(fine, name)[[0, 2]])


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_logits_count_up_to_a_constant(shift: float) -> None:
    outputs = np.random.default_rng(0).normal(size=(5, 3, 4))
    left, right = (read(logits, "classification") for logits in (outputs, outputs + shift))
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-9)


def test_a_classifier_with_one_output_is_refused() -> None:
    with pytest.raises(InputError, match="one logit for each class, at least two; this network gives one output"):
        read(np.zeros((4, 2, 1)), "classification")


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_summary_of_some_rows_is_that_of_their_passes(task: str) -> None:
    outputs = np.random.default_rng(0).normal(size=(6, 9, 4))
    whole = read(outputs, task)
    for which in (slice(2, 5), np.array([7, 0]), np.arange(9) % 2 == 0):
        taken, alone = whole.take(which), read(outputs[:, which], task)
        for name in ("mean", "epistemic", "variance", "standard_error", "passes", "samples"):
            np.testing.assert_allclose(getattr(taken, name), getattr(alone, name), rtol=1e-12)
        assert (taken.classes is None) == (alone.classes is None)
        if taken.classes is not None and alone.classes is not None:
            for name, values in vars(alone.classes).items():
                np.testing.assert_allclose(getattr(taken.classes, name), values, atol=1e-12)
