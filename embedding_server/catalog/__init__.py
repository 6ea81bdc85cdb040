"""What could be served: names -> specs, narrowed to what the allow-lists name.

A request's model name passes here first: `resolve` turns it into a `ModelSpec` or an
`UnsupportedModel` that says why not.
"""

import difflib
from collections.abc import Iterable, Mapping

import structlog

from embedding_server.catalog.demo import demo_model
from embedding_server.catalog.local import ModelFilesError, read_directory
from embedding_server.core import ModelSpec, Task
from embedding_server.errors import SettingsError, StartupError, UnsupportedModel
from embedding_server.settings import Names, Settings

__all__ = ["Catalog", "open_catalog"]

_EVERYTHING = "*"
_SHOWN_CHARS = 200

log = structlog.get_logger()


class Catalog:
    """The allowed models of each task, by every name they have.

    Args:
        specs: all models that are known.
        allowed: per task the names of the allow-list, or `*`.

    Raises:
        SettingsError: a name of an allow-list is not known.
    """

    def __init__(self, specs: Iterable[ModelSpec], allowed: Mapping[Task, Names]) -> None:
        self._known = {name: spec for spec in specs for name in spec.names}
        self.listed: dict[Task, dict[str, ModelSpec]] = {
            task: self._named(task, names) for task, names in allowed.items()
        }
        """Per task: the name as the allow-list spells it -> its spec."""
        self._allowed = {
            task: {name: spec for spec in listed.values() for name in spec.names}
            for task, listed in self.listed.items()
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{task}={len(listed)}" for task, listed in self.listed.items())
        return f"Catalog(known={len(self._known)}, {counts})"

    @property
    def models(self) -> dict[str, ModelSpec]:
        """Every allowed model once, by its canonical id."""
        return {spec.id: spec for listed in self.listed.values() for spec in listed.values()}

    def resolve(self, name: str, task: Task) -> ModelSpec:
        """The spec behind a client's model name; raises `UnsupportedModel`."""
        if spec := self._allowed[task].get(name):
            return spec
        shown = name[:_SHOWN_CHARS]
        if any(name in allowed for allowed in self._allowed.values()):
            raise UnsupportedModel(f"Model {shown} is allowed for another task, not for {task}")
        raise UnsupportedModel(f"Model {shown} is not in the allowed models list")

    def spec(self, name: str) -> ModelSpec:
        """The allowed model of that name, whatever its task; raises `SettingsError`."""
        for allowed in self._allowed.values():
            if spec := allowed.get(name):
                return spec
        raise SettingsError(f"INFERENCE_PRELOAD={name!r}: the model is in no allow-list")

    def _named(self, task: Task, names: Names) -> dict[str, ModelSpec]:
        if _EVERYTHING in names:
            if not self._known:
                raise SettingsError(f"{_VARIABLES[task]}: no model is known that `*` could mean")
            return {spec.id: spec for spec in self._known.values()}
        for name in names:
            if name not in self._known:
                raise SettingsError(f"{_VARIABLES[task]}: {name!r} is not known{self._near(name)}")
        return {name: self._known[name] for name in names}

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._known, n=3, cutoff=0.4)
        return f"; did you mean {' or '.join(near)}?" if near else ""


_VARIABLES = {
    Task.EMBED: "INFERENCE_ALLOWED_EMBEDDING_MODELS",
    Task.RERANK: "INFERENCE_ALLOWED_RERANK_MODELS",
}


def open_catalog(settings: Settings) -> Catalog:
    """The catalogue that `settings` describe; raises `StartupError`."""
    specs = [demo_model()] if settings.demo else []
    if settings.model_path:
        specs += _own_models(settings)
    allowed = {
        Task.EMBED: settings.allowed_embedding_models,
        Task.RERANK: settings.allowed_rerank_models,
    }
    return Catalog(specs, allowed)


def _own_models(settings: Settings) -> list[ModelSpec]:
    assert settings.model_path
    try:
        directories = sorted(path for path in settings.model_path.iterdir() if path.is_dir())
    except OSError as exc:
        raise SettingsError(
            f"INFERENCE_MODEL_PATH={str(settings.model_path)!r}: {exc.strerror}"
        ) from exc
    named = settings.allowed_embedding_models + settings.allowed_rerank_models
    specs = []
    for path in directories:
        try:
            specs.append(read_directory(path, path.name))
        except ModelFilesError as exc:
            if path.name in named:
                raise StartupError(str(exc)) from exc
            log.warning("model.unusable", error=str(exc))
    return specs
