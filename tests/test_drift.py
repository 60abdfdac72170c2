import numpy as np

from mcdrop.drift import DriftMonitor


def test_scores_that_are_equal_but_for_rounding_are_ties() -> None:
    """Rows of four kinds, in batches of other sizes than the reference: the ranks are those of equal scores."""
    random = np.random.default_rng(0)
    kinds = np.array([0.1, 0.35, 2.0, 70.0])
    reference, stream = random.choice(kinds, 200), random.choice(kinds, 600)
    for sign in (1, -1):  # larger scores each time, which looks like drift, or smaller ones
        rounded = stream * (1 + sign * random.uniform(0, 4e-6, len(stream)))
        assert DriftMonitor(reference).update(rounded) == DriftMonitor(reference).update(stream)
    assert DriftMonitor(reference).update(stream * 1.001).alarm
