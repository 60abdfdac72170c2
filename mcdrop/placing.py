"""How a model folder comes to its place: written beside it and renamed, whole or not at all, one writer at a time."""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mcdrop.errors import ArtifactError
from mcdrop.locks import alone
from mcdrop.store import MANIFEST, read_manifest, sha256, verify

__all__ = ["anew", "check_replaceable", "check_writable", "put_file", "swap"]

_BESIDE = ".writing-mcdrop-"  # a name that nobody else gives: what is left under it is deleted
_LEFT = 24 * 3600  # seconds without a new file, after which whoever wrote there is taken to be gone


def put_file(folder: Path, name: str, content: bytes, *, made_for: Mapping[str, Any] | None = None) -> None:
    """Puts a file into a model folder, or another in its place, and renews the manifest; whole or not at all.

    ``made_for`` is the manifest that the folder had when the file was made for its model.

    Raises:
        ArtifactError: the folder differs from its manifest, nothing can be written beside it, or it holds another model
            than the file was made for.
    """
    import tomli_w

    folder = folder.resolve()  # a link to a version stays one, and no folder can be moved under the name "."
    with _beside(folder) as beside, _alone(folder):  # from the first look on: what is saved meanwhile is not undone
        manifest = read_manifest(folder)
        verify(folder, manifest)
        if made_for is not None and _without(made_for, name) != _without(manifest, name):
            raise ArtifactError(f"{folder} has changed since {name} was made for it; make it again")
        for path in folder.iterdir():
            shutil.copy2(path, beside)
        (beside / name).write_bytes(content)
        manifest["sha256"][name] = sha256(beside / name)
        (beside / MANIFEST).write_text(tomli_w.dumps(manifest), encoding="utf-8")
        swap(beside, folder)


def _without(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**manifest, "sha256": {key: value for key, value in manifest["sha256"].items() if key != name}}


@contextmanager
def anew(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Gives an empty folder beside a model's place, which takes that place when all is in it, and else goes.

    Raises:
        ArtifactError: nothing can be written there, or what is there is no model, or is not to be replaced.
    """
    with _beside(target) as beside:
        yield beside
        with _alone(target):
            swap(beside, target, overwrite=overwrite)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Lets one writer at a time look at a model's place and change it."""
    try:
        with alone(target.parent):
            yield
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from None


def check_writable(folder: Path) -> None:
    """Tries whether a model folder can be written again, before the work is done that it is to hold.

    Raises:
        ArtifactError: it cannot.
    """
    with _beside(folder.resolve()):
        pass


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target.parent)
        beside = Path(tempfile.mkdtemp(prefix=_BESIDE, dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from None
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _remove_left(parent: Path) -> None:
    """Removes what killed writers left; one that still writes may be on another machine, so only its age tells."""
    for left in parent.glob(f"{_BESIDE}*"):
        with suppress(OSError):  # another removes it too
            if time.time() - left.lstat().st_mtime > _LEFT:
                shutil.rmtree(left, ignore_errors=True)


def check_replaceable(target: Path, *, overwrite: bool = True) -> None:
    """Refuses a place where something would be lost that is no model: all that lies there is deleted for the new one.

    Raises:
        ArtifactError: it is neither free, nor an empty folder, nor a saved model with its own files alone; without
            ``overwrite`` it is not free.
    """
    if not os.path.lexists(target):
        return
    if target.exists() and not overwrite:
        raise ArtifactError(f"{target} exists; choose another version or give overwrite=True")
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file, no folder of a model, and is not replaced; choose another place")
    there = {path.name for path in target.iterdir()}
    listed = read_manifest(target)["sha256"] if MANIFEST in there else {}
    own = set(listed) if isinstance(listed, dict) else set()
    more = sorted(name for name in there - {MANIFEST} if name not in own or (target / name).is_dir())
    if more:
        what = ", ".join(map(repr, more[:5])) + ", ..." * (len(more) > 5)
        raise ArtifactError(
            f"{target} holds {what}, which a saved model does not, and which would be lost; give the folder of one "
            "version, STORE/NAME/VERSION, or move that away"
        )


def swap(beside: Path, target: Path, *, overwrite: bool = True) -> None:
    """Renames a new folder into place; an old model is moved aside first, and back if that fails.

    Raises:
        ArtifactError: what is there is no model, or is not to be replaced.
    """
    check_replaceable(target, overwrite=overwrite)  # again: another may have saved there meanwhile
    # a temporary folder and its files are their owner's alone; a model is for whoever serves it, or as it was before
    usual = _mode(target / MANIFEST, 0o644)
    for path in beside.iterdir():
        path.chmod(_mode(target / path.name, usual))
    beside.chmod(_mode(target, 0o755))
    if not target.exists():
        beside.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=target.parent)) / "old"
    try:
        target.rename(old)
        beside.rename(target)
    except BaseException:  # Ctrl-C too
        if old.exists():
            old.rename(target)
        old.parent.rmdir()
        raise
    shutil.rmtree(old.parent, ignore_errors=True)


def _mode(path: Path, usual: int) -> int:
    """The mode of what is there, else the usual one."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else usual
