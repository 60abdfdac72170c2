"""The audit: what was looked at in a network, what was found live, and how it is run."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Audit", "SiteReport"]


@dataclass(frozen=True)
class SiteReport:
    """One random draw: where, what, and whether a mask on it reaches the output.

    ``verdict`` is "live" (a mask changes the output), "idle" (it draws, but nothing of it reaches the output, or its
    drop rate is 0) or "excluded". ``shape`` is the mask of one pass; ``shared`` says that no axis of the draw follows
    the rows, as for weights. ``share`` is the part of the output variance that this site makes on its own.
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
class Audit:
    """What ``wrap`` found out about a network.

    ``modules`` counts what was looked at; ``stochastic`` lists the modules whose training behaviour is switched on,
    ``kept`` those that read their training flag but stay in eval, each with its reason. ``tier`` is the way the passes
    are run, ``tier_reason`` why. ``mean_preserving`` says whether the network with every draw at its expectation equals
    its eval output.
    """

    model: str
    modules: int
    sites: tuple[SiteReport, ...]
    stochastic: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)
    tier: str = ""
    tier_reason: str = ""
    mean_preserving: bool = True
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
        preserving = "yes" if self.mean_preserving else "no"
        tail = [f"tier: {self.tier} ({self.tier_reason})", f"mean preserving: {preserving}"]
        return "\n".join([head, *table, *kept, *tail, *(f"warning: {text}" for text in self.warnings)])
