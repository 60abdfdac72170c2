"""The throughput benchmark counts, checks and names as it says; its times are not tested."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy.report import README
from benchmarks.throughput.__main__ import main, summary
from benchmarks.throughput.apart import measured_apart
from benchmarks.throughput.architectures import Block, Read
from benchmarks.throughput.check import ANSWER, ZERO, Reference, pooled, reference, verdict
from benchmarks.throughput.clock import Sample, clean, median_ms, ratio, sampled
from benchmarks.throughput.error import passes_needed, relative_error
from benchmarks.throughput.measure import Effort, best_peer, take_turns
from benchmarks.throughput.networks import NETWORKS, Network, draws_on, wide_network
from benchmarks.throughput.peak import operations
from benchmarks.throughput.plots import draw_all
from benchmarks.throughput.prepare import Ready, prepared
from benchmarks.throughput.report import MARKERS, RESULTS, section
from benchmarks.throughput.scaling import exponent
from benchmarks.throughput.setting import Moments, Setting, Skipped
from benchmarks.throughput.ways import WAYS, ours, precision_of


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


def _lstm() -> nn.Module:
    body = nn.LSTM(3, 8, num_layers=2, dropout=0.5, batch_first=True)
    return nn.Sequential(body, Read(last=True), nn.Linear(8, 2))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), Read(last=False))


def _setting(build: Callable[[], nn.Module], *shape: int, passes: int = 50) -> Setting:
    network = Network("tiny", build, shape, 0, 0, 64, 256)
    return Setting(network, network.made(), network.rows(4), passes)


@pytest.fixture(scope="module")
def plain() -> tuple[Setting, Reference]:
    setting = _setting(_mlp, 3)
    return setting, reference(setting)


def _counted(run: Callable[[], object]) -> int:
    # oneDNN's LSTM is one operator that torch does not count; without it the same products are
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_operations_of_a_network_are_those_that_torch_counts(name: str) -> None:
    network = NETWORKS[name]
    net = draws_on(network.made())
    assert _counted(lambda: net(network.rows(1))) == network.prefix + network.suffix


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", ["M1", "M2", "M3", "M4"])
def test_the_prefix_is_what_is_done_before_the_first_dropout(name: str) -> None:
    network = NETWORKS[name]
    layers = []
    for layer in _flat(network.made()):
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            break
        layers.append(layer)
    assert _counted(lambda: nn.Sequential(*layers)(network.rows(1))) == network.prefix


def _flat(net: nn.Module) -> list[nn.Module]:
    """The layers in order; of a residual block the branch, which the first dropout is in."""
    if isinstance(net, Block):
        return _flat(net.branch)
    if not isinstance(net, nn.Sequential):
        return [net]
    return [layer for child in net for layer in _flat(child)]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_prefix_of_a_recurrent_layer_is_its_first_and_of_an_encoder_its_first_scores() -> None:
    first = nn.LSTM(64, 128, batch_first=True)
    assert _counted(lambda: first(torch.randn(1, 32, 64))) == NETWORKS["M6"].prefix
    project, steps = nn.Linear(256, 768), torch.randn(64, 256)
    counted = _counted(lambda: (project(steps), steps @ steps.T))
    assert counted == NETWORKS["M5"].prefix


def test_the_limit_is_linear_in_rows_and_does_the_prefix_once() -> None:
    network = wide_network(10)
    assert operations(network, 2, 3) == 2 * (2 * 784 * 10 + 3 * 2 * (200 + 100))


@pytest.mark.parametrize(("build", "shape"), [(_lstm, (5, 3)), (_encoder, (5, 4))])
def test_a_flip_of_the_dropout_modules_is_named_where_it_gives_no_spread(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    setting = _setting(build, *shape)
    truth = reference(setting)
    assert prepared("repeat", setting, truth) == ZERO
    for way in ("loop", "mcdrop"):
        assert isinstance(prepared(way, setting, truth), Ready)


@pytest.mark.parametrize("way", ["mcdrop", "loop", "repeat", "vmap", "onnxruntime"])
def test_every_way_of_our_own_answers_an_ordinary_network(way: str, plain: tuple[Setting, Reference]) -> None:
    assert isinstance(prepared(way, *plain), Ready)


@pytest.mark.parametrize("way", ["baal", "torch-uncertainty"])
def test_a_peer_answers_or_is_named_as_not_installed(way: str, plain: tuple[Setting, Reference]) -> None:
    found = prepared(way, *plain)
    there = importlib.util.find_spec(way.replace("-", "_")) is not None
    assert isinstance(found, Ready) if there else found == "skipped: not installed"


def test_a_way_that_does_not_run_here_is_skipped_with_the_reason(plain: tuple[Setting, Reference]) -> None:
    with pytest.raises(Skipped, match="compiled in one case of each network"):
        ours(compile=True)(plain[0])
    assert str(prepared("mcdrop tf32", *plain)).startswith("skipped: ")


def test_a_way_that_raises_is_named(plain: tuple[Setting, Reference], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Setting) -> dict[str, Callable[[int], Moments]]:
        raise RuntimeError("out of order. Call someone")

    monkeypatch.setitem(WAYS, "broken", broken)
    assert prepared("broken", *plain) == "failed: RuntimeError: out of order"


def _drawn(passes: int) -> Moments:
    """Mean and variance of passes whose law is that of the reference below."""
    draws = torch.randn(passes, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return draws.mean(0), draws.var(0)


TRUTH = Reference(slice(None), torch.zeros(3, 2), torch.ones(3, 2), torch.full((3, 2), math.sqrt(2)), 100_000, 0.0)


def test_moments_within_their_monte_carlo_error_are_an_answer() -> None:
    assert verdict(_drawn(1000), 1000, TRUTH) == ANSWER


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda mean, variance: (mean, 2 * variance), "variance off"),
        (lambda mean, variance: (mean, variance / 2), "variance off"),
        (lambda mean, variance: (mean + 0.3, variance), "mean off"),
        (lambda mean, variance: (mean[:2], variance[:2]), "shape"),
        (lambda mean, variance: (mean, variance * math.nan), "not finite"),
        (lambda mean, variance: (mean, variance * 0), ZERO),
        (lambda mean, variance: (mean, variance * 1e-9), ZERO),
    ],
)
def test_wrong_moments_are_refused_and_named(spoil: Callable[[Tensor, Tensor], Moments], named: str) -> None:
    assert named in verdict(spoil(*_drawn(1000)), 1000, TRUTH)


def test_fewer_digits_may_round_but_not_more_than_that() -> None:
    mean, variance = _drawn(100_000)
    assert verdict((mean + 0.03, variance), 100_000, TRUTH, "bf16") == ANSWER
    assert "mean off" in verdict((mean + 0.03, variance), 100_000, TRUTH, "fp32")
    assert [precision_of(way) for way in ("mcdrop", "mcdrop bf16", "mcdrop tf32")] == ["fp32", "bf16", "tf32"]


def test_runs_with_fixed_draws_count_once() -> None:
    first = _drawn(10)
    assert pooled(lambda _: first, first, 1e-3)[1] == 1
    moved = (first[0] + 1, first[1])
    (mean, _), count = pooled(lambda seed: moved if seed == 1 else first, first, 0.25)
    assert count == 2
    torch.testing.assert_close(mean, first[0] + 0.5)


def test_samples_beside_a_neighbour_are_left_out_where_three_others_are_left() -> None:
    quiet, loud = [Sample(1.0, 0.0), Sample(2.0, 0.1), Sample(3.0, 0.05)], Sample(9.0, 0.5)
    assert clean([loud, *quiet]) == quiet
    assert clean([loud, *quiet[:2]]) == [loud, *quiet[:2]]
    assert median_ms([loud, *quiet]) == 2000.0
    assert median_ms([loud, *quiet[:2]]) == 2000.0


def test_ratios_are_taken_within_a_round() -> None:
    mine = [Sample(1.0, 0.0), Sample(2.0, 0.0), Sample(10.0, 0.0), Sample(1.0, 0.0)]
    theirs = [Sample(3.0, 0.0), Sample(8.0, 0.0), Sample(50.0, 0.0)]
    assert ratio(theirs, mine) == 4.0  # the median of 3, 4 and 5; the fourth round is ours alone
    assert ratio([*theirs, Sample(99.0, 0.9)], mine) == 4.0


def test_a_sample_is_the_time_of_one_run() -> None:
    runs: list[int] = []
    sample = sampled(lambda: runs.append(1), 5)
    assert len(runs) == 5
    assert sample.seconds > 0
    assert sample.busy >= 0


def test_a_slow_way_runs_in_the_first_rounds_only() -> None:
    fast, slow = (
        Ready(name, "", lambda _: _drawn(2), 0.0, 0.0, seconds) for name, seconds in (("a", 1e-3), ("b", 9.0))
    )
    take_turns([fast, slow], Effort(rounds=5, sample_seconds=2e-3, way_seconds=1.0))
    assert (len(fast.samples), len(slow.samples)) == (5, 2)


def test_the_best_peer_is_the_fastest_that_is_an_answer() -> None:
    ways = {
        "loop": {"status": ANSWER, "milliseconds": 0.5},
        "baal": {"status": ZERO},
        "baal forced": {"status": ANSWER, "milliseconds": 3.0},
        "torch-uncertainty": {"status": ANSWER, "milliseconds": 2.0},
    }
    assert best_peer(ways) == "torch-uncertainty"
    assert best_peer({**ways, "torch-uncertainty": {"status": ZERO}}) == "baal forced"
    assert best_peer({"loop": ways["loop"]}) is None


def test_the_summary_is_a_geometric_mean_and_the_smallest() -> None:
    found = summary([{"peer_ratio": peer, "loop_ratio": 3.0} for peer in (2.0, 8.0, None)])
    assert found["geometric_mean_of_peer_ratio"] == pytest.approx(4.0)
    assert (found["smallest_peer_ratio"], found["smallest_loop_ratio"], found["cases_with_a_peer"]) == (2.0, 3.0, 2)


def test_independent_passes_need_one_over_the_square_of_the_error() -> None:
    assert 2500 <= passes_needed(lambda passes: passes**-0.5, 0.02) <= 2625


def test_the_relative_error_is_in_spreads_and_without_that_of_the_truth() -> None:
    truth = (torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[4.0], [9.0]]).double())
    means = [truth[0] + 0.1 * truth[1].sqrt(), truth[0] - 0.1 * truth[1].sqrt()]
    assert relative_error(means, truth, 10_000) == pytest.approx(math.sqrt(0.01 - 1e-4))


def test_the_power_of_growth_is_that_of_its_last_step() -> None:
    xs = [1.0, 2.0, 4.0]
    assert exponent(xs, [100.0, 3 * xs[1] ** 2, 3 * xs[2] ** 2]) == pytest.approx(2.0)


def test_the_memory_of_repeated_rows_is_at_least_that_of_the_rows() -> None:
    megabytes = 200 * 64 * 784 * 4 / 2**20
    found = measured_apart("M1", 64, 200, way="repeat", threads=1)
    assert megabytes <= found["peak_mb"] <= 10 * megabytes


def test_the_command_measures_and_the_report_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--quick", "--only", "M1", "--threads", "1", "--json", str(tmp_path / "throughput.json")])
    torch.set_num_threads(threads)
    assert "M1  1 rows  100 passes" in capsys.readouterr().out
    found = json.loads((tmp_path / "throughput.json").read_text(encoding="utf-8"))
    (case,) = found["cases"]
    assert {case["ways"][way]["status"] for way in ("mcdrop", "loop", "repeat", "vmap")} == {ANSWER}
    assert case["ways"]["mcdrop"]["times_mcdrop"] == 1.0
    (drawn,) = draw_all(tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    text = section(tmp_path)
    assert "| M1 | 1 | 100 |" in text
    assert "![throughput](results/throughput.png)" in text


def test_a_command_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "M1,M9"])
    assert "unknown network M9; there are: M1, M2" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["--device", "cuda"])
        assert "no CUDA device" in capsys.readouterr().err


def test_the_readme_tells_the_results_kept() -> None:
    written = README.read_text(encoding="utf-8").split(MARKERS[0])[1].split(MARKERS[1])[0]
    assert written == f"\n{section(RESULTS)}"
