"""One case: every way prepared and checked, then timed in turn."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from benchmarks.throughput.cases import Case
from benchmarks.throughput.check import ANSWER, ZERO, reference
from benchmarks.throughput.clock import CLEAN, clean, median_ms, ratio, sampled
from benchmarks.throughput.networks import NETWORKS
from benchmarks.throughput.peak import Product, operations
from benchmarks.throughput.peers import PEERS
from benchmarks.throughput.prepare import Ready, prepared
from benchmarks.throughput.setting import Setting
from benchmarks.throughput.ways import EXACT, WAYS, precision_of

__all__ = ["Effort", "best_peer", "measure", "take_turns"]

Result = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long a case may take.

    Attributes:
        rounds: of a fast way.
        sample_seconds: what one sample lasts at least; a short run is repeated within it.
        way_seconds: what all samples of a way last at most, unless that would be fewer rounds than the fewest.
        fewest: rounds of a slow way.
    """

    rounds: int = 7
    sample_seconds: float = 0.1
    way_seconds: float = 2.5
    fewest: int = 2


def measure(case: Case, *, device: str, effort: Effort, products: dict[str, Product]) -> Result:
    """Gives the figures of one case; a way that gives no answer is named with the reason.

    The products that are its limit take their turns too: how fast a machine is changes while others use it.
    """
    network = NETWORKS[case.network]
    net, x = _made(case.network, device), network.rows(case.rows).to(device)
    setting = Setting(network, net, x, case.passes, case.compiled)
    ways, ready = _ready(setting)
    limits = {
        name: _limit(name, products[name]) for name in sorted({"fp32", *(precision_of(way.name) for way in ready)})
    }
    take_turns([*ready, *limits.values()], effort)
    ours = next((way for way in ready if way.name == "mcdrop"), None)
    work = operations(network, case.rows, case.passes)
    for way in ready:
        precision = precision_of(way.name)
        share = ratio(limits[precision].samples, way.samples) * work / products[precision].operations
        ways[way.name] |= _figures(way, ours, case.rows * case.passes, share)
    peer = best_peer(ways)
    return {
        "network": case.network,
        "rows": case.rows,
        "passes": case.passes,
        "limit_ms": median_ms(limits["fp32"].samples) * work / products["fp32"].operations,
        "best_peer": peer,
        "peer_ratio": ways[peer]["times_mcdrop"] if peer else None,
        "loop_ratio": ways["loop"].get("times_mcdrop"),
        "ways": ways,
    }


@lru_cache(maxsize=1)  # cases of one network follow one another, and what is made of it once serves them all
def _made(network: str, device: str) -> nn.Module:
    return NETWORKS[network].made().to(device)


def _ready(setting: Setting) -> tuple[Result, list[Ready]]:
    """Gives the status of each way, and those that are answers. A forced one stands in for a spread of zero alone."""
    truth, ways, ready = reference(setting), Result(), []
    for name in WAYS:
        if name == EXACT:  # it is for fewer passes, not for faster ones: see ``error``
            continue
        if name.endswith(" forced") and ways[name.removesuffix(" forced")]["status"] != ZERO:
            continue
        found = prepared(name, setting, truth)
        ways[name] = {"status": found if isinstance(found, str) else ANSWER}
        if isinstance(found, Ready):
            ready.append(found)
    return ways, ready


def _limit(name: str, product: Product) -> Ready:
    return Ready(name, "", lambda _: product.run(), 0.0, 0.0, product.seconds)


def take_turns(ready: list[Ready], effort: Effort) -> None:
    """Takes the samples, each round from another way on, so that none always runs after the same neighbour."""
    for k in range(effort.rounds):
        start = k % max(1, len(ready))
        for way in ready[start:] + ready[:start]:
            affordable = int(effort.way_seconds / max(way.seconds, effort.sample_seconds))
            if k < max(effort.fewest, affordable):
                repeats = max(1, round(effort.sample_seconds / way.seconds))
                way.samples.append(sampled(lambda run=way.run: run(0), repeats))  # type: ignore[misc]


def _figures(way: Ready, ours: Ready | None, row_passes: int, share: float) -> Result:
    milliseconds = median_ms(way.samples)
    used = [sample.seconds * 1e3 for sample in clean(way.samples)]
    return {
        "mode": way.mode,
        "milliseconds": milliseconds,
        "range_ms": [min(used), max(used)],
        "times_mcdrop": ratio(way.samples, ours.samples) if ours else None,
        "row_passes_per_second": row_passes / milliseconds * 1e3,
        "share_of_limit": share,
        "rounds": len(way.samples),
        "clean_rounds": sum(sample.busy < CLEAN for sample in way.samples),
        "busy": [round(sample.busy, 3) for sample in way.samples],
        "prepare_ms": way.prepare_ms,
        "first_call_ms": way.first_ms,
    }


def best_peer(ways: Result) -> str | None:
    """Gives the faster of the peers' ways that are answers."""
    answers = [name for name in ways if name.removesuffix(" forced") in PEERS and ways[name]["status"] == ANSWER]
    return min(answers, key=lambda name: float(ways[name]["milliseconds"]), default=None)
