import gc
import weakref
from itertools import combinations
from typing import Any, TypeGuard

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made import classes, net, summary
from scipy import stats
from scipy.spatial.distance import cdist
from torch import nn

import mcdrop
from mcdrop.bank import DISTANCES, build_bank
from mcdrop.drift import DriftMonitor
from mcdrop.errors import InputError
from mcdrop.rows import Rows
from mcdrop.screening import SCORES, benjamini_hochberg, fewest_discoveries, p_values, score_of

SCORE = st.integers(0, 4).map(float)
X = np.random.default_rng(0).normal(size=(300, 2))


# -- p-values and rates ------------------------------------------------------------------------------------------------


@given(st.lists(SCORE, min_size=1, max_size=8))
def test_p_values_are_super_uniform_with_ties(scores: list[float]) -> None:
    """Whichever of n + 1 exchangeable rows is the new one: at most a share a of them has p <= a."""
    everyone = np.array(scores)
    p = np.array([p_values(everyone[i : i + 1], np.delete(everyone, i))[0] for i in range(len(everyone))])
    for at in np.unique(p):
        assert (p <= at).mean() <= at + 1e-12


def test_p_values_without_ties_are_uniform_on_their_grid() -> None:
    scores = np.arange(5.0)
    p = [p_values(scores[i : i + 1], np.delete(scores, i))[0] for i in range(5)]
    assert sorted(p) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1)), st.floats(0.01, 0.99))
def test_benjamini_hochberg_equals_scipy(p: np.ndarray, fdr: float) -> None:
    adjusted = stats.false_discovery_control(p)
    flagged = benjamini_hochberg(p, fdr)
    clear = np.abs(adjusted - fdr) > 1e-9  # on the edge rounding decides
    np.testing.assert_array_equal(flagged[clear], (adjusted <= fdr)[clear])


@given(st.lists(st.integers(1, 12).map(lambda k: k / 12), min_size=1, max_size=7), st.sampled_from([0.1, 0.25, 0.5]))
def test_benjamini_hochberg_is_the_largest_set_that_its_rate_allows(p: list[float], fdr: float) -> None:
    rows = range(len(p))
    fitting = [
        set(chosen)
        for size in range(1, len(p) + 1)
        for chosen in combinations(rows, size)
        if max(p[i] for i in chosen) <= fdr * size / len(p) + 1e-12
    ]
    largest = max(fitting, key=len, default=set())
    assert {i for i, flag in enumerate(benjamini_hochberg(np.array(p), fdr)) if flag} == largest


@given(st.integers(1, 400), st.integers(1, 200), st.sampled_from([0.05, 0.1, 0.2]))
def test_fewer_discoveries_than_stated_are_impossible(rows: int, reference: int, fdr: float) -> None:
    """The best case: some rows are stranger than all of the reference, the rest are as plain as can be."""
    fewest = fewest_discoveries(rows, fdr, reference)

    def found(anomalies: int) -> int:
        p = np.ones(rows)
        p[:anomalies] = 1 / (reference + 1)
        return int(benjamini_hochberg(p, fdr).sum())

    assert found(min(fewest - 1, rows)) == 0
    if fewest <= rows:
        assert found(fewest) == fewest


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_of_classes_by_hand() -> None:
    made = classes([[0.5, 0.5], [0.1, 0.9]])
    assert score_of("total_variance", made) == pytest.approx([0.5, 0.18])
    assert score_of("entropy", made) == pytest.approx([np.log(2), stats.entropy([0.1, 0.9])])


def test_total_variance_adds_the_noise() -> None:
    made = summary([[0.0, 0.0]], 0.5, aleatoric=np.array([[1.0, 2.0]]))
    assert score_of("variance", made) == pytest.approx([1.0])
    assert score_of("total_variance", made) == pytest.approx([4.0])


def test_distances_equal_scipys() -> None:
    random = np.random.default_rng(0)
    rows, new = (random.normal(size=(count, 5)).astype(np.float32) + 1 for count in (200, 30))
    tenth = {
        "cosine": np.sort(cdist(new, rows, "cosine"), axis=1)[:, 9],
        "euclidean": np.sort(cdist(new / rows.std(axis=0), rows / rows.std(axis=0)), axis=1)[:, 9],
        "mahalanobis": cdist(new, rows.mean(axis=0)[None], "mahalanobis", VI=np.linalg.inv(np.cov(rows.T)))[:, 0],
    }
    assert set(tenth) == set(DISTANCES)
    for name, expected in tenth.items():
        found = build_bank(rows, distance=name, layer=None).measure(new)
        np.testing.assert_allclose(found, expected, rtol=5e-3, err_msg=name)


