"""What a benchmark ran on: the machine, the versions and the commit that its results name."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

import mcdrop

__all__ = ["ROOT", "environment"]

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, Any]:
    """Gives machine, versions and commit."""
    return {
        "machine": {
            "processor": _processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "mcdrop": mcdrop.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
        },
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit; "-dirty" where files differ from it, but for those that benchmarks write."""
    code = ("--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    commit, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno", *code)
    return f"{commit}-dirty" if changed else commit or "unknown"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
