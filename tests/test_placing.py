"""Placing: a model folder is whole or not there, whoever else writes, and nothing but a model is replaced."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import verified, written

from mcdrop.errors import ArtifactError
from mcdrop.locks import alone
from mcdrop.placing import anew, put_file, swap
from mcdrop.store import MANIFEST, read_manifest


def test_a_file_can_be_put_into_a_folder_that_is_whole(tmp_path: Path) -> None:
    folder = written(tmp_path / "net" / "1")
    put_file(folder, "more.json", b"{}")
    put_file(folder, "more.json", b"[]")
    verified(folder)
    assert (folder / "more.json").read_bytes() == b"[]"
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
    (folder / "weights.bin").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match="sha256"):
        put_file(folder, "more.json", b"{}")
    assert (folder / "more.json").read_bytes() == b"[]"


def test_a_model_that_cannot_be_moved_back_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, beside = written(tmp_path / "net" / "1"), written(tmp_path / "net" / ".writing")
    rename = Path.rename

    def only_aside(self: Path, target: Path) -> Path:
        if self != folder:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_aside)
    with pytest.raises(PermissionError):
        swap(beside, folder)
    (kept,) = folder.parent.glob(".replaced-*/old")
    verified(kept)


def test_what_is_no_model_is_not_swapped_out(tmp_path: Path) -> None:
    beside, store = written(tmp_path / ".writing"), written(tmp_path / "store" / "net" / "1").parents[1]
    for target in (store, store / "net", store / "net" / "1" / "weights.bin"):
        with pytest.raises(ArtifactError, match=r"'net'|'1'|weights.bin is a file"):
            swap(beside, target)
    verified(store / "net" / "1")


def test_a_folder_that_is_written_again_keeps_its_modes(tmp_path: Path) -> None:
    folder = written(tmp_path / "net" / "1")
    for path, mode in ((folder / "weights.bin", 0o640), (folder / MANIFEST, 0o600), (folder, 0o700)):
        path.chmod(mode)
    put_file(folder, "more.json", b"{}")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"1": 0o700, "weights.bin": 0o640, MANIFEST: 0o600, "more.json": 0o600}


# -- several writers ---------------------------------------------------------------------------------------------------


def fill(beside: Path, name: str) -> None:
    """Puts a whole model into an empty folder."""
    model = written(beside.parent / f".model-{name}" / "1", name=name)
    for path in model.iterdir():
        path.rename(beside / path.name)
    model.rmdir()
    model.parent.rmdir()


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at_once(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_was_saved_meanwhile_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "net" / "1"

    def save_both() -> None:
        with anew(target, overwrite=False) as late, anew(target, overwrite=False) as early:  # which ends first
            fill(early, "early")
            fill(late, "late")

    with pytest.raises(ArtifactError, match="1 exists; choose another version or give overwrite=True"):
        save_both()
    verified(target)
    assert 'name = "early"' in (target / MANIFEST).read_text()
    assert inside(target.parent) == ["1"]


def test_writers_of_one_folder_take_turns(tmp_path: Path) -> None:
    target, failed = tmp_path / "net" / "1", []

    def write(name: str) -> None:
        try:
            for _ in range(150):
                with anew(target) as beside:
                    fill(beside, name)
        except Exception as error:
            failed.append(error)

    at_once(*(lambda name=name: write(name) for name in "abc"))
    assert failed == []
    verified(target)
    assert inside(target.parent) == ["1"]


def test_what_is_put_in_does_not_undo_what_was_saved_meanwhile(tmp_path: Path) -> None:
    target = written(tmp_path / "net" / "1")
    putting = threading.Thread(target=put_file, args=(target, "more.json", b"{}"))
    with alone(target.parent):
        putting.start()
        putting.join(0.5)  # time enough to copy the old model, were it not waiting
        swap(written(tmp_path / "net" / ".new", name="new", version="1"), target)
    putting.join()
    verified(target)
    assert (read_manifest(target)["name"], (target / "more.json").read_bytes()) == ("new", b"{}")


def test_what_was_made_for_one_model_is_not_put_into_another(tmp_path: Path) -> None:
    target = written(tmp_path / "net" / "1")
    made_for = read_manifest(target)
    put_file(target, "more.json", b"[]", made_for=made_for)
    put_file(target, "more.json", b"{}", made_for=made_for)  # its own earlier file is no other model
    swap(written(tmp_path / "net" / ".new", name="new", version="1"), target)
    with pytest.raises(ArtifactError, match=r"1 has changed since more\.json was made for it"):
        put_file(target, "more.json", b"{}", made_for=made_for)
    assert not (target / "more.json").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    target = tmp_path / "net" / "1"

    def save() -> None:
        with anew(target) as beside:
            fill(beside, "net")
            monkeypatch.setattr(Path, "rename", refuse)

    with pytest.raises(ArtifactError, match=r"cannot write .*1: Permission denied"):
        save()
    assert inside(target.parent) == []


def test_what_a_killed_writer_left_goes_after_a_day_and_nothing_else(tmp_path: Path) -> None:
    parent, day = tmp_path / "net", 24 * 3600
    ages = {".writing-mcdrop-old": 2 * day, ".writing-mcdrop-new": day // 2, ".writing-notes": 2 * day, "1": 2 * day}
    for name, age in ages.items():
        folder = written(parent / name)
        os.utime(folder, (time.time() - age,) * 2)
    with anew(parent / "2") as beside:
        fill(beside, "net")
    assert inside(parent) == [".writing-mcdrop-new", ".writing-notes", "1", "2"]


def test_a_writer_at_work_is_not_taken_for_a_killed_one(tmp_path: Path) -> None:
    """A copied folder would be as old as the one that it is a copy of."""
    target = written(tmp_path / "net" / "1")
    os.utime(target, (0, 0))
    put_file(target, "more.json", b"{}")
    assert target.stat().st_mtime > time.time() - 3600
