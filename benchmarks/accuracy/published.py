"""Published Monte Carlo dropout results on the same splits, and the hyper-parameters that gave them.

Mean and standard error over the 20 splits, computed from the values for each split in the results folders of
github.com/yaringal/DropoutUncertaintyExps (commit a6259f1). Its README prints some of them rounded, and other papers
print the standard deviation over the splits, which is 4.5 times as much.
"""

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Figure", "Published"]


@dataclass(frozen=True)
class Figure:
    """A mean over the splits with its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Published:
    """Of one set: the drop rate, precision and length scale of 2016, what they gave in 400 epochs, the best since.

    The best of each comes from the published Monte Carlo dropout run that has it, not from one run: the RMSE from two
    layers and 20000 epochs; the log-likelihood from the same for concrete and power-plant, and from a search on
    held-out rows for the others.
    """

    p: float
    tau: float
    length: float
    rmse: Figure
    log_likelihood: Figure
    best_rmse: Figure
    best_log_likelihood: Figure


PUBLISHED = {
    "concrete": Published(
        p=0.01, tau=0.0557319157756, length=0.01, rmse=Figure(5.230, 0.118), log_likelihood=Figure(-3.039, 0.020),
        best_rmse=Figure(4.504, 0.179), best_log_likelihood=Figure(-2.825, 0.024),
    ),
    "energy": Published(
        p=0.05, tau=0.427114830213, length=0.01, rmse=Figure(1.663, 0.043), log_likelihood=Figure(-1.985, 0.020),
        best_rmse=Figure(0.474, 0.013), best_log_likelihood=Figure(-1.212, 0.005),
    ),
    "power-plant": Published(
        p=0.005, tau=0.0871109017617, length=0.01, rmse=Figure(4.022, 0.041), log_likelihood=Figure(-2.795, 0.010),
        best_rmse=Figure(3.629, 0.040), best_log_likelihood=Figure(-2.675, 0.006),
    ),
    "yacht": Published(
        p=0.01, tau=0.541869562034, length=0.1, rmse=Figure(1.109, 0.085), log_likelihood=Figure(-1.554, 0.027),
        best_rmse=Figure(0.656, 0.062), best_log_likelihood=Figure(-1.250, 0.015),
    ),
}  # fmt: skip
