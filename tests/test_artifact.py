"""Model folders: what comes back is what was saved, and a save that is stopped leaves nothing."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import FACTORIES, IDS, MEANWHILE, Named, Slow, X, plain, saved, trained
from torch import nn

import mcdrop
import mcdrop.factory
from mcdrop.errors import ArtifactError, InputError
from mcdrop.store import list_models
from models.networks import noisy_line


@pytest.fixture(autouse=True)
def _these_networks_may_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcdrop.factory, "FACTORY_MODULES", (*mcdrop.factory.FACTORY_MODULES, "factories"))


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_what_is_loaded_answers_as_what_was_saved(tmp_path: Path, name: str) -> None:
    model, folder = saved(tmp_path, name)
    before = torch.get_rng_state()
    loaded = mcdrop.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    for x in (FACTORIES[name][1], FACTORIES[name][1]):
        ours, theirs = (mcdrop.predict(m, x, passes=20, seed=5) for m in (model, loaded))
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.variance, theirs.variance)
        np.testing.assert_array_equal(ours.deterministic, theirs.deterministic)
    assert loaded.inputs == model.inputs
    assert not any(tensor.is_meta for tensor in loaded.module.state_dict().values())
    assert not any(module.training for module in loaded.module.modules())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    loaded = mcdrop.load(saved(tmp_path, "Tied")[1]).module
    assert loaded.there.weight is loaded.back.weight is loaded.again.weight
    with torch.no_grad():
        loaded.there.weight.fill_(7)
        assert float(loaded.back.weight.mean()) == 7


def test_a_file_that_changes_after_it_was_read_changes_no_answer(tmp_path: Path) -> None:
    """Mapped weights would become those that are written over them, and a shorter file end the process."""
    _, folder = saved(tmp_path)
    weights, loaded = folder / "weights.safetensors", mcdrop.load(folder)
    before = mcdrop.predict(loaded, X, passes=10)
    content = weights.read_bytes()
    with weights.open("r+b") as file:  # as cp does; a rename would leave the mapped file alone
        file.write(content[:-200] + bytes(200))  # other numbers under the same header
    np.testing.assert_array_equal(mcdrop.predict(loaded, X, passes=10).mean, before.mean)
    with weights.open("r+b") as file:
        file.truncate(0)
    np.testing.assert_array_equal(mcdrop.predict(loaded, X, passes=9, seed=1).deterministic, before.deterministic)


def test_a_loaded_network_can_be_trained_on(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    loaded, stored = mcdrop.load(folder), (folder / "weights.safetensors").read_bytes()
    before = {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}
    descent = torch.optim.SGD(loaded.module.parameters(), lr=0.1)
    loaded.module(torch.from_numpy(X)).square().mean().backward()
    descent.step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in loaded.module.named_parameters())
    assert (folder / "weights.safetensors").read_bytes() == stored


def test_screen_names_and_defaults_come_back(tmp_path: Path) -> None:
    model = trained(plain, X)
    screen = mcdrop.fit_screen(model, X, fpr=0.05, passes=30, seed=2)
    about: dict[str, Any] = {"description": "a net", "features": ["a", "b", "c", "d"], "arguments": {"width": 6}}
    folder = mcdrop.save(
        model, tmp_path / "net" / "2.1", factory="factories:plain", screen=screen, version="2.1", **about
    )
    loaded = mcdrop.load(folder)
    assert (loaded.name, loaded.version, loaded.description) == ("net", "2.1", "a net")
    assert loaded.features == ["a", "b", "c", "d"]
    assert loaded.task == "regression"
    assert loaded.screen is not None
    assert (loaded.screen.plan, loaded.screen.fpr, loaded.screen.score) == (screen.plan, 0.05, "variance")
    np.testing.assert_array_equal(loaded.screen.scores, screen.scores)
    ours = mcdrop.predict(model, X * 3, passes=30, seed=2, screen=screen)
    theirs = mcdrop.predict(loaded, X * 3, passes=30, seed=2)
    assert ours.p_value is not None
    assert theirs.p_value is not None
    assert theirs.is_anomaly is not None
    np.testing.assert_array_equal(ours.p_value, theirs.p_value)
    np.testing.assert_array_equal(theirs.is_anomaly, theirs.p_value <= 0.05)


@pytest.mark.parametrize("gone", [False, True])
def test_a_folder_that_is_written_anew_while_it_is_read_gives_no_mixed_model(tmp_path: Path, gone: bool) -> None:
    """The network would be of the old folder, and its screen of the new one."""
    model, made = trained(Slow, X), "factories:Slow"
    y = np.zeros((len(X), 2))
    calibration = mcdrop.calibrate(model, X, y, passes=20)
    screens = [mcdrop.fit_screen(model, x, fpr=0.05, passes=20) for x in (X, X * 20)]
    old, new = (
        mcdrop.save(model, tmp_path / name / "1", factory=made, screen=screen, calibration=calibration)
        for name, screen in zip(("net", "other"), screens, strict=True)
    )
    MEANWHILE.append((lambda: shutil.rmtree(old)) if gone else (lambda: shutil.copytree(new, old, dirs_exist_ok=True)))
    loaded = mcdrop.load(old)
    assert not MEANWHILE
    assert loaded.screen is not None
    assert loaded.calibration is not None
    np.testing.assert_array_equal(loaded.screen.scores, screens[0].scores)
    np.testing.assert_array_equal(loaded.screen.rows.leaves[0], X)


def test_inputs_by_name_keep_the_order_that_they_were_given_in(tmp_path: Path) -> None:
    """A file of tensors is in the order of the letters, which is not that of a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Named().eval()
    both = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for names in (["input_ids", "attention_mask"], ["attention_mask", "input_ids"]):
        model = mcdrop.wrap(net, example={name: both[name] for name in names})
        screen = mcdrop.fit_screen(model, both, fpr=0.05, passes=20)
        loaded = mcdrop.load(mcdrop.save(model, tmp_path / names[0] / "1", factory="factories:Named", screen=screen))
        assert [spec.name for spec in loaded.inputs] == [*loaded.example.kwargs] == names
        assert loaded.screen is not None
        assert [*loaded.screen.rows.kwargs] == names
        ours, theirs = (mcdrop.predict(one, both, passes=20, seed=1) for one in (model, loaded))
        np.testing.assert_array_equal(ours.variance, theirs.variance)
        assert theirs.p_value is not None


