"""The other libraries, as their documentation has them used, in both of their modes.

Forced is the same with everything but the norm layers in training mode. Out of the box neither library switches on the
dropout inside a fused encoder or an LSTM, and gives a spread of zero without a word; forced, it can be timed.
"""

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.throughput.networks import draws_on
from benchmarks.throughput.setting import Moments, Run, Setting, Skipped, moments
from benchmarks.throughput.shim import load_torchvision

__all__ = ["PEERS", "baal", "torch_uncertainty", "versions"]

PEERS = ("baal", "torch-uncertainty")


def versions() -> dict[str, str]:
    """Gives the versions of the peers and of onnxruntime; those not installed are left out."""
    there = {one.metadata["Name"].replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return {name: there[name] for name in (*PEERS, "onnxruntime") if name in there}


def imported(name: str) -> Any:
    """Gives a module of a peer; skipped where the peer is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise Skipped("not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they import warns of its own future
        load_torchvision()
        return importlib.import_module(name)


def baal(*, forced: bool = False) -> Callable[[Setting], dict[str, Run]]:
    """Gives baal's ``MCDropoutModule`` under its ``ModelWrapper``: a loop, or rows replicated in memory."""

    def way(setting: Setting) -> dict[str, Run]:
        dropout, wrapper = imported("baal.bayesian.dropout"), imported("baal.modelwrapper")

        def mode(replicated: bool) -> Run:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where it finds no dropout; the spread of zero says it
                net = dropout.MCDropoutModule(setting.copy()).eval()
            if forced:
                draws_on(net)
            args = wrapper.TrainingArgs(use_cuda=setting.x.is_cuda, replicate_in_memory=replicated)
            model = wrapper.ModelWrapper(net, args)

            def run(_: int) -> Moments:
                return moments(model.predict_on_batch(setting.x, iterations=setting.passes), -1)

            return run

        return {"loop": mode(False)} | ({"replicated": mode(True)} if setting.fits_repeated else {})

    return way


def torch_uncertainty(*, forced: bool = False) -> Callable[[Setting], dict[str, Run]]:
    """Gives torch-uncertainty's ``mc_dropout``: a loop, or all passes in one batch."""

    def way(setting: Setting) -> dict[str, Run]:
        methods = imported("torch_uncertainty.methods")

        def mode(on_batch: bool) -> Run:
            net = methods.mc_dropout(setting.copy(), num_estimators=setting.passes, on_batch=on_batch).eval()
            if forced:
                draws_on(net.core_model)

            @torch.no_grad()
            def run(_: int) -> Moments:
                return moments(net(setting.x).unflatten(0, (setting.passes, -1)))

            return run

        return {"loop": mode(False)} | ({"on batch": mode(True)} if setting.fits_repeated else {})

    return way
