"""What a request asks for, done: from the bytes of a body to the bytes of an answer. Runs in worker threads."""

import numpy as np

from mcdrop.errors import InputError
from mcdrop.intervals import INTERVALS
from mcdrop.model import Model
from mcdrop.predict import Prediction, predict
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
    method = INTERVALS.get(request.interval or model.defaults.interval)
    kept = request.samples or (method is not None and method.needs_samples)
    most = settings.max_kept if kept else settings.max_work
    if rows * passes > most:
        why = " where every pass is kept" if kept else ""
        raise InputError(
            f"rows times passes may be {most}{why}, got {rows} times {passes}; "
            "send fewer rows per request, or ask for fewer passes"
        )


def _check_given(prediction: Prediction, settings: Settings) -> None:
    numbers = sum(values.size for values in vars(prediction).values() if isinstance(values, np.ndarray))
    if numbers > settings.max_numbers:
        raise InputError(
            f"one answer may hold {settings.max_numbers} numbers, this one would hold {numbers}; send fewer rows"
        )
