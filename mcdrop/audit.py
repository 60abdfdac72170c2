"""The audit: what was looked at in a network, what was found live, and how it is run."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Audit", "NormReport", "SiteReport", "times"]

_NORMS_SHOWN = 3
_MOST = 1000  # times a variance: of what hardly varies, more says nothing


@dataclass(frozen=True)
class SiteReport:
    """One random draw: where, what, and whether a mask on it reaches the output.

    ``verdict`` is "live" (a mask changes the output), "idle" (it draws, but nothing of it reaches the output, or its
    drop rate is 0) or "excluded". ``shape`` is the mask of one pass; ``shared`` says that no axis of the draw follows
    the rows, as for weights. ``share`` is the variance that this site makes on its own, as a part of the variance of
    all together; shares need not add up to 1.
    """

    name: str
    path: str
    kind: str
    p: float | None
    shape: tuple[int, ...]
    verdict: str
    reason: str
    shared: bool = False
    share: float | None = None


@dataclass(frozen=True)
class NormReport:
    """A norm layer with running statistics: the variance of its input under masks, over its running variance.

    Far from 1 the layer sees other numbers than in training (Li et al. 2018), or the example rows are few or odd.
    ``mask_effect`` is free of the rows: the same variance over that of the same rows without masks.
    """

    path: str
    variance_ratio: float
    mask_effect: float


@dataclass(frozen=True)
class Audit:
    """What ``wrap`` found out about a network.

    ``modules`` counts what was looked at; ``stochastic`` lists the modules whose training behaviour is switched on,
    ``kept`` those that read their training flag but stay in eval, each with its reason. ``tier`` is the way the passes
    are run, ``tier_reason`` why. ``mean_preserving`` says whether the network with every draw at its expectation equals
    its eval output; None of a graph, which has none. ``mean_gap`` is the largest distance between the mean of the
    passes and the deterministic output, in standard deviations of the passes. ``prefix_share`` is the part of one
    pass's floating-point operations that comes before the first draw and is run once, ``speed_up`` what that saves at
    100 passes. ``kept_from`` is the number of rows from which passes compute with kept units alone, ``chunk`` the
    memory of a chunk of passes as a multiple of the usual: both were measured. ``exact_last`` says whether the last
    dropout has a closed form. ``prepare_seconds`` is what tracing, capturing and checking took, which no request pays
    for; ``devices`` says where passes run, and on several which share the rows. ``precision_error`` is the root mean
    square of what a lower precision changes in the passes, in their standard deviations, of the output where it is
    largest. ``injected`` says what was put
    into a network that was trained without it: uncalibrated until ``calibrated``.
    """

    model: str
    modules: int
    sites: tuple[SiteReport, ...]
    stochastic: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)
    tier: str = ""
    tier_reason: str = ""
    mean_preserving: bool | None = True
    mean_gap: float | None = None
    norms: tuple[NormReport, ...] = ()
    prefix_share: float | None = None
    speed_up: float | None = None
    kept_from: int | None = None
    chunk: float = 1.0
    exact_last: bool = False
    prepare_seconds: float | None = None
    devices: tuple[str, ...] = ("cpu",)
    precision: str = "fp32"
    precision_error: float | None = None
    injected: str | None = None
    calibrated: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def live(self) -> tuple[SiteReport, ...]:
        """The sites whose masks reach the output."""
        return tuple(site for site in self.sites if site.verdict == "live")

    def to_dict(self) -> dict[str, Any]:
        """Gives the audit as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table of the sites and what surrounds them, for people."""
        found = f"{len(self.live)} of {len(self.sites)} random draws live"
        head = f"{self.model}: {found}, {self.modules} modules looked at"
        rows = [("site", "module", "kind", "p", "mask", "verdict", "reason")]
        for site in self.sites:
            p = "-" if site.p is None else f"{site.p:g}"
            shape = "x".join(map(str, site.shape)) or "1"
            verdict = site.verdict if site.share is None else f"{site.verdict} {site.share:.0%}"
            rows.append((site.name, site.path or "(root)", site.kind, p, shape, verdict, site.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        kept = [f"kept in eval: {path or '(root)'} ({reason})" for path, reason in self.kept.items()]
        return "\n".join([head, *table, *kept, *self._tail(), *(f"warning: {text}" for text in self.warnings)])

    def _tail(self) -> list[str]:
        where = ", ".join(self.devices)
        took = "" if self.prepare_seconds is None else f"; prepared in {self.prepare_seconds:.1f} s on {where}"
        lines = [f"tier: {self.tier} ({self.tier_reason}){took}"]
        if self.prefix_share is not None and self.speed_up is not None:
            saved = f"{self.speed_up:.1f} times fewer operations at 100 passes"
            lines.append(f"before the first draw: {self.prefix_share:.0%} of a pass, run once ({saved})")
        if self.kept_from is not None or self.chunk != 1:
            kept = "" if self.kept_from is None else f"kept units alone from {self.kept_from} rows on; "
            lines.append(f"measured: {kept}chunks of {self.chunk:g} times the usual memory")
        if self.exact_last:
            lines.append("exact_last: the last dropout has a closed form")
        if self.precision_error is not None:
            lines.append(f"precision: {self.precision}, off from fp32 by {self.precision_error:.2%} of the passes' std")
        for norm in sorted(self.norms, key=lambda norm: -abs(norm.mask_effect - 1))[:_NORMS_SHOWN]:
            ratios = (
                f"{times(norm.variance_ratio)} of its running variance, {times(norm.mask_effect)} of that without masks"
            )
            lines.append(f"norm layer {norm.path}: variance under masks {ratios}")
        if self.injected is not None:
            lines.append(f"injected, {'calibrated' if self.calibrated else 'uncalibrated'}: {self.injected}")
        if self.mean_gap is not None:
            lines.append(f"mean of the passes: within {self.mean_gap:.2f} std of the deterministic output")
        if self.mean_preserving is not None:
            lines.append(f"mean preserving: {'yes' if self.mean_preserving else 'no'}")
        return lines


def times(ratio: float) -> str:
    """A ratio of variances in words, for people."""
    return f"x{ratio:.2f}" if ratio <= _MOST else f"over x{_MOST}"
