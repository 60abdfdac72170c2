"""What one row costs where a network is deployed: the torch engine, onnxruntime with masks fed, the exported posterior.

    python -m benchmarks.deployed [--json OUT]

All three answer the same question, and their answers are compared before they are timed. One thread, 50 passes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

import mcdrop
from benchmarks.environment import environment

PASSES = 50
ROWS = (1, 256)
REPEATS = 9
RESULTS = Path(__file__).parent / "results" / "deployed.json"


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(512, 3))


def _cnn() -> nn.Module:
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Dropout2d(0.2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _mlp() -> nn.Module:
    first = [nn.Linear(8, 100), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*first, nn.Linear(100, 100), nn.ReLU(), nn.Dropout(0.2), nn.Linear(100, 1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (_cnn, (3, 32, 32)),
    "encoder": (_encoder, (16, 32)),
    "mlp": (_mlp, (8,)),
}


def main() -> None:
    """Times every network and prints a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    found = [record for name in NETS for record in _measured(name)]
    target.write_text(json.dumps({"environment": environment(), "passes": PASSES, "records": found}, indent=1) + "\n")
    for one in found:
        costs = ", ".join(f"{way} {cost:.0f}" for way, cost in one["microseconds_a_row"].items())
        print(f"{one['network']}, {one['rows']} rows: {costs} microseconds a row")


def _measured(name: str) -> list[dict[str, Any]]:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = mcdrop.wrap(make().eval(), example=torch.randn(8, *shape))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        posterior = mcdrop.export_onnx(model, Path(folder) / "posterior.onnx", passes=PASSES)
        plain = onnxruntime.InferenceSession(posterior, options)
        graph = mcdrop.load(mcdrop.save(model, Path(folder) / name / "1", format="onnx"))
    records = []
    for rows in ROWS:
        x = np.random.default_rng(0).standard_normal((rows, *shape)).astype(np.float32)
        fed = {plain.get_inputs()[0].name: x}
        ways: dict[str, Callable[[], Any]] = {
            "torch engine": lambda x=x: mcdrop.predict(model, x, passes=PASSES).variance,  # type: ignore[misc]
            "onnx backend": lambda x=x: mcdrop.predict(graph, x, passes=PASSES).variance,  # type: ignore[misc]
            "exported posterior": lambda fed=fed: plain.run(["variance"], fed)[0],  # type: ignore[misc]
        }
        answers = [way() for way in ways.values()]
        worst = max(float(np.abs(answer - answers[0]).max()) for answer in answers)
        assert worst <= 1e-5, f"{name}: answers differ by {worst}"
        cost = {way: 1e6 * _seconds(run) / rows for way, run in ways.items()}
        records.append({"network": name, "rows": rows, "microseconds_a_row": cost, "largest_difference": worst})
    return records


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
