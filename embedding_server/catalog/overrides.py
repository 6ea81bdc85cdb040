"""What the entries of `INFERENCE_MODEL_CONFIG` make of the models they name.

An entry that says nothing but a name is one more name of that model. Any other is a model of its
own, whose id is the entry's key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from embedding_server.catalog.config import Entry, Type
from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.local import read_directory, weights_limit
from embedding_server.convert import INDEX, WEIGHTS
from embedding_server.core import Kind, ModelSpec
from embedding_server.errors import SettingsError

_TEXTS = (Kind.DENSE, Kind.STATIC, Kind.SPARSE, Kind.MULTI)
_MEANT: Mapping[str, tuple[Kind, ...]] = {
    "pooling": (Kind.DENSE,),
    "max_tokens": (*_TEXTS, Kind.CROSS),
    "prompts": _TEXTS,
    "dimensions": (Kind.DENSE, Kind.STATIC, Kind.MULTI, Kind.IMAGE),
    "file": tuple(Kind),
}
"""Keys that say nothing about models of other kinds."""
_GRAPH_KEYS = ("pooling", "max_tokens", "file")
"""Nor do these about models that FastEmbed runs."""


class OverrideError(ModelFilesError):
    """A model cannot be what an override wants; `key` says which one."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


def configured(entries: Sequence[Entry], bases: Sequence[ModelSpec]) -> list[ModelSpec]:
    """The models of the entries, which name these ones; no key is a name of two of them.

    Raises:
        SettingsError: an entry wants what its model cannot be.
    """
    changed = [
        _changed(entry, base) for entry, base in zip(entries, bases, strict=True) if entry.overrides
    ]
    plain: dict[tuple[str, Path | None], tuple[ModelSpec, list[str]]] = {}
    for entry, base in zip(entries, bases, strict=True):
        if not entry.overrides:
            plain.setdefault((base.id, base.located), (base, []))[1].append(entry.key)
    taken = {entry.key for entry in entries}
    return changed + [_renamed(base, keys, taken) for base, keys in plain.values()]


def directory_model(entry: Entry, directory: Path) -> ModelSpec:
    """The model in the entry's directory, as its files say; raises `SettingsError`."""
    file = entry.overrides.file
    if file and not (directory / file).is_file():
        raise SettingsError(f"{entry.said('file')}: there is no {directory / file}")
    try:
        kind = entry.type.kinds[0] if len(entry.type.kinds) == 1 else None
        return read_directory(directory, entry.key, said=entry.overrides, kind=kind)
    except ModelFilesError as exc:
        raise SettingsError(f"{entry.said('name')}: {exc}") from exc


def overridden(spec: ModelSpec) -> ModelSpec:
    """The spec with what its `overrides` say in place; doing it again changes nothing.

    Raises:
        OverrideError: its weights have fewer positions or dimensions.
    """
    said, width = spec.overrides, spec.width
    if said.max_tokens and spec.located:
        _check_limit(spec.id, said.max_tokens, weights_limit(spec.located))
    if said.dimensions and 0 < width < said.dimensions:
        raise OverrideError(
            "dimensions", f"{spec.id} gives {width} dimensions, not {said.dimensions}"
        )
    return msgspec.structs.replace(
        _refiled(spec),
        pooling=said.pooling or spec.pooling,
        max_tokens=said.max_tokens or spec.max_tokens,
        prompts=spec.prompts if said.prompts is None else said.prompts,
        dimensions=said.dimensions or spec.dimensions,
        min_dimensions=min(spec.min_dimensions, said.dimensions or spec.min_dimensions),
        uncut=width if said.dimensions else 0,
        precision=said.precision or spec.precision,
        token_ids=said.token_ids or spec.token_ids,
    )


def again(found: ModelSpec, spec: ModelSpec) -> ModelSpec:
    """What was found of a model that `spec` stood for, called as that and with its overrides.

    Raises:
        OverrideError: as in `overridden`.
    """
    names = {"id": spec.id, "aliases": spec.aliases}
    return overridden(msgspec.structs.replace(found, **names, overrides=spec.overrides))


