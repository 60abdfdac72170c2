"""The models that are served: read from a store once, then only looked up."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcdrop.artifact import load
from mcdrop.errors import ArtifactError, InputError, MCDropError, ModelNotFound
from mcdrop.formats import FORMATS
from mcdrop.model import Model
from mcdrop.sampling import sample
from mcdrop.store import MANIFEST, Entry, list_models
from service.watch import Watch

__all__ = ["NotReady", "Registry", "Served"]

logger = logging.getLogger(__name__)


class NotReady(MCDropError):
    """The models are not loaded yet, or could not be."""


@dataclass(frozen=True)
class Served:
    """A model that is ready, the manifest of its folder, and the drift alarm of its screen if it has one."""

    model: Model
    manifest: dict[str, Any]
    watch: Watch | None = None


@dataclass
class Registry:
    """All versions of all models of a store. Nothing is served before everything is loaded.

    ``devices`` are those of torch that its networks run on; an ONNX graph stays on the CPU. ``on_failure`` is called,
    from the thread that loads, when the store cannot be served; ``problem`` then says why.
    """

    store: Path
    default: str | None = None
    devices: tuple[str, ...] = ()
    on_failure: Callable[[], None] | None = None
    problem: str | None = None
    _models: dict[str, dict[str, Served]] | None = field(default=None, repr=False)

    def load(self) -> None:
        """Reads the store. A failure is kept and told, not raised: health must be able to answer meanwhile."""
        try:
            self._models = self._read()
        except MCDropError as error:
            self.problem = str(error)
            if self.on_failure is None:  # else whoever is called tells it, once
                logger.error("cannot serve: %s", error)
        except Exception as error:
            self.problem = f"the models in {self.store} could not be loaded ({type(error).__name__}); the log says why"
            logger.exception("cannot serve the models in %s", self.store)
        else:
            logger.info("ready: %s", ", ".join(self._models))
        if self.problem and self.on_failure:
            self.on_failure()

    @property
    def ended(self) -> bool:
        """Whether nothing is being loaded any more, be it all there or given up."""
        return self._models is not None or self.problem is not None

    def models(self) -> dict[str, dict[str, Served]]:
        """Gives the models by name and version, the newest version last.

        Raises:
            NotReady: they are not loaded.
        """
        if self._models is None:
            raise NotReady(self.problem or "the models are still being loaded; try again in a few seconds")
        return self._models

    def find(self, name: str | None, version: str | None = None) -> Served:
        """Gives one model: the only one or the default when no name is given, its newest version when none is.

        Raises:
            InputError: no name is given and there are several models.
            ModelNotFound: there is no such model or version.
        """
        models = self.models()
        known = ", ".join(models)
        if name is None:
            name = self.default or (next(iter(models)) if len(models) == 1 else None)
        if name is None:
            raise InputError(f"the field 'model' is missing; choose one of: {known}")
        if name not in models:
            raise ModelNotFound(f"unknown model {name[:100]!r}; choose one of: {known}")
        versions = models[name]
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise ModelNotFound(
                f"unknown version {version[:100]!r} of model {name!r}; choose one of: {', '.join(versions)}"
            )
        return versions[version]

    def entries(self) -> list[Entry]:
        """Lists what the store holds; reads manifests only, so that a wrong store is told at once.

        Raises:
            ArtifactError: no store, nothing in it, a folder without a manifest, or no default model.
        """
        entries = list_models(self.store)
        _check_layout(self.store)
        if not entries:
            above = self.store.resolve().parent if any(self.store.glob(f"[!.]*/{MANIFEST}")) else None
            remedy = f"it is one, so give the folder above: {above}" if above else "save one there with mcdrop.save"
            raise ArtifactError(f"{self.store} holds no model as NAME/VERSION; {remedy}")
        names = dict.fromkeys(entry.name for entry in entries)
        if self.default is not None and self.default not in names:
            raise ArtifactError(
                f"the default model {self.default!r} is not in {self.store}; it holds: {', '.join(names)}; set "
                "MCDROP_DEFAULT_MODEL to one of these, or to nothing"
            )
        return entries

    def _read(self) -> dict[str, dict[str, Served]]:
        models: dict[str, dict[str, Served]] = {}
        for entry in self.entries():
            model = self._loaded(entry)
            versions = models.setdefault(entry.name, {})
            if entry.version in versions:
                raise ArtifactError(
                    f"{entry.folder} says that it is {entry.name} {entry.version}, and so does another folder"
                )
            versions[entry.version] = Served(model, entry.manifest, _watch(entry, model))
        return models

    def _loaded(self, entry: Entry) -> Model:
        """Reads one model and asks it, so that no request waits for what only the first one needs."""
        weights, began = entry.manifest["weights"], time.monotonic()
        form = FORMATS.get(str(weights.get("format"))) if isinstance(weights, dict) else None
        try:
            model = load(entry.folder, devices=self.devices if form is None or form.movable else ())
            for _ in range(2 if self.devices else 1):  # a GPU records a run when it is asked for again
                sample(model, model.example, model.defaults.plan)
        except MCDropError as error:
            raise ArtifactError(f"the model in {entry.folder} cannot be served: {error}") from error
        where, took = ", ".join(model.audit.devices), time.monotonic() - began
        logger.info("%s %s: prepared in %.1f s on %s", entry.name, entry.version, took, where)
        return model


def _watch(entry: Entry, model: Model) -> Watch | None:
    """The drift alarm of a model that has a screen; where it cannot have one the log says why."""
    if model.screen is None:
        return None
    try:
        return Watch(f"{entry.name} {entry.version}", model)
    except InputError as error:
        logger.warning("%s %s: drift is not watched: %s", entry.name, entry.version, error)
        return None


def _check_layout(store: Path) -> None:
    """Refuses what would be passed over in silence: a version without a manifest, a model in place of a store."""
    if (store / MANIFEST).is_file():
        raise ArtifactError(f"{store} is a model, not a store; give the folder above its name: STORE/NAME/VERSION")
    bare = [folder for folder in store.glob("[!.]*/[!.]*") if folder.is_dir() and not (folder / MANIFEST).is_file()]
    if bare:
        raise ArtifactError(f"the model in {min(bare)} cannot be served: it has no {MANIFEST}")
