"""What a request asks for, done: from the bytes of a body to the bytes of an answer. Runs in worker threads."""

from dataclasses import replace

import numpy as np

from mcdrop.errors import InputError
from mcdrop.intervals import INTERVALS
from mcdrop.model import Model
from mcdrop.predict import Prediction, predict
from mcdrop.sampling import held_scores
from service.limits import parse_object
from service.registry import Registry
from service.schemas import PredictRequest, dump, prediction_body, read_request
from service.settings import Settings

__all__ = ["answer"]


def answer(body: bytes, registry: Registry, settings: Settings) -> bytes:
    """Answers ``POST /predict``.

    Raises:
        MCDropError: whatever is wrong with the request.
    """
    request = read_request(parse_object(body))
    served = registry.find(request.model, request.version)
    model = served.model
    _check_asked(request, model, settings)
    prediction = predict(
        model,
        request.inputs,
        passes=request.passes,
        level=request.level,
        interval=request.interval,
        seed=request.seed,
        keep_samples=request.samples,
    )
    _check_given(prediction, settings)
    if served.watch is not None:
        served.watch.see(prediction, request.passes)
    return dump(prediction_body(model, prediction))


def _check_asked(request: PredictRequest, model: Model, settings: Settings) -> None:
    """Refuses what would take too long, before it is computed."""
    passes = model.defaults.passes if request.passes is None else request.passes
    if not 2 <= passes <= settings.max_passes:
        raise InputError(f"passes must be a whole number from 2 to {settings.max_passes}, got {passes}")
    leaves = request.inputs.values() if isinstance(request.inputs, dict) else [request.inputs]
    rows = max((len(leaf) for leaf in leaves if isinstance(leaf, list)), default=0)
    if rows > settings.max_rows:
        raise InputError(f"one request may have {settings.max_rows} rows, got {rows}; send them in several")
    remedy = "send fewer rows per request, or ask for fewer passes"
    if rows * passes > settings.max_kept and _keeps(request, model):
        raise InputError(
            f"rows times passes may be {settings.max_kept} where every pass is kept, got {rows} times {passes}; "
            f"{remedy}"
        )
    anew = _scored_anew(request, model, passes)
    if (rows + anew) * passes > settings.max_work:
        more = (
            f", and {anew} rows of the model's screen, which are scored anew for other passes or seeds" if anew else ""
        )
        raise InputError(f"rows times passes may be {settings.max_work}, got {rows} times {passes}{more}; {remedy}")


def _keeps(request: PredictRequest, model: Model) -> bool:
    """Whether every pass is held in memory until the answer is made, as ``predict`` does it."""
    interval = request.interval or model.defaults.interval
    by_method = interval in INTERVALS and INTERVALS[interval].needs_samples
    fitted = model.calibration if interval == "conformal" else None
    return request.samples or by_method or (fitted is not None and fitted.needs_samples)


def _scored_anew(request: PredictRequest, model: Model, passes: int) -> int:
    """How many rows of its screen are run too; not those of the model's own plan, which are run when it is loaded."""
    usual = model.defaults.plan
    plan = replace(usual, passes=passes, seed=usual.seed if request.seed is None else request.seed)
    if model.screen is None or plan == usual or held_scores(model, model.screen, plan) is not None:
        return 0
    return model.screen.rows.count


def _check_given(prediction: Prediction, settings: Settings) -> None:
    numbers = sum(values.size for values in vars(prediction).values() if isinstance(values, np.ndarray))
    if numbers > settings.max_numbers:
        raise InputError(
            f"one answer may hold {settings.max_numbers} numbers, this one would hold {numbers}; send fewer rows"
        )
