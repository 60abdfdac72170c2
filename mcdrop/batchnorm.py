"""Batch norm statistics that fit a network under its own dropout (Li et al. 2018, section 4: the variance shift)."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import InputError
from mcdrop.masks import is_whole
from mcdrop.model import Model, check_model
from mcdrop.rows import Rows
from mcdrop.sampling import inputs_of, is_batches, rows_of
from mcdrop.shadow import copied

__all__ = ["recalibrate_batchnorm"]


def recalibrate_batchnorm(
    model: Model, data: Any, *, passes: int = 8, batch_rows: int = 256, seed: int = 0
) -> nn.Module:
    """Gives a copy of a model's network whose norm layers' running statistics are those under masks.

    The masked network runs over the data with its norm layers collecting a plain average of batch statistics, as at
    the end of training with dropout: every row has masks of its own. Weights stay as they are, and the model's own
    network is not touched; wrap the copy to use it.

    Args:
        model: what ``wrap`` gave.
        data: rows like those that the network was trained on: all at once, or an iterable of batches, such as a
            DataLoader; what a batch holds beyond the network's inputs (labels) is left aside.
        passes: how many masks each row is run under.
        batch_rows: rows at a time, where the data comes all at once.
        seed: of the masks.

    Raises:
        InputError: the network has no norm layer with running statistics, the data hold no batches, or one of a single
            row, or passes or rows at a time are no whole numbers above 0.
    """
    check_model(model)
    for name, value in {"passes": passes, "batch_rows": batch_rows}.items():
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} must be a whole number above 0, got {value!r}")
    if not isinstance(model.backend, TorchBackend):
        raise InputError("only a torch network has norm layers that can be recalibrated")
    network = copied(model.module).eval()
    norms = [m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        raise InputError("the network has no norm layer with running statistics")
    twin = model.backend.over(network)
    twins = [m for m in twin.live.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    twin.tier(model.example)  # traced while the norm layers are still in eval
    for norm, shadow in zip(norms, twins, strict=True):
        norm.reset_running_stats()
        shadow.training, shadow.momentum = True, None  # no momentum: the average over all batches
    start = 0
    for batch in _batches(model, data, batch_rows):
        if batch.count < 2:
            raise InputError("a batch of one row has no variance; give batches of several rows")
        for _ in range(passes):
            twin.each_row(batch, seed=seed, start=start)
            start += batch.count
    if not start:  # the statistics of nothing are mean 0 and variance 1, silently
        raise InputError("the data hold no batches; an iterator that was read before has none left")
    return network


def _batches(model: Model, data: Any, rows: int) -> Iterable[Rows]:
    if is_batches(model, data):
        return (rows_of(model, inputs_of(model, batch)) for batch in data)
    blocks = [*rows_of(model, data).split(rows)]
    return blocks if len(blocks) == 1 or blocks[-1].count > 1 else blocks[:-1]
