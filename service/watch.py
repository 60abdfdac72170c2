"""A drift alarm for each model that is served: are the rows that arrive still like its reference rows?"""

import logging
import threading

import numpy as np
from numpy.typing import NDArray

from mcdrop.drift import Drift, DriftMonitor
from mcdrop.errors import InputError
from mcdrop.model import Model
from mcdrop.predict import Prediction
from mcdrop.sampling import reference_scores

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

MOST_ROWS = 200_000  # a monitor keeps every score and sorts it in: without an alarm it starts anew after so many
ROWS_OF_A_REQUEST = 1000  # the first of them, so that watching stays cheap beside predicting


class Watch:
    """Feeds a drift monitor from requests that come at the same time.

    Only requests at the model's default passes and seed count: the scores of others are those of other masks, and
    cannot be compared with them.
    """

    def __init__(self, name: str, model: Model) -> None:
        """Takes the name of the model, for the log, and the model; its screen's rows are scored under its defaults.

        Raises:
            InputError: the model has no screen, or one that compares hidden features of other weights.
        """
        if model.screen is None:
            raise InputError("it has no screen")
        self._name = name
        self._passes, self._seed = model.defaults.passes, model.defaults.seed
        self._monitor = DriftMonitor(_finite(reference_scores(model, model.screen, model.defaults.plan)))
        self._lock = threading.Lock()

    def see(self, prediction: Prediction, passes: int | None = None) -> None:
        """Takes the scores of an answer in; a first alarm goes to the log.

        ``passes`` are those that were asked for, if any: with a tolerance those of an answer differ by row.
        """
        asked = self._passes if passes is None else passes
        if prediction.score is None or (asked, prediction.seed) != (self._passes, self._seed):
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
