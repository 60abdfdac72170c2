"""Model folders that were tampered with: refused, or harmless; and no code of a stranger ever runs."""

import itertools
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from factories import X, saved
from safetensors.numpy import save

import mcdrop
import mcdrop.factory
from mcdrop.errors import ArtifactError, InputError, MCDropError, ModelNotFound
from mcdrop.store import MANIFEST, sha256


@pytest.fixture(autouse=True)
def _these_networks_may_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcdrop.factory, "FACTORY_MODULES", (*mcdrop.factory.FACTORY_MODULES, "factories"))


def rewritten(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(tomli_w.dumps(manifest))


def manifest_of(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / MANIFEST).read_text())


def test_any_changed_byte_of_any_file_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    for path in (folder / "weights.safetensors", folder / "example.safetensors"):
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 25).astype(int):
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match=r"is not the file that its manifest was written for \(sha256"):
                mcdrop.load(folder)
        for other in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(other)
            with pytest.raises(ArtifactError, match="sha256"):
                mcdrop.load(folder)
        path.write_bytes(whole)
    mcdrop.load(folder)


def test_a_damaged_file_with_a_fitting_hash_is_refused_or_harmless(tmp_path: Path) -> None:
    """Who can rewrite the manifest can change numbers, but not crash the reader."""
    _, folder = saved(tmp_path)
    refused = 0
    for name in ("weights.safetensors", "example.safetensors"):
        whole = (folder / name).read_bytes()
        for place in range(0, 120, 5):
            changed = bytearray(whole)
            changed[place] ^= 0x14
            (folder / name).write_bytes(changed)
            manifest = manifest_of(folder)
            rewritten(folder, manifest | {"sha256": manifest["sha256"] | {name: sha256(folder / name)}})
            try:
                mcdrop.load(folder)
            except MCDropError:
                refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 30


def change(folder: Path, path: tuple[Any, ...], value: Any) -> None:
    manifest = manifest_of(folder)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    rewritten(folder, manifest)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def test_names_that_are_not_one_for_each_column_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    for names in (["a", "b", "a ", "c"], "abcd"):
        change(folder, ("features",), names)
        with pytest.raises(ArtifactError, match=r"model\.toml: features must be"):
            mcdrop.load(folder)


def test_a_manifest_with_a_part_missing_or_of_another_kind_is_refused_or_harmless(tmp_path: Path) -> None:
    """Never an error that is not this library's; and what still loads has the same weights and sites."""
    model, folder = saved(tmp_path)
    screen = mcdrop.fit_screen(model, X, fpr=0.05, passes=4)
    folder = mcdrop.save(model, folder, factory="factories:plain", screen=screen, overwrite=True)
    good = (folder / MANIFEST).read_text()
    paths = [path for path in paths_of(manifest_of(folder)) if path[0] != "sha256"]
    expected = mcdrop.predict(model, X, passes=5, seed=1).deterministic
    kinds = itertools.cycle(("x", -1, []))  # of another kind, each in its turn
    for path, value in itertools.chain.from_iterable(((path, KeyError), (path, next(kinds))) for path in paths):
        change(folder, path, value)
        try:
            found = mcdrop.load(folder)
        except MCDropError:
            pass
        else:
            if found.task == model.task and path[0] not in ("inputs", "task"):
                answer = mcdrop.predict(found, X, passes=5, seed=1, interval="mean", screen=screen)
                np.testing.assert_array_equal(answer.deterministic, expected)
        (folder / MANIFEST).write_text(good)


@pytest.mark.parametrize("key", ["format", "name", "version", "task", "weights", "inputs", "defaults", "sha256"])
def test_a_manifest_without_what_every_manifest_has_is_refused_by_name(tmp_path: Path, key: str) -> None:
    _, folder = saved(tmp_path)
    change(folder, (key,), KeyError)
    with pytest.raises(ArtifactError, match=key):
        mcdrop.load(folder)


def rehashed(folder: Path, name: str, content: bytes) -> None:
    """Another file under the same name, with its hash in the manifest."""
    (folder / name).write_bytes(content)
    change(folder, ("sha256", name), sha256(folder / name))


def test_a_screen_that_could_flag_nothing_or_that_is_of_another_network_is_refused(tmp_path: Path) -> None:
    """It would be asked for the first time by a request."""
    model, folder = saved(tmp_path)
    screen = mcdrop.fit_screen(model, X, fpr=0.05, passes=4)
    folder = mcdrop.save(model, folder, factory="factories:plain", screen=screen, overwrite=True)
    scores = screen.scores
    for rows, values, said in (
        (X, np.full(len(X), np.nan), r"a score for each of its 30 rows, got .* 30 of them NaN"),
        (X, scores[:-1], r"a score for each of its 30 rows, got an array of shape \(29,\)"),
        (X[:, :3], scores, r"rows of another network: .* must have the shape \(N, 4\), got \(N, 3\)"),
    ):
        rehashed(folder, "screen.safetensors", save({"input.0": rows.copy(), "scores": values}))
        with pytest.raises(ArtifactError, match=said):
            mcdrop.load(folder)
    lost = np.where(np.arange(len(X)) == 1, np.nan, scores)  # stranger than all numbers, which is no harm
    rehashed(folder, "screen.safetensors", save({"input.0": X, "scores": lost}))
    assert mcdrop.load(folder).screen is not None


