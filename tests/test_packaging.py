"""What is shipped: the wheel holds the two packages, the sdist all that is needed to build, train and test."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.slow
def test_the_wheel_ships_mcdrop_and_service_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mcdrop", "service"}
    assert {"mcdrop/py.typed", "service/py.typed"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_holds_all(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"Makefile", "constraints.txt", "Dockerfile", "LICENSE", "models/train.py", "tests/test_packaging.py"}
    assert expected <= names
    assert not any(name.startswith((".venv", "models/store", "dist")) for name in names)
