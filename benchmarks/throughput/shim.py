"""Imports torchvision beside a torch that its binary was not built for; the peers import it.

Its wheel is a CUDA build. Beside a CPU torch the import fails at operators that its extension would have brought, so
these are declared without a kernel and the import is tried once more. None of the networks here needs them.
"""

import importlib
import sys

import torch

__all__ = ["load_torchvision"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library undoes its operators when it is collected


def load_torchvision() -> None:
    """Imports torchvision; raises ImportError where it is not installed."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in _SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                _declared[-1].define(schema)
        importlib.import_module("torchvision")
