"""CUDA graphs and statistics on a GPU: the same answers as without them, and as on a CPU."""

import threading

import numpy as np
import pytest
import torch
from captures import NETS, apart, backend_of, loop, made, passes, program_of

import mcdrop
from mcdrop.errors import InputError
from mcdrop.replay import Played, Recordings, Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

every = pytest.mark.parametrize("name", [*NETS])


def recorded(model: mcdrop.Model, x: torch.Tensor) -> int:
    """How many graphs a model holds for such rows."""
    return len(program_of(model, x)[0]._recordings._held)


@every
def test_a_recording_gives_what_the_loop_gives(name: str) -> None:
    net, x = made(name, "cuda")
    model = mcdrop.wrap(net, example=x[:4])
    if model.audit.tier != "captured":
        pytest.skip("not captured")
    first, second, third = (passes(model, x[:5], 20) for _ in range(3))
    assert recorded(model, x) == 1
    expected = loop(model, x[:5], 20)
    for got in (first, second, third):
        assert apart(got, expected) < 1e-4
    assert torch.equal(second, third)


@every
def test_answers_on_a_gpu_are_those_on_a_cpu(name: str) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        net, x = made(name, device)
        model = mcdrop.wrap(net, example=x[:4])
        answers.append([mcdrop.predict(model, x, passes=100) for _ in range(3)][-1])
    for field in ("mean", "variance", "standard_error", "deterministic"):
        assert apart(getattr(answers[1], field), getattr(answers[0], field)) < 1e-3, field


def test_other_seeds_and_rows_are_copied_to_where_a_recording_reads() -> None:
    net, x = made("mlp", "cuda")
    model, fresh = (mcdrop.wrap(net, example=x[:4]) for _ in range(2))
    for _ in range(3):
        mcdrop.predict(model, x[:8], passes=32)
    assert recorded(model, x) == 1
    for seed, rows in ((1, x[8:16]), (2, x[:8]), (1, x[8:16]), (0, x[16:24])):
        got = mcdrop.predict(model, rows, passes=32, seed=seed)
        expected = mcdrop.predict(fresh, rows.clone(), passes=32, seed=seed)
        assert apart(got.mean, expected.mean) < 1e-5
        assert apart(got.variance, expected.variance) < 1e-4


def test_rows_on_a_gpu_are_finite_also_where_their_numbers_are_read_with_the_passes() -> None:
    """In a recording and before there is one; a sum that overflows says nothing."""
    net, x = made("mlp", "cuda")
    model = mcdrop.wrap(net, example=x[:4])
    bad = x[:8].clone()
    bad[3, 1] = torch.nan
    for _ in range(4):
        with pytest.raises(InputError, match=r"inputs must be finite numbers; row 3 holds nan at \[1\]"):
            mcdrop.predict(model, bad, passes=32)
        before = mcdrop.predict(model, x[:8], passes=32).mean
    assert recorded(model, x) == 1
    for tolerance in (None, 0.1):
        with pytest.raises(InputError, match="row 3 holds nan"):
            mcdrop.predict(model, bad, tolerance=tolerance)
    huge = torch.full((8, 4), 3e38, device="cuda")
    assert not huge.sum().isfinite()
    for _ in range(3):
        mcdrop.predict(model, huge, passes=32)
    assert np.array_equal(mcdrop.predict(model, x[:8], passes=32).mean, before)


def test_new_weights_are_seen() -> None:
    """Written in place, through ``.data``, and in other memory."""
    net, x = made("mlp", "cuda")
    model = mcdrop.wrap(net, example=x[:4])
    before = [mcdrop.predict(model, x[:8]).mean for _ in range(3)][-1]
    last = net.get_parameter("6.bias")
    with torch.no_grad():
        last.add_(1)
    assert apart(mcdrop.predict(model, x[:8]).mean, before + 1) < 1e-5
    last.data -= 2
    assert apart(mcdrop.predict(model, x[:8]).mean, before - 1) < 1e-5
    for _ in range(3):
        last.data = last.data + 1
        assert apart(mcdrop.predict(model, x[:8]).mean, mcdrop.predict(model, x[:8]).mean) < 1e-6
    assert apart(mcdrop.predict(model, x[:8]).mean, before + 2) < 1e-5


