"""The costly half: passes over rows, with the hidden features and scores that are read beside them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.bank import Bank
from mcdrop.engine import PassPlan, PassResult, run_passes
from mcdrop.errors import InputError
from mcdrop.model import Model, check_model
from mcdrop.rows import Rows, by_name
from mcdrop.screening import SCORES, Screen, score_of
from mcdrop.summaries import TASKS

__all__ = [
    "features_of",
    "fingerprint",
    "held_scores",
    "inputs_of",
    "is_batches",
    "reference_scores",
    "rows_of",
    "sample",
    "scores_under",
]

Array = NDArray[np.float64]

_REFERENCES_KEPT = 16
_SAMPLE_BYTES = 4 * 2**30  # kept passes above this would end the process rather than help anyone


def rows_of(model: Model, x: Any, *, later: bool = False) -> Rows:
    """Reads inputs as ``Model.rows`` does, and the columns of a data frame by the model's names for them."""
    check_model(model)
    return model.rows(by_name(x, model.features), later=later)


def is_batches(model: Model, data: Any) -> bool:
    """Says whether data are several batches, such as a DataLoader; a list is where it holds more than plain rows."""
    if isinstance(data, list):
        first = data[0] if data else None
        return isinstance(first, Mapping) or _axes(first) >= len(model.inputs[0].shape)
    single = isinstance(data, Rows | Mapping | tuple) or hasattr(data, "detach") or hasattr(data, "__array__")
    return isinstance(data, Iterable) and not single


def _axes(value: Any) -> int:
    """How many axes an array has, or what nests arrays or numbers."""
    if hasattr(value, "shape"):
        return len(value.shape)
    return 1 + _axes(value[0]) if isinstance(value, list | tuple) and value else 0


def inputs_of(model: Model, batch: Any) -> Any:
    """Gives the inputs of a batch of a DataLoader, which may be a list or dict and hold labels too."""
    names = [spec.name for spec in model.inputs]
    if isinstance(batch, Mapping) and all(name in batch for name in names):
        batch = {name: batch[name] for name in names}
    if isinstance(batch, list) and any(hasattr(item, "shape") for item in batch):
        batch = tuple(batch)
    if isinstance(batch, tuple) and len(batch) > model.positional > 0:
        batch = batch[: model.positional]
    return batch


def sample(
    model: Model, x: Any, plan: PassPlan, *, screen: Screen | None = None, deterministic: bool = True
) -> PassResult:
    """Runs the passes of a plan over inputs (N, ...), and reads the hidden features that a screen compares.

    The screen is the model's own where none is given. The ``deterministic`` output, with every draw off, takes about
    one pass more; where it is not asked for it is None.

    Raises:
        InputError: unusable inputs, what is no plan, kept passes that would not fit in memory, or a closed form of what
            has none.
    """
    rows = rows_of(model, x, later=True)
    if not isinstance(plan, PassPlan):
        raise InputError(f"a plan is needed, such as mcdrop.PassPlan(100), got {plan!r}")
    task = TASKS[model.task]
    if plan.exact_last and model.task != "regression":
        raise InputError(
            f"exact_last is for regression: what {model.task} reads from a pass is not linear in the last layer"
        )
    if plan.keep_samples:
        some = _first(model, rows)
        first = some.astype(np.float64)
        width = task.statistics.kept(task.statistics.of(first[None])).shape[-1] * first[0, ..., 0].size
        needed = plan.passes * rows.count * width * some.itemsize
        if needed > _SAMPLE_BYTES:
            raise InputError(
                f"{plan.passes} passes of {rows.count} rows need {needed / 2**30:.1f} GiB to keep every pass; "
                "give fewer rows or passes, or an interval that does not need them all, such as 'student_t'"
            )
    result = run_passes(model.backend, rows, plan, statistics=task.statistics, deterministic=deterministic)
    rows.look()
    bank = screen.bank if screen is not None else model.screen.bank if model.screen is not None else None
    if bank is None:
        return result
    return replace(result, features=features_of(model, rows, bank.layer), layer=bank.layer)


def _first(model: Model, rows: Rows) -> NDArray[np.floating[Any]]:
    """Gives the output of the first row with every draw off, (1, ...)."""
    try:
        return model.backend.deterministic(rows.take(slice(0, 2)))[:1]
    except InputError:  # of a network that is built for one number of rows
        return model.backend.deterministic(rows)[:1]


def features_of(model: Model, rows: Rows, layer: str | None) -> NDArray[np.float32]:
    """Gives hidden features with every draw off, (N, F)."""
    size = max(1, model.backend.chunk_bytes // max(1, model.backend.row_bytes(rows)))
    return np.concatenate([model.backend.features(block, layer) for block in rows.split(size)])


def scores_under(model: Model, x: Any, plan: PassPlan, score: str, bank: Bank | None = None) -> Array:
    """Gives the named score of rows (N,) under a plan; runs passes only where the score reads them."""
    rows = rows_of(model, x)
    needs = SCORES[score]
    summary = None
    if needs.needs_passes:
        result = run_passes(model.backend, rows, plan, statistics=TASKS[model.task].statistics)
        summary = TASKS[model.task].read(result)
    features = features_of(model, rows, bank.layer) if needs.needs_features and bank is not None else None
    return score_of(score, summary, features=features, bank=bank)


def held_scores(model: Model, screen: Screen, plan: PassPlan) -> Array | None:
    """Gives the scores of a screen's rows under a plan where they are known already; None where that takes passes."""
    wanted, weights = replace(plan, keep_samples=False), model.digest
    if weights == screen.weights and (wanted == screen.plan or not SCORES[screen.score].needs_passes):
        return screen.scores
    with model.lock:
        held = model.references.get((id(screen), wanted, weights))
    return None if held is None else held[1]


def reference_scores(model: Model, screen: Screen, plan: PassPlan) -> Array:
    """Gives the scores of a screen's rows under a plan and today's weights: same passes, same masks.

    Raises:
        InputError: the screen compares hidden features, and the weights that made them have changed.
    """
    wanted, weights = replace(plan, keep_samples=False), model.digest
    if weights != screen.weights and screen.bank is not None:
        raise InputError(
            "the screen compares hidden features, and the weights or the output have changed since it was fitted; "
            "fit it again with mcdrop.fit_screen"
        )
    scores = held_scores(model, screen, plan)
    if scores is None:
        scores = scores_under(model, screen.rows, wanted, screen.score, screen.bank)
        with model.lock:
            while len(model.references) >= _REFERENCES_KEPT:
                model.references.pop(next(iter(model.references)))
            # the screen is held too: were it freed, another could get its id, and these scores
            model.references[id(screen), wanted, weights] = screen, scores
    return scores


def fingerprint(model: Model, plan: PassPlan) -> str:
    """Gives a sha256 over what the passes depend on: task, weights, output, live sites and plan."""
    sites = [(site.name, site.kind, site.p) for site in model.audit.live]
    drawn = sorted(asdict(replace(plan, keep_samples=False)).items())
    return hashlib.sha256(repr((model.task, model.digest, sites, drawn)).encode()).hexdigest()
