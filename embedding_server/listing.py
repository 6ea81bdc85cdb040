"""`embedding-server models` and `fetch`: what could be served, and getting its files beforehand."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import msgspec

from embedding_server.catalog import (
    Catalog,
    FilesError,
    ModelFilesError,
    identified,
    open_catalog,
    open_hub,
)
from embedding_server.catalog.files import Hub
from embedding_server.convert import GraphOrigin, origins
from embedding_server.core import ModelSpec
from embedding_server.errors import StartupError
from embedding_server.settings import Settings
from embedding_server.table import show

_MEGABYTE = 1e6
_COLUMNS = (
    *("id", "kind", "dims", "tokens", "MB"),
    *("source", "license", "cached", "converted", "allowed"),
)


def show_models(settings: Settings, *, as_json: bool) -> None:
    """Print every model that is known, a line or a JSON object each, by id and as it is allowed.

    Raises:
        StartupError: an allow-list cannot be satisfied.
    """
    catalog, hub = open_catalog(settings), open_hub(settings)
    specs = {spec.id: spec for spec in catalog.known.values()}
    for listed in catalog.listed.values():
        specs |= listed
    made = sorted(origins(settings.cache_dir), key=lambda one: one.converted)
    rows = [_row(name, specs[name], catalog, hub, made) for name in sorted(specs)]
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return
    show([_COLUMNS, *(tuple(map(_cell, row.values())) for row in rows)])


def fetch_models(settings: Settings, names: Sequence[str], *, allowed: bool, verify: bool) -> None:
    """Download models, with progress bars, or hash again what was downloaded.

    `names` are ids or aliases; `allowed` adds all models of the allow-lists. `verify` compares
    contents with the hashes they were published with; damaged files are fetched again.

    Raises:
        StartupError: a name is not known, or files cannot be had.
    """
    catalog, hub = open_catalog(settings), open_hub(settings, progress=sys.stderr.isatty())
    try:
        specs = [catalog.find(name) for name in names]
        specs += catalog.models.values() if allowed else []
        if not specs:
            raise StartupError("fetch: name models, or say --allowed")
        for spec in {spec.id: spec for spec in specs}.values():
            print(f"{spec.id}: {_fetched(identified(spec, hub), hub, verify=verify)}")
    except (FilesError, ModelFilesError) as exc:
        raise StartupError(str(exc)) from exc


def _fetched(spec: ModelSpec, hub: Hub, *, verify: bool) -> str:
    """Where the model's files are, and what had to be fetched again."""
    if not spec.origin:
        return str(spec.located)
    damaged = hub.verify(spec.origin) if verify else []
    directory = hub.fetch(spec.origin, check=bool(damaged))
    return f"{directory}" + "".join(f", fetched {one} again" for one in damaged)


def _row(
    name: str, spec: ModelSpec, catalog: Catalog, hub: Hub, made: Sequence[GraphOrigin]
) -> dict[str, Any]:
    return {
        "id": name,
        "kind": spec.kind,
        "dimensions": spec.dimensions,
        "max_tokens": spec.max_tokens,
        "megabytes": round(spec.size / _MEGABYTE),
        "source": str(spec.located or (spec.origin and spec.origin.repo)),
        "license": spec.license,
        "cached": bool(spec.located) or _cached(spec, hub),
        "converted": _converted(spec, made),
        "allowed": spec.id in catalog.models,
    }


def _cached(spec: ModelSpec, hub: Hub) -> bool:
    """A cache that cannot be read is none."""
    with suppress(FilesError):
        return spec.origin is not None and hub.cached(spec.origin)
    return False


def _converted(spec: ModelSpec, made: Sequence[GraphOrigin]) -> datetime | None:
    """When a graph was last made of it; `made` has the newest one last."""
    here = str(spec.located.resolve()) if spec.located else ""
    of_it = [one for one in made if (one.directory == here if here else one.model in spec.names)]
    return of_it[-1].converted if of_it else None


def _cell(value: Any) -> str:
    """Nothing known is a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d}"
    return str(value or "-")
