"""Lets torchvision be imported beside a torch that its binary was not built for.

The wheel on PyPI is a CUDA build. Beside a CPU torch its extension does not load, and then the import fails at the
first operator that the extension would have brought: torchvision attaches Python code to operators that do not exist.
The networks and layers are plain Python and need none of them. So when the import fails in this way, the operators are
declared here without a kernel, and the import is tried once more. Where torchvision imports by itself nothing is done.
"""

import importlib
import sys
from functools import cache

import torch

__all__ = ["load"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library undoes its operators when it is collected


@cache
def load() -> None:
    """Imports torchvision.

    Raises:
        ImportError: it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
        importlib.import_module("torchvision")


def _declare_operators() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    operators = torch.library.Library("torchvision", "FRAGMENT")
    _declared.append(operators)
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            operators.define(schema)