def test_the_newest_version_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    model = trained(plain, X)
    for version in ("9", "10", "1"):
        mcdrop.save(model, tmp_path / "net" / version, factory="factories:plain", version=version)
    assert mcdrop.load(tmp_path / "net").version == "10"


def test_versions_that_are_saved_by_their_place_alone_are_told_apart(tmp_path: Path) -> None:
    """As one name and version twice, no service would take the store."""
    model = trained(plain, X)
    for version in ("1", "2"):
        mcdrop.save(model, tmp_path / "net" / version, factory="factories:plain")
    mcdrop.save(model, tmp_path / "net" / "3", factory="factories:plain", version="4")
    assert [(entry.name, entry.version) for entry in list_models(tmp_path)] == [("net", v) for v in ("1", "2", "4")]


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, description="first")
    with pytest.raises(ArtifactError, match="exists; choose another version or give overwrite=True"):
        mcdrop.save(model, folder, factory="factories:plain")
    assert mcdrop.load(folder).description == "first"
    mcdrop.save(model, folder, factory="factories:plain", description="second", overwrite=True)
    assert mcdrop.load(folder).description == "second"
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


@pytest.mark.parametrize("place", ["store/net", "store", "store/notes", "store/net/1", "store/own"])
def test_what_is_no_model_is_never_replaced(tmp_path: Path, place: str) -> None:
    model, folder = saved(tmp_path / "store")
    mcdrop.save(model, folder.parent / "2", factory="factories:plain")
    (tmp_path / "store" / "notes").write_text("mine")
    (tmp_path / "store" / "own").mkdir()
    for mine in (folder / "mine.txt", tmp_path / "store" / "own" / "model.txt"):
        mine.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match=r"'net'|'1', '2'|'mine.txt'|'model.txt'|notes is a file"):
        mcdrop.save(model, tmp_path / place, factory="factories:plain", name="net", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / "net" / "2").mkdir(parents=True)
    assert mcdrop.load(mcdrop.save(model, tmp_path / "net" / "2", factory="factories:plain", overwrite=True))


