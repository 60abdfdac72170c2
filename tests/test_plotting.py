import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from made import net

import mcdrop
from mcdrop import plotting
from mcdrop.errors import InputError, MissingExtra

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

X = np.linspace(-2, 2, 60)[:, None]


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def model() -> mcdrop.Model:
    return mcdrop.wrap(net(inputs=1), example=X)


def test_the_band_of_a_thousand_passes_is_drawn_in_order_of_x(model: mcdrop.Model) -> None:
    shuffled = np.random.default_rng(0).permutation(X)
    prediction = mcdrop.predict(model, shuffled, passes=1000)
    ax = plotting.band(shuffled, prediction, y=np.zeros(3), seen=np.arange(3))
    (x, mean), (seen, _) = (np.asarray(line.get_data()) for line in ax.get_lines())
    np.testing.assert_allclose(x, X[:, 0])
    np.testing.assert_allclose(mean, mcdrop.predict(model, X, passes=1000).mean[:, 0], rtol=1e-4)
    assert len(seen) == 3
    assert ax.get_legend_handles_labels()[1][0] == "95% credible interval"


def test_axes_that_are_given_come_back(model: mcdrop.Model) -> None:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert plotting.reliability([0.2, 0.8], [0.3, 0.7], ax=ax) is ax
    assert plotting.coverage([0.8, 0.9], [0.79, 0.92], rows=100, ax=ax) is ax
    assert plotting.convergence(np.zeros((5, 3, 1)), ax=ax) is ax


def test_convergence_ends_at_the_mean_of_all_passes(model: mcdrop.Model) -> None:
    kept = mcdrop.predict(model, X, passes=50, keep_samples=True)
    assert kept.samples is not None
    line = plotting.convergence(kept.samples, row=5).get_lines()[0]
    ends = np.asarray(line.get_ydata())[-1]
    assert ends == pytest.approx(float(kept.mean[5, 0]))


def test_the_line_among_the_scores_is_the_smallest_flagged(model: mcdrop.Model) -> None:
    screen = mcdrop.fit_screen(model, X, fpr=0.1)
    found = mcdrop.screen(model, np.vstack([X, 50 * X]), screen=screen)
    ax = plotting.scores(found, reference=screen.scores)
    assert np.asarray(ax.get_lines()[0].get_xdata())[0] == found.score[found.is_anomaly].min()


def test_the_gallery_begins_with_the_strangest(model: mcdrop.Model) -> None:
    import matplotlib.pyplot as plt

    screen = mcdrop.fit_screen(model, X, fpr=0.1)
    found = mcdrop.screen(model, X * np.linspace(0, 20, 60)[:, None], screen=screen)
    _, axes = plt.subplots(1, 2)
    plotting.gallery(np.zeros((60, 4, 4)), found, axes)
    assert axes[0].get_title().startswith(f"row {found.score.argmax()},")
    with pytest.raises(InputError, match="3 images for 60 scores"):
        plotting.gallery(np.zeros((3, 4, 4)), found, axes)


def test_a_score_that_is_nan_is_the_strangest_in_the_gallery() -> None:
    import matplotlib.pyplot as plt

    score = np.array([1.0, np.nan, np.inf, 2.0, np.nan])
    found = SimpleNamespace(score=score, p_value=np.full(5, 0.1), is_anomaly=np.zeros(5, np.bool_))
    axes = plt.subplots(1, 5)[1]
    plotting.gallery(np.zeros((5, 2, 2)), found, axes)
    assert [int(ax.get_title().split()[1].strip(",")) for ax in axes] == [1, 4, 2, 3, 0]


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8, 8), (5, 2, 2, 2, 3)])
def test_images_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    found = SimpleNamespace(score=np.arange(5.0), p_value=np.full(5, 0.1), is_anomaly=np.zeros(5, np.bool_))
    with pytest.raises(InputError, match=f"images must be .* channels last, got the shape {re.escape(str(shape))}"):
        plotting.gallery(np.zeros(shape), found, [])


def test_what_cannot_be_drawn_is_said(model: mcdrop.Model) -> None:
    prediction = mcdrop.predict(model, X)
    with pytest.raises(InputError, match="x must have 60 rows"):
        plotting.band(X[:3], prediction)
    with pytest.raises(InputError, match="a single column"):
        plotting.band(np.zeros((60, 2)), prediction)
    with pytest.raises(InputError, match="no scores"):
        plotting.scores(prediction)
    with pytest.raises(InputError, match=r"for 95 % give 0\.95"):
        plotting.convergence(np.zeros((5, 3, 1)), level=95)
    for draw in (plotting.reliability, plotting.coverage):
        with pytest.raises(InputError, match=r"must be as many, got the shapes \(2,\) and \(1,\)"):
            draw([0.1, 0.5], [0.2])


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtra, match=r"mcdrop\[plot\]"):
        plotting.reliability([0.5], [0.5])


def test_scores_that_are_not_finite_are_counted_beside_the_others() -> None:
    flagged = np.array([False, True, True, True])
    found = SimpleNamespace(score=np.array([0.0, 2.0, np.nan, np.inf]), p_value=np.full(4, 0.1), is_anomaly=flagged)
    ax = plotting.scores(found, reference=[0.0, 1.0, np.nan])
    assert np.asarray(ax.get_lines()[0].get_xdata())[0] == 2.0
    said = {"flagged from here (3)", "reference", "rows (2 not finite, left out)"}
    assert {*ax.get_legend_handles_labels()[1]} == said
    with pytest.raises(InputError, match="none of the 2 scores is finite"):
        plotting.scores(SimpleNamespace(score=np.array([np.nan, np.inf]), p_value=np.ones(2), is_anomaly=flagged[:2]))


def test_a_place_that_is_not_there_is_named(model: mcdrop.Model) -> None:
    prediction = mcdrop.predict(model, X)
    with pytest.raises(InputError, match="output must be a whole number from 0 to 0, got 3"):
        plotting.band(X, prediction, output=3)
    with pytest.raises(InputError, match="row must be a whole number from 0 to 2, got 3"):
        plotting.convergence(np.zeros((5, 3, 1)), row=3)
    with pytest.raises(InputError, match="keep_samples=True"):
        plotting.convergence(prediction.samples)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"at least two passes.*\(1, 3, 1\)"):
        plotting.convergence(np.zeros((1, 3, 1)))
    with pytest.raises(InputError, match="what is drawn must be numbers, got the text 'a'"):
        plotting.band(["a"] * 60, prediction)
