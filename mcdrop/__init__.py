"""mcdrop: how sure is a trained network? Stochastic passes with every dropout on, as means, intervals and flags.

>>> import mcdrop
>>> mask = mcdrop.sample_masks([mcdrop.Site("drop", (4,), 0.5)], 2, seed=7)["drop"]
>>> mask.shape
(2, 4)
"""

import importlib
from typing import TYPE_CHECKING, Any

from mcdrop import errors

__version__ = "0.1.0"

# loaded when first used, so that ``import mcdrop`` needs numpy alone
_HOMES = {
    "Audit": "audit",
    "Model": "model",
    "Options": "model",
    "PassPlan": "engine",
    "Prediction": "predict",
    "Screen": "screening",
    "Site": "masks",
    "fit_screen": "predict",
    "interpret": "predict",
    "list_models": "store",
    "load": "artifact",
    "predict": "predict",
    "sample": "predict",
    "sample_masks": "masks",
    "save": "artifact",
    "wrap": "model",
}

__all__ = [
    "Audit",
    "Model",
    "Options",
    "PassPlan",
    "Prediction",
    "Screen",
    "Site",
    "__version__",
    "errors",
    "fit_screen",
    "interpret",
    "list_models",
    "load",
    "predict",
    "sample",
    "sample_masks",
    "save",
    "wrap",
]

if TYPE_CHECKING:
    from mcdrop.artifact import load, save
    from mcdrop.audit import Audit
    from mcdrop.engine import PassPlan
    from mcdrop.masks import Site, sample_masks
    from mcdrop.model import Model, Options, wrap
    from mcdrop.predict import Prediction, fit_screen, interpret, predict, sample
    from mcdrop.screening import Screen
    from mcdrop.store import list_models


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mcdrop' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mcdrop.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