def test_a_model_s_name_is_that_of_the_folder_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = saved(tmp_path)
    for name in ("net", "a b"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        if name == "net":
            assert mcdrop.load(mcdrop.save(model, "one", factory="factories:plain")).name == "net"
        else:
            with pytest.raises(ArtifactError, match=r"'a b' cannot be a name .* name="):
                mcdrop.save(model, "one", factory="factories:plain")


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (["a", "b", " a", "c"], r"^features must be 4 different names, but 'a' is there more than once$"),
        (["a", "b"], r"^features must be 4 names, one for each column, got 2: 'a', 'b'$"),
        ("abcd", r"^features must be a list of names, got 'abcd'$"),
        ([1, 2, 3, 4], r"^features must be a list of names, got \[1, 2, 3, 4\]$"),
    ],
)
def test_names_that_are_not_one_for_each_column_are_refused_before_anything_is_written(
    tmp_path: Path, features: Any, said: str
) -> None:
    """A table has one column of a name: it would be read twice, for two inputs."""
    model = mcdrop.wrap(plain(), example=X[:4], tuning={})
    with pytest.raises(InputError, match=said):
        mcdrop.save(model, tmp_path / "net" / "1", factory="factories:plain", features=features)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("arguments", ["abc", [1], [("width", 6)], 5])
def test_arguments_without_names_are_refused_before_anything_is_written(tmp_path: Path, arguments: Any) -> None:
    model = mcdrop.wrap(plain(), example=X[:4], tuning={})
    with pytest.raises(InputError, match="arguments must be those of the factory by name"):
        mcdrop.save(model, tmp_path / "net" / "1", factory="factories:plain", arguments=arguments)
    assert not [*tmp_path.iterdir()]


class Breaks(nn.Linear):
    """A layer whose weights cannot be written."""

    broken: BaseException

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise self.broken


def left_alone(folder: Path) -> bool:
    return [path.name for path in folder.parent.iterdir()] == ["1"] and mcdrop.load(folder).description == "first"