def test_a_calibration_of_brackets_without_end_is_refused(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    calibration = mcdrop.calibrate(model, X, np.zeros((len(X), 2)), passes=4)
    mcdrop.save(model, folder, factory="factories:plain", calibration=calibration, overwrite=True)
    for content in (b"[" * 100_000, b"\xff", b"{"):
        rehashed(folder, "calibration.json", content)
        with pytest.raises(ArtifactError, match=r"calibration\.json is not JSON"):
            mcdrop.load(folder)


def test_a_pin_is_a_text(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    for path in (folder, folder / "weights.safetensors"):
        with pytest.raises(InputError, match=r"sha256 must be a text of 64 hexadecimal digits.*, got 5"):
            mcdrop.load(path, sha256=5)  # type: ignore[arg-type]


ELSEWHERE = [
    "os:system",
    "subprocess:run",
    "builtins:exec",
    "torch:load",
    "models.networks",
    "models:",
    "../x:f",
    "a b:f",
]


MORE_THAN_BUILDERS = [
    "models.train:main", "models.networks:nn", "models.recipes:noisy_line", "mcdrop:load", "mcdrop.artifact:save",
    "mcdrop.store:put_file", "mcdrop.factory:importlib", "mcdrop.cli:main", "models.networks:__import__",
    "timm.models._helpers:load_state_dict", "timm.utils:model", "torchvision.datasets.utils:download_url",
    "transformers:pipeline",
]  # fmt: skip


@pytest.mark.parametrize("factory", MORE_THAN_BUILDERS)
def test_a_function_that_is_no_builder_is_never_called(
    tmp_path: Path, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packages of networks can also train, write, fetch and unpickle."""
    _, folder = saved(tmp_path)
    change(folder, ("weights", "factory"), factory)
    change(folder, ("weights", "arguments"), {"argv": ["--store", str(tmp_path / "owned")]})
    with pytest.raises(ArtifactError, match=r"of one of|is defined in|cannot be imported"):
        mcdrop.load(folder)
    assert not (tmp_path / "owned").exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["weights", "pretrained", "checkpoint_path", "pretrained_cfg"])
def test_a_builder_may_not_read_weights_from_elsewhere(tmp_path: Path, name: str) -> None:
    _, folder = saved(tmp_path)
    change(folder, ("weights", "arguments"), {name: "evil.pth"})
    with pytest.raises(ArtifactError, match=rf"must not read weights from elsewhere \({name}\)"):
        mcdrop.load(folder)
    odd = ("hf-\thub", "\x01hf-hub", "\x00 HF-HUB", "local-\rdir", "h\nf_hub")  # the same to urlsplit
    for source in ("hf-hub", "HF-Hub", " hf_hub", "HF_HUB ", "local-dir", "Local-Dir", *odd):  # in any case to timm
        change(folder, ("weights", "arguments"), {"model_name": f"{source}:stranger/net"})
        with pytest.raises(ArtifactError, match="must not read weights from elsewhere"):
            mcdrop.load(folder)


def test_a_builder_that_would_fetch_a_backbone_is_told_not_to(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    mcdrop.save(model, folder, factory="factories:backboned", overwrite=True)
    np.testing.assert_array_equal(
        mcdrop.predict(mcdrop.load(folder), X, passes=5).mean, mcdrop.predict(model, X, passes=5).mean
    )


def test_a_library_that_breaks_while_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm, where torchvision does not fit torch: operator torchvision::nms does not exist."""
    _, folder = saved(tmp_path)
    (tmp_path / "broken_nets.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(mcdrop.factory, "FACTORY_MODULES", ("broken_nets",))
    change(folder, ("weights", "factory"), "broken_nets:net")
    with pytest.raises(ArtifactError, match=r"'broken_nets:net' cannot be imported: RuntimeError: operator does not"):
        mcdrop.load(folder)


@pytest.mark.parametrize("factory", ELSEWHERE)
def test_a_factory_out_of_the_allowed_packages_is_never_called(tmp_path: Path, factory: str) -> None:
    _, folder = saved(tmp_path)
    change(folder, ("weights", "factory"), factory)
    change(folder, ("weights", "arguments"), {"command": f"touch {tmp_path}/owned"})
    with pytest.raises(ArtifactError, match=r"must be 'package.module:function' of one of"):
        mcdrop.load(folder)
    assert not (tmp_path / "owned").exists()


def test_a_network_with_other_live_sites_than_promised_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    change(folder, ("sites",), [])
    with pytest.raises(ArtifactError, match=r"has the live sites .*, its manifest promises \[\]"):
        mcdrop.load(folder)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle in place of the weights is not read, whatever the manifest says."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/owned",)

    _, folder = saved(tmp_path)
    torch.save({"weight": Evil()}, folder / "weights.safetensors")
    change(folder, ("sha256", "weights.safetensors"), sha256(folder / "weights.safetensors"))
    with pytest.raises(ArtifactError, match="does not fit the network"):
        mcdrop.load(folder)
    assert not (tmp_path / "owned").exists()


def test_there_must_be_a_model(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nope", tmp_path / "nope" / ".."):
        with pytest.raises(ModelNotFound, match="there is no model at"):
            mcdrop.load(place)


def test_what_was_injected_is_a_text(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    assert mcdrop.load(folder).audit.injected is None  # as in every folder without the line
    for value in (1, True, ["dropout"]):
        rewritten(folder, {**manifest_of(folder), "injected": value})
        with pytest.raises(ArtifactError, match="must hold texts as description and injected"):
            mcdrop.load(folder)
