"""The benchmarks of strangeness run on small made-up data of the same layout."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.accuracy import anomaly, ood, strange


def idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "adbench").mkdir()
    x = np.vstack([random.normal(size=(300, 4)), random.normal(size=(30, 4)) + 6])
    np.savez(tmp_path / "adbench" / "made.npz", X=x, y=np.repeat([0, 1], [300, 30]))
    for name, brightness in (("mnist", 90), ("fashion_mnist", 250)):
        (tmp_path / name).mkdir()
        for part, count in (("train", 200), ("t10k", 150)):
            labels = random.integers(0, 10, count)
            images = random.integers(0, brightness, (count, 28, 28))
            idx(tmp_path / name / f"{part}-images-idx3-ubyte.gz", images)
            idx(tmp_path / name / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_images_are_read_as_rows_of_grey_levels(data: Path) -> None:
    x, y, test = strange.read_images(data, "mnist")
    assert (x.shape, y.shape, test.shape) == ((200, 784), (200,), (150, 784))
    assert 0 <= x.min() < x.max() <= 89 / 255


def test_far_anomalies_are_found_at_their_rates(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "out.json"
    anomaly.main(["--data", str(data), "--json", str(out), "--repeats", "2"])
    cells = json.loads(out.read_text())["sets"]["made"]["variance"]
    assert cells["auroc"]["mean"] > 0.99
    assert cells["found_at_fpr"]["mean"] > 0.9
    assert "| made | combined |" in capsys.readouterr().out


def test_every_score_is_measured_in_both_directions(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ood, "PASSES", 10)
    out = data / "out.json"
    ood.main(["--data", str(data), "--json", str(out), "--repeats", "1"])
    pairs = json.loads(out.read_text())["pairs"]
    assert list(pairs) == ["mnist against fashion_mnist", "fashion_mnist against mnist"]
    assert "| feature_distance |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ood.main(["--data", str(data / "nowhere")])
