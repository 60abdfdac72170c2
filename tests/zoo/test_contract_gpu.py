"""Every network of the zoo on a GPU: the draws that a CPU finds, the loop's passes, and a CPU's answers."""

import pytest
import torch
from torch import Tensor

import mcdrop
from mcdrop.backends.torch import TorchBackend

from . import ROWS, ZOO, Example, call, reference
from .wrapped import CONTROLLED, built, same, taken, tolerance, wrapped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PASSES = 5
GPU = 10  # times a CPU's tolerance: sums run in another order


def moved(example: Example) -> Example:
    """Gives an example on the GPU."""
    if isinstance(example, Tensor):
        return example.cuda()
    if isinstance(example, dict):
        return {name: leaf.cuda() for name, leaf in example.items()}
    return tuple(leaf.cuda() for leaf in example)


@pytest.mark.filterwarnings("ignore:RNN module weights")  # of networks that put other weights in their layers
@pytest.mark.parametrize("name", CONTROLLED)
def test_a_gpu_gives_the_passes_of_the_loop_and_of_a_cpu(name: str) -> None:
    """Asked three times, so that small runs are recorded and played; other rows too."""
    here, (module, example) = wrapped(name), built(name)
    module, there = module.cuda(), moved(example)
    try:
        with torch.no_grad(), reference(ZOO[name], module):
            call(module, there)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"does not run on a GPU itself: {error}")
    model = mcdrop.wrap(module, example=there, output=ZOO[name].output)
    assert isinstance(model.backend, TorchBackend)
    assert [site.name for site in model.audit.live] == [site.name for site in here.model.audit.live]
    for which in ([*range(ROWS)], [*range(ROWS)], [*range(ROWS)], [1, 0, 2, 3]):
        rows = model.rows(taken(there, which))
        got = model.backend.forward(rows, PASSES, seed=0, start=0, sampler="iid")
        loop = model.backend.run(rows, PASSES, only=None, tier="loop").float().cpu()
        assert same(got, loop, GPU * tolerance(module))
        if name == "autocast":
            continue  # to another type on a GPU
        on_cpu = here.model.rows(taken(example, which))
        expected = here.model.backend.forward(on_cpu, PASSES, seed=0, start=0, sampler="iid")
        assert same(got, expected, GPU * tolerance(module))