def test_banks_are_checked() -> None:
    rows = np.zeros((20, 3), np.float32)
    with pytest.raises(InputError, match="unknown distance 'nope'"):
        build_bank(rows, distance="nope", layer=None)
    with pytest.raises(InputError, match="more than 10 typical rows, got 3"):
        build_bank(rows[:3], distance="cosine", layer=None)
    with pytest.raises(InputError, match="2 features where those of the bank have 3"):
        build_bank(rows, distance="euclidean", layer=None).measure(rows[:, :2])


# -- hidden features ---------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_layer_and_the_module_keeps_no_hook() -> None:
    module = net()
    backend = mcdrop.wrap(module, example=X).backend
    x = torch.as_tensor(X, dtype=torch.float32)
    hidden = torch.relu(x @ module[0].weight.T + module[0].bias).detach().numpy()  # type: ignore[index]
    rows = Rows.of(X)
    np.testing.assert_allclose(backend.features(rows, "1"), hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(backend.features(rows, None), backend.features(rows, "1"))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    with pytest.raises(InputError, match="unknown layer 'nope'; choose one of: 0, 1, 2, 3"):
        backend.features(rows, "nope")


def test_a_convolutional_network_gives_what_enters_its_last_linear_layer() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.ReLU(),
        torch.nn.Linear(6, 2),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(5, 1, 4, 4))
    backend = mcdrop.wrap(conv, example=x).backend
    rows = Rows.of(x)
    np.testing.assert_array_equal(backend.features(rows, None), backend.features(rows, "4"))


