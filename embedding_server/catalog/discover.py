"""An id that is in no list -> the model that lies in the hub's repository of that name.

What is served is chosen from the names of its files, what it is like is read from its
configuration, both as for own models. Weights are fetched when the model is first loaded, and no
code of a repository is ever run.
"""

import re
from typing import TYPE_CHECKING

import msgspec

from embedding_server.catalog.description import CONFIGURATION, ESSENTIAL, ModelFilesError
from embedding_server.catalog.local import (
    LOADABLE,
    describe,
    model_file,
    nothing_to_load,
    require_family,
)
from embedding_server.catalog.modules import module_files
from embedding_server.convert import INDEX, WEIGHTS
from embedding_server.core import Kind, ModelSpec, Origin, Pooling

if TYPE_CHECKING:
    from collections.abc import Collection

    from embedding_server.catalog.files import Hub
    from embedding_server.catalog.snapshot import Snapshot
    from embedding_server.settings import Names

_REPOSITORY = re.compile(r"[^\s/]+/[^\s/]+")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_repository(name: str) -> bool:
    """Whether a name looks like one of the hub's: owner/name."""
    return bool(_REPOSITORY.fullmatch(name))


def stand_in(name: str, kind: Kind) -> ModelSpec:
    """What stands for a repository while the hub cannot be asked about it."""
    return ModelSpec(
        id=name,
        kind=kind,
        origin=Origin(repo=name, files=()),
        pooling=Pooling.NONE,
        max_tokens=0,
        dimensions=0,
    )


def discover(origin: Origin, hub: "Hub") -> ModelSpec:
    """The model of a repository, which `origin` names without files; blocks.

    A cached listing of the files is taken as it is. Where an older client left none, and offline,
    the files that are cached are all there are.

    Raises:
        FilesError: the repository cannot be had; offline, that the model is not all in the cache.
        ModelFilesError: it has nothing that could be served.
    """
    snapshot, repo = hub.configuration(origin), origin.repo
    if snapshot.listing is None and not hub.offline and not _is_whole(snapshot):
        snapshot = hub.configuration(origin, ask=True)
    if not any(name in snapshot.names for name in LOADABLE):
        raise nothing_to_load(repo)
    if missing := [name for name in _needed(snapshot.names) if name not in snapshot.names]:
        raise ModelFilesError(f"{repo} has no {', '.join(missing)}")
    modules = module_files(snapshot.directory)
    if missing := [name for name in modules if name not in snapshot.names]:
        raise ModelFilesError(f"{repo} has no {', '.join(missing)}; pickled weights are not read")
    modules = tuple(name for name in modules if name not in CONFIGURATION)
    configs = tuple(name for name in modules if name.endswith(".json"))
    directory = hub.fetch(msgspec.structs.replace(origin, files=configs)) if configs else None
    spec = describe(directory or snapshot.directory, repo)
    file = model_file(spec, snapshot.present if hub.offline else snapshot.names, repo)
    if file is None:
        require_family(snapshot.directory, repo)
    found = msgspec.structs.replace(origin, files=_files(file, snapshot.names) + modules)
    if hub.offline:
        hub.fetch(found)
    return msgspec.structs.replace(spec, origin=found, file=file)


def _needed(names: "Collection[str]") -> "Names":
    """What there must be: images are not tokenised."""
    picture = "preprocessor_config.json" in names and "tokenizer.json" not in names
    return ("config.json",) if picture else ESSENTIAL


def _is_whole(snapshot: "Snapshot") -> bool:
    try:
        modules = module_files(snapshot.directory)
    except ModelFilesError:
        return False
    there = snapshot.present
    return not there.isdisjoint(LOADABLE) and there.issuperset(modules)


def _files(file: str | None, names: "Collection[str]") -> "Names":
    """A graph with its external data, whose names begin with the graph's, or weights."""
    if file:
        return tuple(sorted(name for name in names if name.startswith(file)))
    if WEIGHTS in names:
        return (WEIGHTS,)
    return (INDEX, *sorted(filter(_SHARD.fullmatch, names)))
