"""What several test files need: small real models, built once for the whole run, and runs that repeat."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from serving import Server, running

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is loaded; the networks here are tiny
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file's tests on one worker; of the zoo's contract, those of a network: it is wrapped once for all."""
    for item in items:
        group = item.nodeid.partition("::")[0]
        if "zoo/test_contract" in group and hasattr(item, "callspec"):
            group = item.callspec.params.get("name", group)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The regression ``line`` (version 1; version 2 has a screen and a named column) and the classifier ``classes``."""
    import numpy as np
    import torch

    from mcdrop import fit_screen, save, wrap
    from models.networks import digits, noisy_line

    folder = tmp_path_factory.mktemp("models") / "store"
    torch.manual_seed(0)
    rows = np.linspace(-1, 1, 40)[:, None]
    line = wrap(noisy_line(), example=rows)
    factory = "models.networks:noisy_line"
    save(line, folder / "line" / "1", factory=factory, name="line", version="1")
    screen = fit_screen(line, rows, fpr=0.05)
    more: dict[str, Any] = {"screen": screen, "description": "a line", "features": ["x"]}
    save(line, folder / "line" / "2", factory=factory, name="line", version="2", **more)
    shape = {"hidden_layers": 2, "inputs": 4}
    classes = wrap(digits(**shape), example=np.eye(4), task="classification")
    save(
        classes,
        folder / "classes" / "1",
        factory="models.networks:digits",
        arguments=shape,
        name="classes",
        version="1",
    )
    return folder


@pytest.fixture(scope="session")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server of these models, for tests that leave it as it was."""
    with running(store, tmp_path_factory.mktemp("server") / "log.txt") as found:
        yield found