class Functional(nn.Sequential):
    """The same layers, each linear one called as a function."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for layer in self:
            input = nn.functional.linear(input, layer.weight, layer.bias) if is_linear(layer) else layer(input)
        return input


def is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear)


def test_linear_layers_that_are_called_as_functions_give_the_same_features() -> None:
    rows = Rows.of(X)
    for more in ([], [nn.PReLU(), nn.Linear(2, 2)]):  # a perceptron, and one with other weights too
        layers = [*net(outputs=2).children(), *more]
        by_module, by_call = (mcdrop.wrap(kind(*layers), example=X).backend for kind in (nn.Sequential, Functional))
        np.testing.assert_array_equal(by_module.features(rows, None), by_call.features(rows, None))


# -- screens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score_makes_a_screen_that_sees_far_rows(score: str) -> None:
    model = mcdrop.wrap(net(outputs=3, seed=2), example=X, task="classification")
    screen = mcdrop.fit_screen(model, X, score=score, fpr=0.1, distance="euclidean")
    fresh = np.random.default_rng(1).normal(size=(200, 2))
    found = mcdrop.screen(model, fresh, screen=screen)
    assert found.is_anomaly.mean() < 0.25
    again = mcdrop.predict(model, fresh, screen=screen)
    np.testing.assert_allclose(again.p_value, found.p_value)  # type: ignore[arg-type]
    if SCORES[score].needs_features:
        assert mcdrop.screen(model, 20 * fresh, screen=screen).is_anomaly.mean() > 0.7


def test_a_screen_of_features_may_compare_with_rows_of_the_training() -> None:
    model = mcdrop.wrap(net(), example=X)
    screen = mcdrop.fit_screen(model, X[:50], score="feature_distance", x_train=X[50:], fpr=0.1, layer="0")
    assert len(screen.scores) == 50  # none of the reference is spent
    assert len(mcdrop.fit_screen(model, X, score="feature_distance", fpr=0.1).scores) == 150


@pytest.mark.parametrize("score", sorted(SCORES))
def test_options_of_hidden_features_are_refused_where_none_are_read(score: str) -> None:
    model = mcdrop.wrap(net(outputs=3), example=X, task="classification")
    with pytest.raises(InputError, match="unknown distance 'nope'; choose one of: cosine, euclidean, mahalanobis"):
        mcdrop.fit_screen(model, X, score=score, fpr=0.1, distance="nope")
    if SCORES[score].needs_features:
        return
    given: dict[str, Any] = {"x_train": X, "layer": "0"}
    for name, value in given.items():
        said = f"{name} has no use: score '{score}' reads no hidden features.* combined, feature_distance$"
        with pytest.raises(InputError, match=said):
            mcdrop.fit_screen(model, X, score=score, fpr=0.1, **{name: value})


@pytest.mark.statistical
@pytest.mark.parametrize("score", ["variance", "feature_distance", "combined"])
def test_flagged_inliers_are_as_few_as_promised(score: str) -> None:
    """Mean over 40 splits within four standard errors of the rate."""
    model = mcdrop.wrap(net(), example=X)
    shares = []
    for seed in range(40):
        rows = np.random.default_rng(seed).normal(size=(600, 2))
        screen = mcdrop.fit_screen(model, rows[:300], score=score, fpr=0.1, passes=20)
        shares.append(mcdrop.screen(model, rows[300:], screen=screen).is_anomaly.mean())
    rank = {"variance": 301, "feature_distance": 151, "combined": 121}[score]
    expected = int(0.1 * rank) / rank
    assert abs(np.mean(shares) - expected) <= 4 * np.std(shares) / np.sqrt(40)


def test_screening_reads_batches_and_loaders_alike() -> None:
    model = mcdrop.wrap(net(), example=X).with_screen(None)
    screen = mcdrop.fit_screen(model, X, fpr=0.1)
    whole = mcdrop.screen(model, X, screen=screen, fdr=0.2)
    pairs = torch.utils.data.TensorDataset(torch.as_tensor(X, dtype=torch.float32), torch.zeros(300))
    labelled = [{"input": X[:100], "labels": np.zeros(100)}, {"input": X[100:], "labels": np.zeros(200)}]
    loader = torch.utils.data.DataLoader(pairs, batch_size=64)
    rows = [
        [*X],
        [torch.tensor(row) for row in X],
        X.tolist(),
        [tuple(row) for row in X.tolist()],
        [[*row] for row in X],
    ]
    batches = [[X[:100], X[100:]], iter([X[:100], X[100:]]), loader, [*loader], labelled, [(X.tolist(), [0] * 300)]]
    for data in (*rows, *batches):
        found = mcdrop.screen(model, data, screen=screen, fdr=0.2)
        np.testing.assert_allclose(found.score, whole.score, rtol=1e-4)
        assert found.p_value.shape == (300,)
    assert mcdrop.screen(model, X.tolist(), screen=screen).score == pytest.approx(whole.score)


def test_what_a_screening_says() -> None:
    model = mcdrop.wrap(net(), example=X)
    screen = mcdrop.fit_screen(model, X, fpr=0.1)
    found = mcdrop.screen(model, np.vstack([X, 1000 * X[:90]]), screen=screen, fdr=0.1)
    assert (found.controls, found.rate, found.reference_rows) == ("fdr", 0.1, 300)
    assert found.smallest_p_value == 1 / 301
    assert found.fewest_discoveries == 13  # 390 / 30.1
    assert "fewer than 13 anomalies would not be found" in str(found)
    assert mcdrop.screen(model, X, screen=screen).controls == "fpr"
    with pytest.raises(InputError, match="fdr or fpr, not both"):
        mcdrop.screen(model, X, screen=screen, fdr=0.1, fpr=0.1)
    with pytest.raises(InputError, match=r"fdr 0\.001 is below the smallest p-value"):
        mcdrop.screen(model, X, screen=screen, fdr=0.001)
    with pytest.raises(InputError, match="needs a fitted screen"):
        mcdrop.screen(model, X)


@pytest.mark.parametrize("score", ["combined", "feature_distance", "variance"])
def test_a_folder_keeps_its_screen(score: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from models.networks import noisy_line

    x = np.linspace(-1, 1, 120)[:, None]
    model = mcdrop.wrap(noisy_line(), example=x)
    screen = mcdrop.fit_screen(model, x, score=score, fpr=0.1)
    mcdrop.save(model, tmp_path / "line" / "1", factory="models.networks:noisy_line", screen=screen)
    loaded = mcdrop.load(tmp_path / "line")
    np.testing.assert_array_equal(mcdrop.screen(loaded, x).p_value, mcdrop.screen(model, x, screen=screen).p_value)


def test_a_screen_lives_as_long_as_the_scores_that_are_kept_for_it() -> None:
    """Another screen at its place in memory would be given its scores."""
    model = mcdrop.wrap(net(), example=X)
    screen = mcdrop.fit_screen(model, X, fpr=0.1)
    mcdrop.predict(model, X, screen=screen, seed=1)
    alive = weakref.ref(screen)
    del screen
    gc.collect()
    assert alive() is not None


def test_a_detector_flags_what_its_p_values_say() -> None:
    model = mcdrop.wrap(net(), example=X)
    detector = mcdrop.Detector(model, fpr=0.07)
    with pytest.raises(InputError, match="call fit with inlier rows first"):
        detector.predict(X)
    detector.fit(X)
    new = np.vstack([X[:40] * 1.5, detector.screen_.rows.args[0][:40]])  # some tie with the reference
    np.testing.assert_array_equal(detector.predict(new), detector.p_values(new) <= 0.07)
    assert (detector.decision_function(X) == detector.decision_scores_).all()
    assert detector.labels_.mean() <= 0.07


# -- drift -------------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
def test_the_martingale_is_fair_while_nothing_drifts() -> None:
    """The mean of e^(log wealth) over many streams is 1; ties included, since the scores are rounded."""
    random = np.random.default_rng(0)
    wealth = [
        np.exp(
            DriftMonitor(random.normal(size=30).round(1), seed=seed)
            .update(random.normal(size=20).round(1))
            .log_martingale
        )
        for seed in range(4000)
    ]
    assert np.mean(wealth) == pytest.approx(1, abs=4 * np.std(wealth) / np.sqrt(4000))


@pytest.mark.statistical
def test_false_alarms_are_as_rare_as_promised() -> None:
    random = np.random.default_rng(1)
    alarms = sum(
        DriftMonitor(random.normal(size=100), run_length=20_000, seed=seed).update(random.normal(size=1000)).alarm
        for seed in range(100)
    )
    assert alarms <= 100 * 1000 / 20_000 + 4 * np.sqrt(5)


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_drift_raises_the_alarm_soon_and_it_stays(shift: float) -> None:
    random = np.random.default_rng(2)
    monitor = DriftMonitor(random.normal(size=500))
    assert not monitor.update(random.normal(size=2000)).alarm
    assert monitor.update(shift + random.normal(size=150)).alarm
    assert monitor.update(random.normal(size=10)).alarm
    monitor.reset()
    assert monitor.state.rows == 0
    assert not monitor.state.alarm


def test_a_stream_may_come_in_any_pieces() -> None:
    random = np.random.default_rng(3)
    reference, stream = random.normal(size=50), random.normal(size=40)
    pieces = DriftMonitor(reference)
    for score in stream:
        pieces.update([score])
    assert pieces.state == DriftMonitor(reference).update(stream)
    with pytest.raises(InputError, match="finite"):
        pieces.update([0.0, np.nan])
    assert pieces.state == DriftMonitor(reference).update(stream)
    with pytest.raises(InputError, match="reference rows"):
        DriftMonitor([])
    with pytest.raises(InputError, match="row 1 holds nan"):  # sorted nowhere, it would make ranks of nothing
        DriftMonitor([0.0, np.nan, 1.0])


def test_scores_come_in_any_container_and_nothing_else_is_taken() -> None:
    random = np.random.default_rng(3)
    reference, stream = random.normal(size=50), random.normal(size=40)
    expected = DriftMonitor(reference).update(stream)
    assert DriftMonitor(iter(reference)).update(float(score) for score in stream) == expected
    assert DriftMonitor(torch.as_tensor(reference)).update([np.float64(score) for score in stream]) == expected
    for single in (float, np.float64, np.array, torch.tensor):
        monitor = DriftMonitor(reference)
        for score in stream:
            monitor.update(single(score))
        assert monitor.state == expected
    for scores in ("text", None, ["a"], [None], [[1.0], [1.0, 2.0]], np.ma.masked_array([1.0, 2.0], [False, True])):
        for take in (DriftMonitor, DriftMonitor(reference).update):
            with pytest.raises(InputError, match="scores must"):
                take(scores)  # type: ignore[arg-type]
    for name, value in (("run_length", "a"), ("run_length", 0.5), ("seed", -1), ("seed", "a")):
        asked: Any = {name: value}
        with pytest.raises(InputError, match=f"{name.replace('_', ' ')} .*got {value!r}"):
            DriftMonitor(reference, **asked)


def test_a_screen_follows_the_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.Linear(32, 1)
        net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Dropout(0.3), last)
        reference, fresh = torch.randn(300, 3), torch.randn(500, 3)
    model = mcdrop.wrap(net, example=reference[:4])
    model = model.with_screen(mcdrop.fit_screen(model, reference, fpr=0.05))
    before = mcdrop.predict(model, fresh)
    with torch.no_grad():
        last.weight.mul_(5)
    after = mcdrop.predict(model, fresh)
    # scores grow by 25, those of the reference rows as well: ranks stay, and so does the rate
    assert before.p_value is not None
    assert before.score is not None
    assert after.score is not None
    np.testing.assert_allclose(after.score, 25 * before.score, rtol=1e-4)
    np.testing.assert_array_equal(after.p_value, before.p_value)
