"""A drift alarm for each model that is served: are the rows that arrive still like its reference rows?"""

import logging
import threading

import numpy as np
from numpy.typing import NDArray

from mcdrop.drift import Drift, DriftMonitor
from mcdrop.predict import Prediction
from mcdrop.screening import Screen

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

MOST_ROWS = 200_000  # a monitor keeps every score and sorts it in: without an alarm it starts anew after so many
ROWS_OF_A_REQUEST = 1000  # the first of them, so that watching stays cheap beside predicting


class Watch:
    """Feeds a drift monitor from requests that come at the same time.

    Only requests under the screen's own passes and seed count, because only their scores can be compared with it.
    """

    def __init__(self, name: str, screen: Screen) -> None:
        """Takes the name of the model, for the log, and its screen."""
        self._name, self._plan = name, screen.plan
        self._monitor = DriftMonitor(_finite(screen.scores))
        self._lock = threading.Lock()

    def see(self, prediction: Prediction) -> None:
        """Takes the scores of an answer in; a first alarm goes to the log."""
        plan = self._plan
        if prediction.score is None or (int(prediction.passes[0]), prediction.seed) != (plan.passes, plan.seed):
            return
        with self._lock:
            before = self._monitor.state
            if before.rows >= MOST_ROWS and not before.alarm:
                self._monitor.reset()
            after = self._monitor.update(_finite(prediction.score[:ROWS_OF_A_REQUEST]))
        if after.alarm and not before.alarm:
            logger.warning("model %s: its inputs have drifted from the reference rows of its screen", self._name)

    @property
    def state(self) -> Drift:
        """How the monitor stands."""
        with self._lock:
            return self._monitor.state


def _finite(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of an output that overflowed is no number; nothing is stranger."""
    return np.nan_to_num(scores, nan=np.finfo(np.float64).max)
