"""An alarm for drift: is what arrives still exchangeable with the reference rows?

Each new score is ranked among the reference and all scores before it. While the stream is exchangeable with the
reference these ranks are independent and uniform, whatever the score, and betting against that cannot win: the wealth
of the bets is a martingale (Vovk, Nouretdinov and Gammerman 2003). Drift makes it grow.
"""

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcdrop.engine import ROUNDING
from mcdrop.errors import InputError
from mcdrop.masks import is_whole
from mcdrop.rows import numbers

__all__ = ["Drift", "DriftMonitor"]

_BETS = np.array([-1.0, 0.0, 1.0])
_JUMP = 0.01


@dataclass(frozen=True)
class Drift:
    """The state of a monitor after some rows.

    ``evidence`` is the Shiryaev-Roberts statistic; while nothing drifts, it takes at least ``run_length`` rows on
    average to reach ``run_length``, which is the alarm. ``log_martingale`` is the logarithm of the wealth since the
    start: that it ever exceeds c has probability at most 1 / c (Ville's inequality).
    """

    rows: int
    evidence: float
    log_martingale: float
    run_length: float
    alarm: bool


class DriftMonitor:
    """Watches a stream of scores, one after another, against those of reference rows.

    The bets are those of the simple jumper (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman 2021, "Retrain or
    not retrain"), 1 + e (p - 1/2) with e in {-1, 0, 1}, so that growing and shrinking scores are both noticed. The
    scores must be those of single rows in order of arrival, under one plan; ties, which are equal but for rounding, are
    broken by ``seed``. It keeps every score, eight bytes a row. An alarm stays until ``reset``.

    Raises:
        InputError: no reference scores, one that is no finite number, a run length below 1, or a seed below 0.
    """

    def __init__(self, reference: Iterable[float], *, run_length: float = 100_000, seed: int = 0) -> None:
        """Takes the reference's scores and the rows that may pass, on average, between two false alarms."""
        self._reference = array("d", sorted(_finite(reference)))
        number = isinstance(run_length, int | float | np.number) and not isinstance(run_length, bool)
        if not self._reference or not number or not run_length >= 1:
            raise InputError(
                f"a drift monitor needs scores of reference rows, got {len(self._reference)}, and a run length of at "
                f"least 1, got {run_length!r}"
            )
        if not is_whole(seed) or seed < 0:
            raise InputError(f"seed must be a whole number from 0, got {seed!r}")
        self._run_length = float(run_length)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Forgets the stream, as after the cause of an alarm was dealt with."""
        self._seen = self._reference[:]
        self._random = np.random.default_rng(self._seed)
        self._shares = np.full(len(_BETS), 1 / len(_BETS))  # of the wealth, on each bet
        self._log_wealth, self._evidence, self._rows, self._alarm = 0.0, 0.0, 0, False

    def update(self, scores: float | Iterable[float]) -> Drift:
        """Takes one score, or further scores (N,) in order of arrival, and gives the state after them.

        Raises:
            InputError: one of them is no finite number; then none is taken.
        """
        single = not isinstance(scores, Iterable) or getattr(scores, "ndim", 1) == 0
        for score in _finite([scores] if single else scores):
            self._take(score)
        return self.state

    @property
    def state(self) -> Drift:
        """The state after all rows so far."""
        return Drift(self._rows, self._evidence, self._log_wealth, self._run_length, self._alarm)

    def _take(self, score: float) -> None:
        slack = ROUNDING * abs(score)  # the last digits of a score depend on the batch that its row comes in
        left, right = bisect_left(self._seen, score - slack), bisect_right(self._seen, score + slack)
        larger, ties = len(self._seen) - right, right - left
        p = (larger + self._random.random() * (ties + 1)) / (len(self._seen) + 1)
        insort(self._seen, score)
        shares = (1 - _JUMP) * self._shares + _JUMP / len(_BETS)
        won = shares * (1 + _BETS * (p - 0.5))
        growth = float(won.sum())
        self._shares = won / growth
        self._log_wealth += float(np.log(growth))
        self._evidence = (self._evidence + 1) * growth
        self._rows += 1
        self._alarm = self._alarm or self._evidence >= self._run_length


def _finite(scores: Any) -> list[float]:
    whole = hasattr(scores, "ndim") or isinstance(scores, str) or not isinstance(scores, Iterable)
    given = numbers(scores if whole else [*scores], "scores")
    return [float(score) for score in given.ravel()]
