"""A store of model folders, ``STORE/NAME/VERSION``: manifests, hashes and what may lie in a folder. Needs no torch."""

import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcdrop.errors import ArtifactError, ModelNotFound
from mcdrop.streams import path_of

__all__ = [
    "FILE_BYTES",
    "FORMAT",
    "MANIFEST",
    "Entry",
    "check_name",
    "is_plain_file",
    "list_models",
    "name_and_version",
    "read_manifest",
    "resolve",
    "sha256",
    "verify",
]

MANIFEST = "model.toml"
FORMAT = 1
FILE_BYTES = 16 * 2**30  # of a file of a model folder, at most

_MANIFEST_BYTES = 2**20
_LOST = "lost+found"  # which a file system has at its root, for nobody to read
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Entry:
    """One version of one model in a store."""

    name: str
    version: str
    folder: Path
    manifest: dict[str, Any]


def check_name(name: str, advice: str = "") -> None:
    """Refuses a name or version that could not be a folder, or a part of an address; ``advice`` ends what is said.

    Raises:
        ArtifactError: it is no text, holds anything but letters, digits, '.', '_' and '-', or does not begin with the
            first two.
    """
    if not isinstance(name, str):
        raise ArtifactError(f"a name or version must be a text, got {name!r}; give it as {str(name)!r}")
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} cannot be a name or version: use letters, digits, '.', '_' and '-'{advice}")


def name_and_version(folder: Path, name: str, version: str | None) -> tuple[str, str]:
    """Gives a model's name and version: what is not given is read off its place, STORE/NAME/VERSION.

    The version is "1" where the folder's own name cannot be one.

    Raises:
        ArtifactError: one of them cannot be a name.
    """
    name = name or folder.parent.name or folder.resolve().parent.name
    if version is None:
        own = folder.name or folder.resolve().name
        version = own if _NAME.fullmatch(own) else "1"
    check_name(name, "; give another as name=")
    check_name(version)
    return name, version


def list_models(store: str | Path) -> list[Entry]:
    """Lists the model folders of a store by name and version, oldest version first; reads manifests only.

    Raises:
        InputError: what was given is no path.
        ArtifactError: the store is not a folder, or a folder or a manifest in it cannot be read.
    """
    root = path_of(store)
    status = _status(root)
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise ModelNotFound(f"{root} is not a folder of models")
    entries = [_entry(version) for name in _inside(root) for version in _models(name)]
    return sorted(entries, key=lambda entry: (entry.name, _version_key(entry.version)))


def is_plain_file(path: Path) -> bool:
    """Says whether a file lies there, and not a folder or nothing.

    Raises:
        ArtifactError: the system does not tell.
    """
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def _models(folder: Path) -> list[Path]:
    """The folders in a folder that have a manifest."""
    return [path for path in _inside(folder) if _status(path / MANIFEST) is not None]


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder, but for what is hidden; nothing where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != _LOST)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a text that no path can be
        return []
    except OSError as error:
        raise _unreadable(folder, error) from None


def _status(path: Path) -> os.stat_result | None:
    """What the system tells of a path; None where nothing is there."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read: {error.strerror or error}")


def _version_key(version: str) -> list[tuple[int, int, str]]:
    """Orders 9 before 10, 1.9 before 1.10, and v9 before v10."""
    parts = re.findall(r"\d+|[^\d._-]+", version)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _entry(folder: Path) -> Entry:
    manifest = read_manifest(folder)
    return Entry(str(manifest["name"]), str(manifest["version"]), folder, manifest)


def resolve(folder: str | Path) -> Path:
    """Gives the folder itself if it is a model, or the newest version in it, as the manifests have them.

    Raises:
        ModelNotFound: it is neither.
        ArtifactError: a folder in it, or one of several manifests, cannot be read, so that it is not known which is the
            newest.
    """
    place = Path(folder)
    if is_plain_file(place / MANIFEST):
        return place
    versions = _models(place)
    if not versions:
        raise ModelNotFound(f"there is no model at {place}: neither {MANIFEST} nor a version folder that has one")
    if len(versions) == 1:
        return versions[0]
    return sorted(map(_entry, versions), key=lambda entry: _version_key(entry.version))[-1].folder


def read_manifest(folder: Path, *, pin: str | None = None) -> dict[str, Any]:
    """Gives the manifest of a model folder, whose sha256 must be the ``pin`` where there is one.

    Raises:
        ArtifactError: it cannot be read, is another one, or lacks what every manifest has.
    """
    path = folder / MANIFEST
    _check_plain(path, _MANIFEST_BYTES)
    try:
        content = path.read_bytes()
        if pin is not None and hashlib.sha256(content).hexdigest() != pin.lower():
            raise ArtifactError(f"{path} is not the manifest that was asked for (its sha256 differs)")
        manifest = tomllib.loads(content.decode())
    except (ValueError, RecursionError, OSError) as error:  # not TOML, not text, numbers or brackets without end
        raise ArtifactError(f"{path} is not a readable manifest: {error}") from None
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} has format {manifest.get('format')!r}; this version reads format {FORMAT}")
    missing = {"name", "version", "task", "weights", "inputs", "defaults", "sha256"} - manifest.keys()
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}")
    check_name(str(manifest["name"]))
    check_name(str(manifest["version"]))
    return manifest


def _check_plain(path: Path, most: int) -> None:
    """Refuses links, pipes and the like, and files above a size, before anything is read."""
    try:
        status = path.lstat()
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ArtifactError(f"{path} must be a plain file, not a link or a special file")
    if status.st_size > most:
        raise ArtifactError(f"{path} has {status.st_size} bytes, above the limit of {most}")


def sha256(path: Path) -> str:
    """Gives the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks every file of a model folder against the manifest's sha256.

    Raises:
        ArtifactError: a file is missing, changed, added, or not a plain file that can be read.
        FileNotFoundError: one is gone since it was listed.
    """
    expected = manifest["sha256"]
    try:
        names = {path.name for path in folder.iterdir()} - {MANIFEST}
        if not isinstance(expected, dict) or names != set(expected):
            raise ArtifactError(f"{folder} holds {sorted(names)}, its manifest lists {sorted(expected)}")
        for name in sorted(names):
            _check_plain(path := folder / name, FILE_BYTES)
            if sha256(path) != expected[name]:
                raise ArtifactError(f"{path} is not the file that its manifest was written for (sha256 differs)")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from None
