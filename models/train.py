"""Trains the reference models into a store: ``python -m models.train [--store models/store] [--only NAME] [--force]``.

A model that is there and whole is left alone, so that every start can ask for all of them; torch is imported only where
something is to be trained. To add a model, add one function to ``models.recipes`` and one entry to ``REFERENCES``.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcdrop.errors import ArtifactError, MCDropError
from mcdrop.store import read_manifest, verify

__all__ = ["REFERENCES", "Reference", "ensure", "main", "missing"]

VERSION = "1"
STORE = Path(__file__).parent / "store"

Report = Callable[[str, int, int], None]  # called with a model's name, the epochs done and the epochs in all


@dataclass(frozen=True)
class Reference:
    """One model of the store: how it is trained, what it is, and which rows it finds strange."""

    recipe: str  # function of models.recipes
    factory: str
    task: str
    score: str
    description: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    on_request: bool = False


# The classifiers' scores are those that flagged the most inverted, shuffled and noise images at a false-positive rate
# of 0.01: 22, 15 and 24 % with mutual information on the 8x8 digits, 39, 17 and 52 % with entropy on MNIST.
REFERENCES = {
    "noisy-line": Reference(
        recipe="noisy_line",
        factory="models.networks:noisy_line",
        task="regression",
        score="variance",
        description="y = x, learnt from 50 points with noise 0.3 on [-1, 1]",
        features=("x",),
    ),
    "digits": Reference(
        recipe="digits",
        factory="models.networks:digits",
        arguments={"hidden_layers": 3, "inputs": 64},
        task="classification",
        score="mutual_information",
        description="handwritten digits as 64 grey levels in [0, 1], row by row (scikit-learn's digits / 16)",
    ),
    "mnist": Reference(
        recipe="mnist",
        factory="models.networks:digits",
        arguments={"hidden_layers": 3, "inputs": 784},
        task="classification",
        score="entropy",
        description="handwritten digits as 784 grey levels in [0, 1], row by row (MNIST / 255)",
        on_request=True,
    ),
}


def missing(store: Path, names: Sequence[str]) -> list[str]:
    """Gives the names whose model folder is not in the store, or not as it was written."""
    return [name for name in names if not _is_whole(store / name / VERSION)]


def ensure(store: Path, names: Sequence[str], report: Report, *, force: bool = False) -> list[str]:
    """Trains and saves the models that the store lacks, or all with ``force``; gives the names of those it trained."""
    wanted = list(names) if force else missing(store, names)
    for name in wanted:
        _train(name, store, report)
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains and tells; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m models.train", description="Trains the reference models.")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of models (default: %(default)s)")
    parser.add_argument("--only", choices=sorted(REFERENCES), metavar="NAME", help=f"one of {', '.join(REFERENCES)}")
    parser.add_argument("--force", action="store_true", help="train anew what is there already")
    parser.add_argument(
        "--mnist", action="store_true", help="train the MNIST model too; MCDROP_DATA says where mnist/ is"
    )
    options = parser.parse_args(argv)
    every_time = [name for name, reference in REFERENCES.items() if options.mnist or not reference.on_request]
    names = [options.only] if options.only else every_time
    try:
        with _reporting() as report:
            trained = ensure(options.store, names, report, force=options.force)
    except (MCDropError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the store holds whole models only", file=sys.stderr)
        return 130
    print(f"models in {options.store}: {', '.join(names)} ({len(trained)} trained now)")
    return 0


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder, read_manifest(folder))
    except ArtifactError:
        return False
    return True


def _train(name: str, store: Path, report: Report) -> None:
    """Trains one model, fits its screen and saves both; ``save`` writes beside and renames, so all of it or nothing."""
    from mcdrop.artifact import save  # here, as all that needs torch
    from mcdrop.fitting import fit_screen
    from mcdrop.wrapping import wrap
    from models import recipes

    reference = REFERENCES[name]
    recipe: Callable[[recipes.Progress], recipes.Trained] = getattr(recipes, reference.recipe)
    trained = recipe(lambda done, of: report(name, done, of))
    model = wrap(trained.network, example=trained.reference[:8], task=reference.task)
    save(
        model,
        store / name / VERSION,
        factory=reference.factory,
        arguments=reference.arguments,
        screen=fit_screen(model, trained.reference, score=reference.score, fpr=0.01),
        name=name,
        version=VERSION,
        description=reference.description,
        features=list(reference.features) or None,
        overwrite=True,
    )


@contextmanager
def _reporting() -> Iterator[Report]:
    """A progress bar per model on a terminal, elsewhere two lines per model; nothing where nothing is trained."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True)) as bars:

        def move(name: str, done: int, of: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"training {name}", total=of)
            bars.update(tasks[name], completed=done)

        yield move


def _line(name: str, done: int, of: int) -> None:
    if done in (1, of):
        print(f"training {name}: epoch {done} of {of}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
