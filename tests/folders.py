"""Model folders without a model: a manifest and one file."""

from pathlib import Path
from typing import Any

import tomli_w

from mcdrop.store import FORMAT, MANIFEST, read_manifest, sha256, verify

__all__ = ["verified", "written"]


def written(folder: Path, **more: Any) -> Path:
    """A folder with a whole manifest and one file."""
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights")
    manifest = {
        "format": FORMAT, "name": folder.parent.name, "version": folder.name, "task": "regression", "weights": {},
        "inputs": [], "defaults": {}, "sha256": {"weights.bin": sha256(folder / "weights.bin")},
    }  # fmt: skip
    (folder / MANIFEST).write_text(tomli_w.dumps(manifest | more))
    return folder


def verified(folder: Path) -> None:
    verify(folder, read_manifest(folder))
