"""All ways of running passes: ours, the plain loop, what torch offers, and the other libraries.

A way is a function that prepares a setting and gives its modes: functions of a seed that give mean and variance over
the passes. What it prepares is not timed with the passes. To add one, add an entry to ``WAYS``.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mcdrop
from benchmarks.throughput.networks import draws_on
from benchmarks.throughput.peers import baal, torch_uncertainty
from benchmarks.throughput.setting import Moments, Run, Setting, Skipped, moments
from mcdrop.onednn import available

__all__ = ["EXACT", "WAYS", "Way", "precision_of"]

Way = Callable[[Setting], dict[str, Run]]

EXACT = "mcdrop exact last"
MOST_GRAPH = 2 * 10**10  # operations of a posterior as a file; a larger one takes long to write and to check
MOST_GRAPH_BYTES = 200 * 2**20


def precision_of(way: str) -> str:
    """Gives the arithmetic that a way computes in."""
    return next((name for name in ("bf16", "tf32") if name in way.split()), "fp32")


def ours(exact_last: bool = False, **asked: Any) -> Way:
    """Gives mcdrop as ``wrap`` is asked for it. A plan that comes again finds its masks, as in a service."""

    def way(setting: Setting) -> dict[str, Run]:
        if asked.get("compile") and not setting.compiled:
            raise Skipped("compiled in one case of each network")
        if asked.get("precision") == "tf32" and not setting.x.is_cuda:
            raise Skipped("on CUDA devices only")
        if asked.get("precision") == "bf16" and not (setting.x.is_cuda or available(torch.bfloat16, setting.x.device)):
            raise Skipped("this processor has no instructions for it")
        model = setting.model(**asked)

        def run(seed: int) -> Moments:
            plan = mcdrop.PassPlan(setting.passes, seed, exact_last=exact_last)
            result = mcdrop.sample(model, setting.x, plan, deterministic=False)
            return torch.from_numpy(result.mean), torch.from_numpy(result.variance)

        return {"": run}

    return way


def loop(setting: Setting) -> dict[str, Run]:
    """Pass after pass with torch's own dropout."""
    net = draws_on(setting.copy())

    @torch.no_grad()
    def run(_: int) -> Moments:
        return moments(torch.stack([net(setting.x) for _ in range(setting.passes)]))

    return {"": run}


def repeated(setting: Setting) -> dict[str, Run]:
    """All passes at once, on rows repeated in memory, with every dropout module on and the rest in eval."""
    if not setting.fits_repeated:
        raise Skipped("the repeated rows take too much memory")
    net, repeats = setting.copy().eval(), (setting.passes, *(1,) * (setting.x.dim() - 1))
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()

    @torch.no_grad()
    def run(_: int) -> Moments:
        return moments(net(setting.x.repeat(repeats)).unflatten(0, (setting.passes, -1)))

    return {"": run}


def vmapped(setting: Setting) -> dict[str, Run]:
    """``torch.func.vmap`` over the passes, in chunks that suit a cache and larger ones."""
    net, x, each = draws_on(setting.copy()), setting.x, torch.arange(setting.passes, device=setting.x.device)
    room = len(x) * setting.network.row_bytes

    def chunked(size: int) -> Run:
        many = torch.func.vmap(lambda _: net(x), randomness="different", chunk_size=size)

        @torch.no_grad()
        def run(_: int) -> Moments:
            return moments(many(each))

        return run

    small, large = setting.network.chunk // len(x), 2**30 // room
    sizes = {"small chunks": small, "large chunks": large}
    return {mode: chunked(max(1, min(size, setting.passes))) for mode, size in sizes.items()}


def exported(setting: Setting) -> dict[str, Run]:
    """The posterior as one ONNX graph on onnxruntime; its masks are in the file, so seeds change nothing."""
    if setting.x.is_cuda:
        raise Skipped("on the CPU only")
    if len(setting.x) * setting.passes * setting.network.suffix > MOST_GRAPH:
        raise Skipped("too large a case for a posterior as a file")
    try:
        import onnxruntime
    except ImportError:
        raise Skipped("not installed") from None
    model = setting.model()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would else spin on after its turn, and take the cores from whoever comes next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = mcdrop.export_onnx(model, Path(folder) / "posterior.onnx", passes=setting.passes)
        if path.stat().st_size > MOST_GRAPH_BYTES:
            raise Skipped(f"a file of {path.stat().st_size // 2**20} MB")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: setting.x.numpy()}

    def run(_: int) -> Moments:
        mean, variance = session.run(["mean", "variance"], fed)
        return torch.from_numpy(mean), torch.from_numpy(variance)

    return {"": run}


WAYS: dict[str, Way] = {
    "mcdrop": ours(),
    EXACT: ours(exact_last=True),
    "mcdrop bf16": ours(precision="bf16"),
    "mcdrop tf32": ours(precision="tf32"),
    "mcdrop compiled": ours(compile=True),
    "loop": loop,
    "baal": baal(),
    "baal forced": baal(forced=True),
    "torch-uncertainty": torch_uncertainty(),
    "torch-uncertainty forced": torch_uncertainty(forced=True),
    "repeat": repeated,
    "vmap": vmapped,
    "onnxruntime": exported,
}