def test_norms_that_are_folded_are_seen() -> None:
    net, x = made("residual", "cuda")
    model = mcdrop.wrap(net, example=x[:4])
    for _ in range(3):
        passes(model, x[:4], 10)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(1.5)
    assert apart(passes(model, x[:4], 10), loop(model, x[:4], 10)) < 1e-4


def test_threads_do_not_read_one_anothers_answers() -> None:
    net, x = made("mlp", "cuda")
    model = mcdrop.wrap(net, example=x[:4])
    alone = {seed: mcdrop.predict(model, x[seed : seed + 8], passes=40, seed=seed).mean for seed in range(8)}
    wrong: list[int] = []

    def ask(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                got = mcdrop.predict(model, x[seed : seed + 8], passes=40, seed=seed)
                if apart(got.mean, alone[seed]) > 1e-5:
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_few_recordings_are_kept() -> None:
    net, x = made("mlp", "cuda")
    model = mcdrop.wrap(net, example=x[:4])
    for rows in range(1, 41):
        for _ in range(2):
            got = mcdrop.predict(model, x[:rows], passes=20)
        assert apart(got.mean[:1], mcdrop.predict(model, x[:1], passes=20).mean) < 1e-5
    assert recorded(model, x) <= 32


def test_rows_that_stop_early_are_those_of_a_cpu() -> None:
    (net, x), (other, y) = made("mlp", "cuda"), made("mlp", "cpu")
    there, here = mcdrop.wrap(net, example=x[:4]), mcdrop.wrap(other, example=y[:4])
    for _ in range(3):
        got = mcdrop.predict(there, x, tolerance=0.012, max_passes=400)
    expected = mcdrop.predict(here, y, tolerance=0.012, max_passes=400)
    assert float(np.mean(got.passes == expected.passes)) > 0.9  # one at the limit may fall on either side
    assert len(set(got.passes)) > 1


@pytest.mark.parametrize("task", ["regression", "classification", "gaussian"])
def test_many_passes_are_summed_up_where_they_are(task: str) -> None:
    """In one chunk and in several; with passes that are kept, which are not."""
    answers = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(6, 50), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(50, 4)
        )
        x = torch.randn(200, 6)
        model = mcdrop.wrap(net.eval().to(device), example=x[:4], task=task)
        found = [mcdrop.predict(model, x, passes=333)]
        if device == "cuda":
            found.append(mcdrop.predict(model, x, passes=333))
            backend_of(model).chunk_bytes = 2**21
            found.append(mcdrop.predict(model, x, passes=333))
            found.append(mcdrop.predict(model, x, passes=333, interval="quantile"))
        answers.append(found)
    (expected,), others = answers
    for got in others:
        for field in ("mean", "variance", "standard_error", "deterministic"):
            assert apart(getattr(got, field), getattr(expected, field)) < 1e-4, field


def test_large_runs_are_not_recorded() -> None:
    net, x = made("mlp", "cuda")
    model = mcdrop.wrap(net, example=x[:4], memory=2**20)
    for _ in range(3):
        mcdrop.predict(model, x, passes=300)
    assert recorded(model, x) == 0


def test_a_recording_that_fails_leaves_torch_as_it_was() -> None:
    """One that waits for the device in its midst; torch's generator, its memory and other recordings go on."""
    x, weights = torch.randn(3, device="cuda"), [torch.ones(1, device="cuda")]

    def play(recordings: Recordings, run: Run) -> list[Played | None]:
        return [recordings.play("key", run, weights, (), [x]) for _ in range(3)]

    assert play(Recordings(), lambda masks, leaves: (leaves[0] * leaves[0].sum().item(),)) == [None] * 3
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    found = play(Recordings(), lambda masks, leaves: (leaves[0] * 2,))
    assert found[0] is None
    assert found[2] is not None
    assert np.array_equal(found[2].found[0], x.cpu().numpy() * 2)
