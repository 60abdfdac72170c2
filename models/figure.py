"""Draws the picture of the README: the noisy line under a thousand passes. ``python -m models.figure [STORE]``."""

import sys
from pathlib import Path

import numpy as np

import mcdrop
from mcdrop.plotting import band
from models.data import noisy_line_data

PICTURE = Path(__file__).parent / "noisy-line.png"


def draw(store: str, picture: Path) -> None:
    """Draws 1000 passes over [-3, 3], the rows that the network was trained on, and what its screen flags."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    x = np.linspace(-3, 3, 241)[:, None]
    prediction = mcdrop.predict(mcdrop.load(f"{store}/noisy-line"), x, passes=1000, interval="quantile")
    figure, ax = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    seen, y = noisy_line_data()
    band(x, prediction, y=y, seen=seen, ax=ax)
    assert prediction.is_anomaly is not None
    flagged = x[prediction.is_anomaly, 0]
    ax.plot(flagged, np.full(len(flagged), ax.get_ylim()[0]), "|", color="tab:red", label="flagged as anomalies")
    ax.set(title="1000 passes of a network trained on 50 points in [-1, 1]")
    ax.legend(loc="upper left", frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "models/store", PICTURE)
