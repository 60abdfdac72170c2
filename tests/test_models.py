"""The reference networks, their data, and the script that trains them into a store."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mcdrop
from models import data, networks, recipes, train

NAMES = [name for name, reference in train.REFERENCES.items() if not reference.on_request]


def quiet(*_: object) -> None:
    """Progress that nobody looks at."""


def correct(network: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """The share of rows whose largest logit is at their label."""
    with torch.no_grad():
        return float((network(torch.from_numpy(x)).argmax(dim=1).numpy() == y).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the models of every start, trained once for all tests here."""
    folder = tmp_path_factory.mktemp("models") / "store"
    assert train.main(["--store", str(folder)]) == 0
    return folder


# -- networks ----------------------------------------------------------------------------------------------------------


def test_the_line_net_is_as_published() -> None:
    layers = list(networks.noisy_line().children())
    kinds = [nn.Linear, nn.Dropout, nn.ReLU, nn.Linear, nn.Dropout, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in layers] == kinds
    sizes = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert sizes == [(1, 100), (100, 100), (100, 1)]
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.5, 0.2]


@pytest.mark.parametrize("hidden_layers", [2, 3])
@pytest.mark.parametrize("inputs", [64, 784])
def test_the_digit_net_has_dropout_in_every_later_hidden_layer(hidden_layers: int, inputs: int) -> None:
    network = networks.digits(hidden_layers, inputs)
    layers = list(network.children())
    later = [nn.Linear, nn.Dropout, nn.Sigmoid] * (hidden_layers - 1)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Sigmoid, *later, nn.Linear]
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.2}
    assert network(torch.zeros(5, inputs)).shape == (5, 10)


def test_a_digit_net_without_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        networks.digits(1)


# -- data --------------------------------------------------------------------------------------------------------------


def test_the_line_has_50_points_with_noise_of_three_tenths() -> None:
    x, y = data.noisy_line_data(seed=3)
    np.testing.assert_array_equal(x, np.linspace(-1, 1, 50, dtype=np.float32)[:, None])
    assert y.shape == (50, 1)
    assert y.dtype == np.float32
    assert abs((y - x).std() - 0.3) < 3 * 0.3 / np.sqrt(2 * 50)  # three standard errors
    assert not np.array_equal(y, data.noisy_line_data(seed=4)[1])


def test_the_parts_of_the_digits_are_disjoint_and_whole() -> None:
    from sklearn.datasets import load_digits

    split = data.digits_data()
    x, y = load_digits(return_X_y=True)
    parts = [(split.x_train, split.y_train), (split.x_reference, split.y_reference), (split.x_test, split.y_test)]
    rows = [(*row, label) for part, labels in parts for row, label in zip(part * 16, labels, strict=True)]
    assert sorted(rows) == sorted((*row, label) for row, label in zip(x, y, strict=True))
    assert [len(part) for part, _ in parts] == [1197, 300, 300]
    assert split.x_train.min() == 0.0
    assert split.x_train.max() == 1.0


def test_mnist_that_is_not_there_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MCDROP_DATA", str(tmp_path))
    assert train.main(["--store", str(tmp_path / "store"), "--only", "mnist"]) == 1
    said = capsys.readouterr().err
    assert said == f"error: no MNIST in {tmp_path / 'mnist'}; set MCDROP_DATA to the folder that holds mnist/\n"
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_the_digit_net_learns_mnist() -> None:
    try:
        split = data.mnist_data()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [len(x) for x in (split.x_train, split.x_reference, split.x_test)] == [60000, 2000, 8000]
    assert np.bincount(split.y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # LeCun
    assert correct(recipes.mnist(quiet).network, split.x_test, split.y_test) >= 0.95


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_digit_net_reads_digits_that_it_has_not_seen() -> None:
    split, trained = data.digits_data(), recipes.digits(quiet)
    assert correct(trained.network, split.x_reference, split.y_reference) >= 0.95
    assert correct(trained.network, split.x_test, split.y_test) >= 0.95
    np.testing.assert_array_equal(trained.reference, split.x_reference)


def test_the_line_net_learns_the_line() -> None:
    x = np.linspace(-1, 1, 21, dtype=np.float32)[:, None]
    y = recipes.noisy_line(quiet).network(torch.from_numpy(x)).detach().numpy()
    assert np.abs(y - x).mean() < 0.3 / 2  # half the noise


@pytest.mark.parametrize("recipe", [recipes.noisy_line, recipes.digits])
def test_training_gives_the_same_weights_whatever_the_global_generator(
    recipe: Callable[..., recipes.Trained],
) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    first = recipe(quiet, epochs=3).network.state_dict()
    before = torch.manual_seed(2).get_state()
    second = recipe(quiet, epochs=3).network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_trained_network_is_in_eval_mode() -> None:
    assert not any(module.training for module in recipes.noisy_line(quiet, epochs=1).network.modules())


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    recipes.noisy_line(lambda done, of: seen.append((done, of)), epochs=3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


# -- the store ---------------------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_run_does_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(trained)
    assert train.main(["--store", str(trained)]) == 0
    assert stamps(trained) == before
    printed = capsys.readouterr()
    assert printed.out == f"models in {trained}: noisy-line, digits (0 trained now)\n"
    assert printed.err == ""


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")])
def test_a_harmed_model_is_trained_again(trained: Path, tmp_path: Path, harm: Callable[[Path], object]) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "noisy-line" / train.VERSION / "weights.safetensors"
    whole = weights.read_bytes()
    harm(weights)
    assert train.ensure(tmp_path, ["noisy-line"], quiet) == ["noisy-line"]
    assert weights.read_bytes() == whole
    assert train.missing(tmp_path, ["noisy-line"]) == []


def test_force_trains_what_is_there(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert train.ensure(tmp_path, ["noisy-line"], quiet, force=True) == ["noisy-line"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_training_leaves_no_model(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(_: str, done: int, __: int) -> None:
        if done == 5:
            raise error

    with pytest.raises(error):
        train.ensure(tmp_path, ["noisy-line"], stop)
    assert list(tmp_path.rglob("*")) == []


def test_every_model_of_the_store_loads_and_flags(trained: Path) -> None:
    for name in NAMES:
        model = mcdrop.load(trained / name)
        assert (model.name, model.version) == (name, train.VERSION)
        assert model.screen is not None
        assert model.screen.fpr == 0.01


def test_the_line_is_least_sure_where_it_has_seen_nothing(trained: Path) -> None:
    prediction = mcdrop.predict(mcdrop.load(trained / "noisy-line"), [[0.0], [0.5], [4.0], [-6.0]])
    assert prediction.is_anomaly is not None
    assert prediction.is_anomaly.tolist() == [False, False, True, True]


@pytest.mark.statistical
def test_fresh_digits_are_flagged_as_rarely_as_promised(trained: Path) -> None:
    split = data.digits_data()
    prediction = mcdrop.predict(mcdrop.load(trained / "digits"), split.x_test)
    assert prediction.is_anomaly is not None
    rate, rows, reference = 0.01, len(split.x_test), len(split.x_reference)
    error = np.sqrt(rate * (1 - rate) * (1 / rows + 1 / reference))
    assert (
        prediction.is_anomaly.mean() < rate + 3 * error
    )  # three standard errors, those of the reference rows included
    assert mcdrop.predict(mcdrop.load(trained / "digits"), np.ones((1, 64))).is_anomaly


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert train.main(["--store", str(tmp_path / "store"), "--only", "noisy-line"]) == 1
    assert "Permission denied" in capsys.readouterr().err
