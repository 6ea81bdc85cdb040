"""The catalogue as the settings describe it, and where its models' files come from."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import structlog

from embedding_server.catalog.catalog import SERVED, Catalog, LookUp
from embedding_server.catalog.config import Entry, read_config
from embedding_server.catalog.demo import demo_model
from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.discover import discover
from embedding_server.catalog.local import FilesError, complete, read_directory
from embedding_server.catalog.overrides import again, overridden
from embedding_server.catalog.published import published_models
from embedding_server.core import ModelSpec, Origin, Task
from embedding_server.errors import SettingsError, StartupError
from embedding_server.settings import NO_MODELS, Settings

if TYPE_CHECKING:
    from embedding_server.catalog.files import Hub

log = structlog.get_logger()


def _present(settings: Settings, entries: Sequence[Entry]) -> list[ModelSpec]:
    """The models of this machine."""
    specs = [demo_model()] if settings.demo else []
    return specs + (_own_models(settings, entries) if settings.model_path else [])


def open_catalog(settings: Settings) -> Catalog:
    """The catalogue that `settings` describe; raises `StartupError`."""
    config = settings.model_config
    entries = read_config(config, settings.model_path) if config else ()
    if config and not entries and not settings.allowed_embedding_models:
        raise SettingsError(f"INFERENCE_MODEL_CONFIG={str(config)!r} names no model: {NO_MODELS}")
    allowed = {
        Task.EMBED: settings.allowed_embedding_models,
        Task.RERANK: settings.allowed_rerank_models,
    }
    return Catalog(
        _present(settings, entries),
        allowed,
        published_models,
        _looking_up(settings),
        entries=entries,
    )


def _looking_up(settings: Settings) -> LookUp:
    """Looks up repositories; once the hub was not reached, it is not waited for again."""
    unreachable: list[FilesError] = []

    def look_up(name: str) -> ModelSpec:
        if unreachable:
            raise unreachable[0]
        try:
            return discover(Origin(repo=name, files=()), open_hub(settings))
        except FilesError as exc:
            unreachable.extend([exc] * exc.retry)
            raise

    return look_up


def open_hub(settings: Settings, *, progress: bool = False) -> "Hub":
    """The hub that `settings` describe."""
    # Here, because its library takes 0.4 s, and a server of own models needs none of it.
    from embedding_server.catalog.files import Hub  # noqa: PLC0415

    return Hub(
        settings.hf_home,
        endpoint=settings.hf_endpoint,
        token=settings.hf_token,
        offline=settings.hf_hub_offline,
        progress=progress,
    )


def identified(spec: ModelSpec, hub: "Hub") -> ModelSpec:
    """The spec, or the model that it stands for since the hub could not be asked; blocks.

    Raises:
        FilesError: it still cannot.
        ModelFilesError: the repository holds nothing that could be served as it was to be.
    """
    if not spec.unidentified:
        return spec
    assert spec.origin
    found = discover(spec.origin, hub)
    task = next(task for task, kinds in SERVED.items() if kinds[0] is spec.kind)
    if found.kind not in SERVED[task]:
        raise ModelFilesError(f"{spec.id} is a {found.kind} model, which cannot {task}")
    return again(found, spec)


class Locator:
    """Finds a model's files on this machine, or fetches them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, spec: ModelSpec) -> ModelSpec:
        """The spec with its directory; blocks.

        Raises:
            FilesError: its files cannot be had.
            ModelFilesError: they are not what they should be.
        """
        if not spec.origin:
            return spec
        found = identified(spec, self.hub)
        assert found.origin
        return overridden(complete(found, self.hub.fetch(found.origin)))

    @cached_property
    def hub(self) -> "Hub":
        """Where published models come from."""
        return open_hub(self._settings)


def _own_models(settings: Settings, entries: Sequence[Entry]) -> list[ModelSpec]:
    """Those of `INFERENCE_MODEL_PATH`; of a directory that has an entry, that may say more."""
    assert settings.model_path
    try:
        directories = sorted(path for path in settings.model_path.iterdir() if path.is_dir())
    except OSError as exc:
        raise SettingsError(
            f"INFERENCE_MODEL_PATH={str(settings.model_path)!r}: {exc.strerror}"
        ) from exc
    named = settings.allowed_embedding_models + settings.allowed_rerank_models
    mended = {entry.directory for entry in entries}
    specs = []
    for path in directories:
        try:
            specs.append(read_directory(path, path.name))
        except ModelFilesError as exc:
            if path in mended:
                continue
            if path.name in named:
                raise StartupError(str(exc)) from exc
            log.warning("model.unusable", error=str(exc))
    return specs
