"""The JSON of the service: every name that travels stands here and nowhere else."""

import json
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python
from typing_extensions import TypeAliasType

from mcdrop.drift import Drift
from mcdrop.errors import InputError
from mcdrop.intervals import INTERVALS
from mcdrop.model import Model
from mcdrop.predict import Prediction

__all__ = [
    "ErrorBody",
    "ModelEntry",
    "ModelList",
    "ModelPage",
    "PredictRequest",
    "PredictResponse",
    "dump",
    "model_entry",
    "model_page",
    "prediction_body",
    "read_request",
]

ROWS: dict[str, Any] = {"type": "array", "items": {}}
# one list for each row; how deep they go is the output's shape
Numbers = TypeAliasType("Numbers", "list[float | Numbers | None]")
Labels = TypeAliasType("Labels", "list[int | Labels]")
Flags = TypeAliasType("Flags", "list[bool | Flags]")


class PredictRequest(BaseModel):
    """The body of ``POST /predict``. Types are strict: "100" is no number of passes; an unknown field is refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"model": "noisy-line", "inputs": [[0.25], [4.0]], "passes": 100, "level": 0.95, "seed": 0},
            ]
        },
    )

    model: str | None = Field(default=None, description="name of the model; may be left out where there is only one")
    version: str | None = Field(default=None, description="version of the model; the newest when left out")
    inputs: Any = Field(
        description="rows, or an object that gives the rows of each named input",
        json_schema_extra={"anyOf": [ROWS, {"type": "object", "additionalProperties": ROWS}]},
    )
    passes: int | None = Field(default=None, description="number of stochastic passes")
    level: float | None = Field(
        default=None, description="part of the distribution that the interval holds, such as 0.95"
    )
    interval: str | None = Field(
        default=None, json_schema_extra={"enum": [*INTERVALS, None]}, description="kind of interval"
    )
    seed: int | None = Field(default=None, description="the same seed gives the same answer")
    samples: bool = Field(default=False, description="also give the output of every pass")


class PredictResponse(BaseModel):
    """The answer to ``POST /predict``, row by row. What is unknown, or not asked for, is null."""

    model: str
    version: str
    task: str
    passes: int = Field(description="number of stochastic passes behind every number")
    level: float
    seed: int
    interval: str
    interval_kind: str = Field(description="what the interval claims: confidence, credible or prediction")
    mean: Numbers = Field(
        description="one list per row, in the shape of the output; class probabilities for classification"
    )
    variance: Numbers | None
    std: Numbers | None
    lower: Numbers | None = Field(description="null inside: no finite bound")
    upper: Numbers | None
    standard_error: Numbers | None = Field(description="Monte Carlo error of the mean; more passes make it smaller")
    epistemic: Numbers | None = Field(description="the part of the variance that comes from the dropout posterior")
    aleatoric: Numbers | None = Field(description="the part of the variance that is noise in the data")
    deterministic: Numbers | None = Field(description="the output with dropout off")
    label: Labels | None = Field(description="classification: the most probable class")
    probabilities: Numbers | None = Field(description="classification: the means at the fitted temperature")
    prediction_set: Flags | None = Field(description="which classes hold the true one at this level")
    entropy: Numbers | None
    expected_entropy: Numbers | None
    mutual_information: Numbers | None
    variation_ratio: Numbers | None
    score: list[float | None] | None = Field(description="larger is stranger")
    p_value: list[float | None] | None
    is_anomaly: list[bool] | None
    fpr: float | None = Field(description="the false-alarm rate behind is_anomaly")
    screen_note: str | None = Field(description="why score, p_value and is_anomaly are null")
    samples: Numbers | None = Field(description="passes, rows, outputs")


class ModelEntry(BaseModel):
    """One version of one model."""

    name: str
    version: str
    task: str
    description: str
    inputs: list[dict[str, Any]] = Field(description="name, dtype and shape; -1 stands for the rows")
    features: list[str] | None = Field(description="names of the input columns")
    passes: int
    level: float
    interval: str
    sites: int = Field(description="random draws that reach the output")
    screen: bool = Field(description="whether answers flag anomalies")


class ModelPage(ModelEntry):
    """The answer to ``GET /models/{name}``."""

    manifest: dict[str, Any] = Field(description="the manifest of the model's folder")
    audit: dict[str, Any] = Field(description="every random draw of the network, and whether it reaches the output")
    drift: dict[str, Any] | None = Field(
        description="whether rows asked at the default passes and seed are still like those of the screen"
    )


class ModelList(BaseModel):
    """The answer to ``GET /models``."""

    models: list[ModelEntry]


class ErrorBody(BaseModel):
    """Every error, whatever its status."""

    error: str = Field(description="one sentence: what was given and what would work")


def read_request(body: dict[str, Any]) -> PredictRequest:
    """Checks the fields of a body.

    Raises:
        InputError: all that is wrong with them, in one sentence.
    """
    try:
        request = PredictRequest.model_validate(body)
    except ValidationError as error:
        raise InputError("; ".join(_sentences(body, error.errors(include_url=False)))) from None
    if not isinstance(request.inputs, list | dict):
        raise InputError(
            f"inputs must be a list of rows or an object of named inputs, got {reprlib.repr(request.inputs)}"
        )
    return request


def prediction_body(model: Model, prediction: Prediction) -> dict[str, Any]:
    """Gives the answer to ``POST /predict`` as plain data."""
    known = {"model": model.name, "version": model.version, "task": model.task, "passes": int(prediction.passes.max())}
    names = PredictResponse.model_fields
    return {name: known[name] if name in known else _plain(getattr(prediction, name)) for name in names}


def model_entry(model: Model) -> dict[str, Any]:
    """Gives one line of ``GET /models`` as plain data."""
    return {
        "name": model.name,
        "version": model.version,
        "task": model.task,
        "description": model.description,
        "inputs": [vars(spec) for spec in model.inputs],
        "features": model.features,
        "passes": model.defaults.passes,
        "level": model.defaults.level,
        "interval": model.defaults.interval,
        "sites": len(model.audit.live),
        "screen": model.screen is not None,
    }


def model_page(model: Model, manifest: dict[str, Any], drift: Drift | None) -> dict[str, Any]:
    """Gives the answer to ``GET /models/{name}`` as plain data."""
    watched = None if drift is None else vars(drift)
    told = to_jsonable_python(manifest, inf_nan_mode="null")  # TOML knows dates, and numbers that are none
    return {**model_entry(model), "manifest": told, "audit": model.audit.to_dict(), "drift": watched}


def dump(body: dict[str, Any]) -> bytes:
    """Writes JSON that any client can read: no NaN, and only ASCII, so that no odd character can break it."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")


def _sentences(body: dict[str, Any], problems: Sequence[Any]) -> Iterator[str]:
    unknown = [reprlib.repr(name) for name in body if name not in PredictRequest.model_fields]
    if unknown:
        yield f"unknown field {', '.join(unknown[:5])}; known fields: {', '.join(PredictRequest.model_fields)}"
    for problem in problems:
        if not problem["loc"]:  # a name that is no text, which is among the unknown
            continue
        name = problem["loc"][0]
        if problem["type"] == "missing":
            yield f"the field {name!r} is missing"
        elif problem["type"] != "extra_forbidden":
            wanted = problem["msg"].removeprefix("Input should be ")
            yield f"{name} must be {wanted}, got {reprlib.repr(problem['input'])}"


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        plain = value.astype(object)
        plain[~np.isfinite(value)] = None
        return plain.tolist()
    return value.tolist()