def check_limit(entry: Entry, listed: ModelSpec) -> None:
    """Raise `SettingsError` if a list knows better how many tokens the weights take."""
    try:
        _check_limit(entry.name, entry.overrides.max_tokens or 0, listed.max_tokens)
    except OverrideError as exc:
        raise SettingsError(f"{entry.said(exc.key)}: {exc}") from exc


def check_type(entry: Entry, spec: ModelSpec) -> None:
    """Raise `SettingsError` if the model is not of the entry's type, or cannot have its keys."""
    if spec.unidentified:
        return
    if spec.kind not in entry.type.kinds:
        known = ", ".join(one for one in Type if spec.kind in one.kinds)
        raise SettingsError(
            f"{entry.said('type')}: {entry.name} is a {spec.kind} model, not for {entry.type}: its"
            f" type is {known}"
        )
    for key, kinds in _MEANT.items():
        meant = spec.kind in kinds and not (spec.fastembed and key in _GRAPH_KEYS)
        if getattr(entry.overrides, key) is not None and not meant:
            raise SettingsError(
                f"{entry.said(key)}: {key} means nothing for {entry.name}, a {spec.kind} model"
            )


def _changed(entry: Entry, base: ModelSpec) -> ModelSpec:
    """A model of its own: the base as the entry wants it."""
    said = entry.overrides
    spec = msgspec.structs.replace(base, id=entry.key, aliases=(), overrides=said)
    if not base.origin:
        _check_present(entry, base)
    try:
        return overridden(spec)
    except OverrideError as exc:
        raise SettingsError(f"{entry.said(exc.key)}: {exc}") from exc


def _check_limit(name: str, wanted: int, limit: int) -> None:
    if 0 < limit < wanted:
        raise OverrideError("max_tokens", f"{name} has positions for {limit} tokens, not {wanted}")


def _check_present(entry: Entry, base: ModelSpec) -> None:
    """Raise `SettingsError` if a model of this machine would have to be another one."""
    said = entry.overrides
    if said.revision:
        raise SettingsError(f"{entry.said('revision')}: {entry.name} is here, without revisions")
    if said.file and _graph(said.file) != base.file:
        raise SettingsError(f"{entry.said('file')}: {entry.name} has no {said.file}")


def _refiled(spec: ModelSpec) -> ModelSpec:
    """A published model with the file and revision that are wanted."""
    said, origin = spec.overrides, spec.origin
    if not origin or not (said.file or said.revision):
        return spec
    origin = msgspec.structs.replace(origin, revision=said.revision or origin.revision)
    file = spec.file
    if said.file and not spec.unidentified:
        files = _files(file, origin.files, said.file)
        file, origin = _graph(said.file), msgspec.structs.replace(origin, files=files)
    return msgspec.structs.replace(spec, file=file, origin=origin, size=0)


def _graph(file: str) -> str | None:
    """What `ModelSpec.file` says of a file."""
    return None if file in (WEIGHTS, INDEX) else file


def _files(old: str | None, files: Sequence[str], new: str) -> tuple[str, ...]:
    """A model's files with another graph; its external data is called after the graph."""
    if old is None or new == WEIGHTS:
        # What else there is belongs to the modules behind the graph.
        kept = [name for name in files if "/" in name and not name.startswith("onnx/")]
        return (new, *(name for name in kept if name != new))
    return tuple(new + name.removeprefix(old) if name.startswith(old) else name for name in files)


def _renamed(base: ModelSpec, keys: Sequence[str], taken: set[str]) -> ModelSpec:
    """The base under the names that no other entry takes, and its keys."""
    kept = [name for name in base.names if name not in taken or name in keys]
    name, *aliases = dict.fromkeys([*kept, *keys])
    return msgspec.structs.replace(base, id=name, aliases=tuple(aliases))
