"""mcdrop: how sure is a trained network? Stochastic passes with every dropout on, as means, intervals and flags.

>>> import mcdrop
>>> mask = mcdrop.sample_masks([mcdrop.Site("drop", (4,), 0.5)], 2, seed=7)["drop"]
>>> mask.shape
(2, 4)
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mcdrop import errors

__version__ = "0.1.0"

# loaded when first used, so that ``import mcdrop`` needs numpy alone
_HOMES = {
    "Audit": "audit",
    "Calibration": "calibration",
    "Detector": "detect",
    "DriftMonitor": "drift",
    "Model": "model",
    "Options": "model",
    "PassPlan": "engine",
    "Prediction": "predict",
    "Screen": "screening",
    "Screened": "detect",
    "Site": "masks",
    "calibrate": "fitting",
    "choose_rate": "inject",
    "export_onnx": "posterior",
    "export_torch": "posterior",
    "fit_screen": "fitting",
    "inject": "inject",
    "interpret": "predict",
    "list_models": "store",
    "load": "artifact",
    "predict": "predict",
    "recalibrate_batchnorm": "batchnorm",
    "register": "registry",
    "sample": "sampling",
    "sample_masks": "masks",
    "save": "artifact",
    "screen": "detect",
    "unregister": "registry",
    "wrap": "wrapping",
}

_MODULES = ("layers", "metrics", "plotting")  # used by their own names

__all__ = [
    "Audit",
    "Calibration",
    "Detector",
    "DriftMonitor",
    "Model",
    "Options",
    "PassPlan",
    "Prediction",
    "Screen",
    "Screened",
    "Site",
    "__version__",
    "calibrate",
    "choose_rate",
    "errors",
    "export_onnx",
    "export_torch",
    "fit_screen",
    "inject",
    "interpret",
    "list_models",
    "load",
    "predict",
    "recalibrate_batchnorm",
    "register",
    "sample",
    "sample_masks",
    "save",
    "screen",
    "unregister",
    "wrap",
]

if TYPE_CHECKING:
    from mcdrop import layers as layers
    from mcdrop import metrics as metrics
    from mcdrop import plotting as plotting
    from mcdrop.artifact import load, save
    from mcdrop.audit import Audit
    from mcdrop.batchnorm import recalibrate_batchnorm
    from mcdrop.calibration import Calibration
    from mcdrop.detect import Detector, Screened, screen
    from mcdrop.drift import DriftMonitor
    from mcdrop.engine import PassPlan
    from mcdrop.fitting import calibrate, fit_screen
    from mcdrop.inject import choose_rate, inject
    from mcdrop.masks import Site, sample_masks
    from mcdrop.model import Model, Options
    from mcdrop.posterior import export_onnx, export_torch
    from mcdrop.predict import Prediction, interpret, predict
    from mcdrop.registry import register, unregister
    from mcdrop.sampling import sample
    from mcdrop.screening import Screen
    from mcdrop.store import list_models
    from mcdrop.wrapping import wrap


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mcdrop.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mcdrop' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mcdrop.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps ``mcdrop.predict`` the function: importing a submodule would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
