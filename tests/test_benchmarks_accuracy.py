import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import mcdrop
from benchmarks.accuracy.data import RegressionSet, data_folder, read_set, recut, split_held
from benchmarks.accuracy.measures import chance_band, covered, log_likelihood, root_mean_square
from benchmarks.accuracy.nets import Encoder, Recipe
from benchmarks.accuracy.report import markdown, put_section
from benchmarks.accuracy.training import train
from benchmarks.accuracy.uci import main

TINY = Recipe(p=0.1, hidden=(8, 8), epochs=2, batch=16, rate=1e-3, decay=0.0, bins=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A made-up set ``line`` of 60 rows, target in the middle column, with two splits, and the same as ``yacht``."""
    rng = np.random.default_rng(0)
    for name in ("line", "yacht"):
        here = tmp_path / "uci" / name
        here.mkdir(parents=True)
        x = rng.standard_normal((60, 2))
        np.savetxt(here / "data.txt", np.stack([x[:, 0], 3 * x[:, 0] + 5, np.round(x[:, 1])], axis=1))
        np.savetxt(here / "index_features.txt", [0, 2], fmt="%d")
        np.savetxt(here / "index_target.txt", [1], fmt="%d")
        for k in range(2):
            order = rng.permutation(60)
            np.savetxt(here / f"index_train_{k}.txt", order[:50], fmt="%d")
            np.savetxt(here / f"index_test_{k}.txt", order[50:], fmt="%d")
    return tmp_path


def test_a_set_is_read_as_its_index_files_say(folder: Path) -> None:
    data = read_set(folder, "line")
    raw = np.loadtxt(folder / "uci" / "line" / "data.txt")
    np.testing.assert_array_equal(data.x, raw[:, [0, 2]])
    np.testing.assert_array_equal(data.y, raw[:, 1])
    assert [len(rows) for rows in data.train] == [50] * 2
    assert [len(rows) for rows in data.test] == [10] * 2


def test_splits_that_do_not_cut_the_rows_in_two_are_refused() -> None:
    x, rows = np.zeros((4, 1)), np.arange(4)
    with pytest.raises(ValueError, match="split 0"):
        RegressionSet("s", x, x[:, 0], (rows[:2],), (rows[1:],))
    with pytest.raises(ValueError, match="equally many"):
        RegressionSet("s", x, x[:, 0], (), ())


def test_a_missing_set_or_folder_says_what_there_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are: line, yacht"):
        read_set(folder, "boston")
    with pytest.raises(FileNotFoundError, match="MCDROP_DATA"):
        data_folder(tmp_path / "nowhere")


def test_other_splits_have_the_same_sizes_and_follow_the_seed(folder: Path) -> None:
    data = read_set(folder, "line")
    one, two = recut(data, 1), recut(data, 1)
    assert [len(rows) for rows in one.test] == [10] * 2
    assert all((a == b).all() for a, b in zip(one.train, two.train, strict=True))
    assert any((a != b).any() for a, b in zip(one.train, recut(data, 2).train, strict=True))


def test_held_out_rows_are_the_last_fifth() -> None:
    fit, held = split_held(np.arange(277))
    assert (len(fit), len(held)) == (222, 55)
    assert (np.concatenate([fit, held]) == np.arange(277)).all()


def test_log_likelihood_is_that_of_a_mixture_of_normals() -> None:
    rng = np.random.default_rng(1)
    means, variances, y = rng.normal(size=(7, 5)), rng.uniform(0.5, 2, (7, 5)), rng.normal(size=5)
    densities = stats.norm(means, np.sqrt(variances)).pdf(y)
    assert log_likelihood(means, variances, y) == pytest.approx(np.log(densities.mean(axis=0)).mean())
    assert log_likelihood(means, 2.0, y) == pytest.approx(log_likelihood(means, np.full((7, 5), 2.0), y))


def test_log_likelihood_of_far_rows_stays_finite() -> None:
    assert log_likelihood(np.zeros((3, 1)), 1.0, np.array([1e3])) == pytest.approx(stats.norm.logpdf(1e3))


def test_error_and_coverage_are_what_their_names_say() -> None:
    assert root_mean_square(np.array([3.0, -4.0])) == pytest.approx(np.sqrt(12.5))
    assert covered(np.zeros(4), np.ones(4), np.array([-1.0, 0.0, 1.0, 2.0])) == 0.5


def test_chance_band_follows_the_beta_binomial_law() -> None:
    held, tested = 99, 50  # floor(100 * 0.1) = 10 rows may lie outside: Beta(90, 10)
    low, high = chance_band(0.9, held, tested, 1)
    law = stats.betabinom(tested, 90, 10)
    assert (low, high) == pytest.approx((law.ppf(0.025) / tested, law.ppf(0.975) / tested), abs=0.021)
    many = chance_band(0.9, held, tested, 400)
    assert many.mean() == pytest.approx(0.9, abs=0.003)
    assert (chance_band(0.95, 9, tested, 3) == 1).all()  # too few rows: infinite intervals


def test_ramps_add_up_to_a_linear_map_of_each_input() -> None:
    x = np.random.default_rng(2).standard_normal((40, 2))
    x[:, 1] = np.arange(40) < 27  # two values, so no ramps
    encoder = Encoder(x, bins=4, width=6)
    assert encoder.ramps == 4
    encoded = encoder(torch.tensor([[-9.0, 1.0], [0.0, 0.0], [9.0, 1.0]]))
    assert encoded.shape == (3, 2 + 6)
    length = torch.tensor(np.diff(np.quantile(x[:, 0], np.linspace(0, 1, 5))), dtype=torch.float32)
    back = x[:, 0].min() + (encoded[:, 2:6] * length).sum(dim=1)
    torch.testing.assert_close(back, torch.tensor([-9.0, 0.0, 9.0]), atol=1e-4, rtol=0)
    assert (encoded[:, 6:] == 0).all()


def test_networks_of_several_splits_learn_each_its_own(folder: Path) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 200, 1))
    recipe = Recipe(p=0.02, hidden=(32,), epochs=40, batch=50, rate=2e-2, decay=0.0)
    nets = train(recipe, list(x), [7 * x[0, :, 0], 100 - x[1, :, 0]], seed=0)
    at = torch.tensor([[-1.0], [1.0]])
    means = [net(at)[:, 0].tolist() for net in nets]
    np.testing.assert_allclose(means, [[-7, 7], [101, 99]], atol=1.0)


def test_every_dropout_of_a_network_is_live_in_mcdrop() -> None:
    x = np.random.default_rng(4).standard_normal((30, 3))
    for recipe, sites in ((TINY, 2), (Recipe(**{**vars(TINY), "drop_inputs": True, "head": False}), 3)):
        (net,) = train(recipe, [x], [x[:, 0]], seed=0)
        model = mcdrop.wrap(net, example=x[:8], task="gaussian" if recipe.head else "regression")
        assert [site.p for site in model.audit.live] == [recipe.p] * sites


def test_the_benchmark_runs_on_any_folder_of_the_layout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out" / "uci.json"
    main(["--data", str(folder), "--json", str(out), "--effort", "0.0005"])
    results = json.loads(out.read_text())
    assert set(results["environment"]) == {"machine", "versions", "commit"}
    assert list(results["sets"]) == ["line", "yacht"]
    assert list(results["sets"]["line"]) == ["ours"]  # the paper knows no such set
    assert list(results["sets"]["yacht"]) == ["paper", "ours"]
    assert len(results["sets"]["yacht"]["paper"]["rmse"]["splits"]) == 2
    coverage = results["sets"]["line"]["ours"]["coverage"]
    assert coverage["0.8"]["conformal"]["covered"] >= 0.5
    assert coverage["0.95"]["conformal"]["width"] is None  # infinite: ten held-out rows are too few for 95 %
    assert "1.109 ± 0.085" in capsys.readouterr().out


def test_an_unknown_set_is_a_wrong_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nope", "--data", str(folder)])
    assert "there are: line, yacht" in capsys.readouterr().err


def test_a_section_is_put_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    put_section(readme, "one\n")
    put_section(readme, "two\n")
    assert readme.read_text() == "# Benchmarks\n\n<!-- uci -->\ntwo\n<!-- /uci -->\n"
    readme.write_text("above\n<!-- uci --><!-- /uci -->\nbelow\n")
    put_section(readme, "three\n")
    assert readme.read_text() == "above\n<!-- uci -->\nthree\n<!-- /uci -->\nbelow\n"


def test_the_kept_results_make_the_section_of_the_readme() -> None:
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    text = markdown(json.loads((benchmarks / "results" / "uci.json").read_text(encoding="utf-8")))
    assert text in (benchmarks / "README.md").read_text(encoding="utf-8")
