"""What lies beside the network in a model folder: its example rows, and the screen and calibration fitted to it.

A folder may be written anew while it is read. So each file is read once, and the bytes that were hashed are parsed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mcdrop.bank import Bank
from mcdrop.barefile import read_plain
from mcdrop.calibration import Calibration
from mcdrop.engine import PassPlan
from mcdrop.errors import ArtifactError, InputError, UnknownName
from mcdrop.formats import positional
from mcdrop.model import Model
from mcdrop.rowfile import read_rows, write_rows
from mcdrop.rows import Rows
from mcdrop.screening import SCORES, Screen
from mcdrop.store import FILE_BYTES

__all__ = ["CALIBRATION", "check_screen", "read_beside", "screen_head", "write_beside"]

CALIBRATION = "calibration.json"

_EXAMPLE, _SCREEN = "example.safetensors", "screen.safetensors"


def write_beside(
    folder: Path, model: Model, screen: Screen | None, calibration: Calibration | None, *, by_name: bool
) -> None:
    """Writes the files; where inputs are not given ``by_name``, all go by position."""
    write_rows(folder / _EXAMPLE, model.example if by_name else positional(model.example), {})
    if screen is not None:
        rows = screen.rows if by_name else positional(screen.rows)
        write_rows(folder / _SCREEN, rows, {"scores": screen.scores, **_bank_arrays(screen.bank)})
    if calibration is not None:
        (folder / CALIBRATION).write_text(json.dumps(calibration.to_dict(), allow_nan=False), encoding="utf-8")


def _bank_arrays(bank: Bank | None) -> dict[str, Any]:
    if bank is None:
        return {}
    state = {f"bank.{name}": value for name, value in bank.state.items()}
    return {**state, **{f"typical.{name}": value for name, value in bank.typical.items()}}


def screen_head(screen: Screen) -> dict[str, Any]:
    """Gives what the manifest says of a screen."""
    plan = {"passes": screen.plan.passes, "seed": screen.plan.seed, "sampler": screen.plan.sampler}
    head = {"score": screen.score, "fpr": screen.fpr, "weights": screen.weights, **plan}
    if screen.bank is None:
        return head
    # TOML knows no null: a default layer is left out
    layer = {} if screen.bank.layer is None else {"layer": screen.bank.layer}
    return {**head, "distance": screen.bank.distance, **layer}


def read_beside(folder: Path, manifest: Mapping[str, Any]) -> tuple[Rows, Screen | None, Calibration | None]:
    """Gives the example rows, the screen and the calibration, inputs in the order that the manifest lists them in.

    Raises:
        ArtifactError: a file is gone, is not the one that the manifest lists, or holds something else.
    """
    hashes = manifest["sha256"]
    inputs = [(str(spec["name"]), bool(spec["positional"])) for spec in manifest["inputs"]]

    def content(name: str) -> bytes:
        return read_plain(folder / name, sha256=hashes[name], most=FILE_BYTES)

    rows, _ = read_rows(content(_EXAMPLE), str(folder / _EXAMPLE), inputs)
    screen = calibration = None
    if "screen" in manifest:
        screen = _screen(manifest["screen"], *read_rows(content(_SCREEN), str(folder / _SCREEN), inputs))
    if CALIBRATION in hashes:
        calibration = _calibration(content(CALIBRATION), folder / CALIBRATION)
    return rows, screen, calibration


def _screen(head: Mapping[str, Any], rows: Rows, more: Mapping[str, Any]) -> Screen:
    UnknownName.check("score", head["score"], SCORES)
    plan = PassPlan(head["passes"], head["seed"], head["sampler"])
    bank = None
    if "distance" in head:
        parts = [
            {name.removeprefix(start): value for name, value in more.items() if name.startswith(start)}
            for start in ("bank.", "typical.")
        ]
        bank = Bank(head["distance"], head.get("layer"), *parts)
    scores = more["scores"].astype(np.float64)
    return Screen(head["score"], rows, scores, plan, head["fpr"], bank, head["weights"])


def _calibration(data: bytes, path: Path) -> Calibration:
    try:
        return Calibration.from_dict(json.loads(data))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:  # the last of brackets without end
        raise ArtifactError(f"{path} is not JSON: {error}") from error


def check_screen(folder: Path, model: Model, screen: Screen | None) -> None:
    """Refuses a screen whose rows the network does not take, or by whose scores no row could ever be flagged.

    Raises:
        ArtifactError: it is such a screen.
    """
    if screen is None:
        return
    try:
        model.rows(screen.rows)
    except InputError as error:
        raise ArtifactError(f"{folder / _SCREEN} holds rows of another network: {error}") from None
    lost = int(np.isnan(screen.scores).sum())
    if screen.scores.shape != (screen.rows.count,) or lost == screen.rows.count:
        given = f"an array of shape {screen.scores.shape}, {lost} of them NaN"
        raise ArtifactError(
            f"{folder / _SCREEN} must hold a score for each of its {screen.rows.count} rows, got {given}"
        )
