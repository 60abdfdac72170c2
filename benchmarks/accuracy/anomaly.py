"""Anomalies in tables: do the flags keep their rates, and how many anomalies do they find?

    python -m benchmarks.accuracy.anomaly [--data DIR] [--json OUT]

A dropout autoencoder learns inliers alone; it is screened with reference rows that it has not seen, on fresh inliers
mixed with anomalies. Every split draws all of these anew.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

import mcdrop
from benchmarks.accuracy.strange import figure, read_table, run, shown, tables

__all__ = ["main", "markdown"]

Result = dict[str, Any]
Table = NDArray[np.float32]

SPLITS = 100
TRAIN, REFERENCE, TEST, ANOMALIES = 3000, 2000, 900, 100
SHARES = (0.4, 0.3, 0.3)  # of the inliers to train, to compare with and to test, where there are fewer than that
HIDDEN, DROP, EPOCHS, BATCH, RATE = 64, 0.2, 15, 128, 3e-3
PASSES, FPR, FDR = 50, 0.05, 0.1
SCORES = ("variance", "feature_distance", "combined")
FAR = 10.0  # standard deviations: inputs are cut there, so that one wild value does not decide


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all tables of the data folder."""
    torch.set_num_threads(1)  # the networks are small
    run("anomaly", _all_tables, markdown, SPLITS, arguments)


def _all_tables(folder: Path, splits: int) -> Result:
    found = {}
    for name in tables(folder):
        start = time.perf_counter()
        inliers, anomalies = read_table(folder, name)
        values: dict[str, dict[str, list[float]]] = {score: defaultdict(list) for score in SCORES}
        for seed in range(splits):
            for score, figures in _one_split(inliers, anomalies, seed).items():
                for what, value in figures.items():
                    values[score][what].append(value)
        found[name] = {
            score: {what: figure(every) for what, every in figures.items()} for score, figures in values.items()
        }
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {"sets": found, "fpr": FPR, "fdr": FDR}


def _one_split(inliers: Table, anomalies: Table, seed: int) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(seed)
    sizes = [min(most, int(share * len(inliers))) for most, share in zip((TRAIN, REFERENCE, TEST), SHARES, strict=True)]
    train, reference, fresh, _ = np.split(random.permutation(inliers), np.cumsum(sizes))
    strange = random.permutation(anomalies)[:ANOMALIES]
    centre, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, reference, fresh, strange = (
        np.clip((rows - centre) / spread, -FAR, FAR) for rows in (train, reference, fresh, strange)
    )
    model = mcdrop.wrap(_autoencoder(train, seed), example=train)
    rows, truth = np.concatenate([fresh, strange]), np.repeat([False, True], [len(fresh), len(strange)])
    found = {}
    for score in SCORES:
        screen = mcdrop.fit_screen(
            model, reference, score=score, fpr=FPR, passes=PASSES, seed=seed, distance="euclidean",
            x_train=None if score == "variance" else train,
        )  # fmt: skip
        single = mcdrop.screen(model, rows, screen=screen)
        flagged = mcdrop.screen(model, rows, screen=screen, fdr=FDR).is_anomaly
        found[score] = {
            "auroc": float(roc_auc_score(truth, single.score)),
            "false_alarms": float(single.is_anomaly[~truth].mean()),
            "found_at_fpr": float(single.is_anomaly[truth].mean()),
            "false_discoveries": float((flagged & ~truth).sum() / max(1, flagged.sum())),
            "found_at_fdr": float(flagged[truth].mean()),
        }
    return found


def _autoencoder(rows: Table, seed: int) -> nn.Module:
    """A network that gives its standardised inputs back, trained with dropout on."""
    torch.manual_seed(seed)
    width = rows.shape[1]
    net = nn.Sequential(
        nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(DROP), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(DROP),
        nn.Linear(HIDDEN, width),
    )  # fmt: skip
    optimiser, x = torch.optim.Adam(net.parameters(), RATE), torch.from_numpy(rows)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            nn.functional.mse_loss(net(x[batch]), x[batch]).backward()
            optimiser.step()
    return net.eval()


def markdown(results: Result) -> str:
    """Gives the table of rates, power and AUROC."""
    fpr, fdr = results["fpr"], results["fdr"]
    lines = [
        "## Anomalies in tables",
        "",
        f"    python -m benchmarks.accuracy.anomaly  # {results['repeats']} splits of each table",
        "",
        f"A dropout autoencoder ({HIDDEN}-{HIDDEN}, drop rate {DROP:g}, {PASSES} passes) learns inliers alone. "
        f"Up to {REFERENCE} reference rows that it has not seen turn scores into p-values; up to {ANOMALIES} anomalies "
        f"hide among up to {TEST} fresh inliers. Promised on average: of inliers at most {fpr:g} flagged "
        f"(`fpr={fpr:g}`), of flags at most {fdr:g} false (`fdr={fdr:g}`). Feature distances are Euclidean, to "
        "the rows of the training. Mean ± standard error. The network and numbers of rows were chosen by looking at "
        "what the first splits found, which the rates do not depend on but AUROC and power may.",
        "",
        f"| table | score | AUROC | inliers flagged at fpr={fpr:g} | anomalies found "
        f"| false among flags at fdr={fdr:g} | anomalies found |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("auroc", "false_alarms", "found_at_fpr", "false_discoveries", "found_at_fdr")
    for name, scores in results["sets"].items():
        for score, cells in scores.items():
            lines.append(f"| {name} | {score} | {' | '.join(shown(cells[column]) for column in columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