@pytest.mark.parametrize("broken", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_save_that_is_stopped_while_it_writes_leaves_nothing(tmp_path: Path, broken: type[BaseException]) -> None:
    _, folder = saved(tmp_path, description="first")
    layer = Breaks(4, 1)
    layer.broken = broken()
    model = mcdrop.wrap(nn.Sequential(layer, nn.Dropout(0.5)), example=X)
    for target in (folder, folder.parent / "2"):
        with pytest.raises(broken):
            mcdrop.save(model, target, factory="factories:plain", overwrite=True)
    assert left_alone(folder)


def test_a_save_that_is_stopped_while_it_reads_back_leaves_nothing(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, description="first")
    for target in (folder, folder.parent / "2"):
        with pytest.raises(KeyboardInterrupt):
            mcdrop.save(model, target, factory="factories:stops", overwrite=True)
    assert left_alone(folder)


@pytest.mark.parametrize("broken", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_save_that_is_stopped_while_it_replaces_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, broken: type[BaseException]
) -> None:
    model, folder = saved(tmp_path, description="first")
    calls, rename = itertools.count(1), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if next(calls) == nth:
            raise broken
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(ArtifactError if broken is OSError else broken):
            mcdrop.save(model, folder, factory="factories:plain", overwrite=True)
    assert left_alone(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factory": "factories:Tied"}, "does not fit the network"),
        ({"factory": "factories:plain", "arguments": {"width": 7}}, "does not fit the network"),
        ({"factory": "factories:plain", "arguments": {"nope": 7}}, "failed: TypeError"),
        ({"factory": "factories:plain", "arguments": {"width": -1}}, "failed: RuntimeError"),
        ({"factory": "factories:plain", "arguments": {"width": None}}, "cannot hold what was given"),
        ({"factory": "factories:nope"}, "cannot be imported"),
        ({"factory": "factories.nope:plain"}, "cannot be imported"),
        ({"factory": "factories:not_a_network"}, "gave a str, not a torch.nn.Module"),
        ({"factory": "os:system"}, "must be 'package.module:function' of one of: mcdrop.layers, models.networks"),
        ({"factory": "factories:plain", "name": ".."}, "'..' cannot be a name or version"),
        ({"factory": "factories:plain", "name": "a/b"}, "cannot be a name or version"),
        ({"factory": "factories:plain", "version": "../1"}, "cannot be a name or version"),
        ({"factory": "factories:plain", "version": ""}, "cannot be a name or version"),
        ({"factory": "factories:plain", "version": 2}, "must be a text, got 2; give it as '2'"),
        ({"factory": "factories:plain", "name": 3.5}, "must be a text, got 3.5; give it as '3.5'"),
        ({"factory": "factories:plain", "arguments": {1: 2}}, "cannot hold what was given"),
        ({"factory": "factories:plain", "description": "half \ud800"}, "cannot hold what was given"),
        ({"factory": "factories:plain", "features": ["a", "b", "c", "\ud800"]}, "cannot hold what was given"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        mcdrop.save(trained(plain, X), tmp_path / "net" / "1", **options)
    assert said in str(caught.value)
    assert not list((tmp_path / "net").glob("*"))


def test_a_network_with_another_dropout_than_its_factory_gives_is_not_saved(tmp_path: Path) -> None:
    net = plain()
    net.get_submodule("2").p = 0.6  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match="answers differently from the model"):
        mcdrop.save(mcdrop.wrap(net.eval(), example=X), tmp_path / "net" / "1", factory="factories:plain")
    assert not list((tmp_path / "net").glob("*"))


def test_what_a_network_was_wrapped_with_is_saved(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = noisy_line()
    x = np.linspace(-1, 1, 8)[:, None]
    model = mcdrop.wrap(net, example=x, exclude=["1"])
    by_type = mcdrop.wrap(net, example=x, include=[torch.nn.Dropout], strict=False)
    for name, one in (("path", model), ("type", by_type)):
        loaded = mcdrop.load(mcdrop.save(one, tmp_path / name / "1", factory="models.networks:noisy_line"))
        np.testing.assert_allclose(mcdrop.predict(loaded, x).mean, mcdrop.predict(one, x).mean, rtol=1e-6)
        assert [site.path for site in loaded.audit.live] == [site.path for site in one.audit.live]
    asked = {name: value for name, value in loaded.asked.items() if name != "tuning"}  # where one was timed
    assert asked == {"include": ("1", "4"), "strict": False}
    assert loaded.asked.get("tuning") == by_type.asked.get("tuning")


def test_an_output_that_a_function_picks_cannot_be_saved(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 8)[:, None]
    model = mcdrop.wrap(noisy_line(), example=x, output=lambda result: result)
    with pytest.raises(InputError, match="wrap with its name or position"):
        mcdrop.save(model, tmp_path / "line" / "1", factory="models.networks:noisy_line")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/net/1: Not a directory"):
        mcdrop.save(model, tmp_path / "file" / "net" / "1", factory="factories:plain")
