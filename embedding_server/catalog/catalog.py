"""What could be served: names -> specs, narrowed to what the allow-lists name.

A request's model name passes here first: `resolve` turns it into a `ModelSpec` or an
`UnsupportedModel` that says why not.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from embedding_server.catalog.config import Entry
from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.discover import is_repository, stand_in
from embedding_server.catalog.local import FilesError
from embedding_server.catalog.overrides import (
    check_limit,
    check_type,
    configured,
    directory_model,
)
from embedding_server.catalog.published import gpu_friendly
from embedding_server.core import Kind, ModelSpec, Task
from embedding_server.errors import SettingsError, UnsupportedModel
from embedding_server.settings import Names

_EVERYTHING = "*"
_SHOWN_CHARS = 200

log = structlog.get_logger()

LookUp = Callable[[str], ModelSpec]
"""The model of a repository of the hub; raises `FilesError` or `ModelFilesError`."""


def _no_hub(name: str) -> ModelSpec:
    raise ModelFilesError(f"there is no hub to look for {name} in")


class Catalog:
    """The allowed models of each task, by every name they have.

    Args:
        specs: models of this machine; the first that claims a name has it.
        allowed: per task the names of the allow-list, or `*`.
        published: lists the models that are known by name and are downloaded when they are wanted;
            asked only where an allow-list or an entry is not satisfied without.
        look_up: finds the model of any other name that could be a repository's.
        entries: models that have names by configuration, and are allowed by that.

    Raises:
        SettingsError: a name of an allow-list or of an entry is not known, or its model cannot do
            what is wanted.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        allowed: Mapping[Task, Names],
        published: Callable[[], Iterable[ModelSpec]] = tuple,
        look_up: LookUp = _no_hub,
        *,
        entries: Sequence[Entry] = (),
    ) -> None:
        self._known: dict[str, ModelSpec] = {}
        self._published = published
        self._look_up = look_up
        self._learn(specs)
        named = {name for names in allowed.values() for name in names}
        named -= {entry.key for entry in entries}
        named |= {entry.name for entry in entries if not entry.directory}
        if not named <= self._known.keys():
            self._learn(published())
        self._configure(entries)
        self.listed: dict[Task, dict[str, ModelSpec]] = {
            task: self._named(task, names) for task, names in allowed.items()
        }
        """Per task: the name as the allow-list or an entry spells it -> its spec."""
        for entry in entries:
            self.listed[entry.type.task][entry.key] = self._known[entry.key]
        self.allowed: dict[Task, dict[str, ModelSpec]] = {
            task: {name: spec for spec in listed.values() for name in spec.names}
            for task, listed in self.listed.items()
        }
        """Per task: every name that a client may use -> its spec."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{task}={len(listed)}" for task, listed in self.listed.items())
        return f"Catalog(known={len(self._known)}, {counts})"

    @property
    def models(self) -> dict[str, ModelSpec]:
        """Every allowed model once, by its canonical id."""
        return {spec.id: spec for listed in self.listed.values() for spec in listed.values()}

    def resolve(self, name: str, *tasks: Task) -> ModelSpec:
        """The spec behind a client's model name, for one of these tasks.

        Raises:
            UnsupportedModel: the model is not allowed, or not for them.
        """
        for task in tasks:
            if spec := self.allowed[task].get(name):
                return spec
        shown = name[:_SHOWN_CHARS]
        if any(name in allowed for allowed in self.allowed.values()):
            raise UnsupportedModel(f"Model {shown} is allowed for another task, not for {tasks[0]}")
        raise UnsupportedModel(f"Model {shown} is not in the allowed models list")

    @property
    def known(self) -> dict[str, ModelSpec]:
        """Every model there is, allowed or not, by every name it has."""
        self._learn(self._published())
        return self._known

    def find(self, name: str) -> ModelSpec:
        """The model of that name, allowed or not, in a list or on the hub.

        Raises:
            SettingsError: there is none.
            FilesError: the hub cannot be reached now.
        """
        if name not in self._known and name not in self.known:
            self._learn([self._found(name)])
        return self._known[name]

    def spec(self, name: str, setting: str) -> ModelSpec:
        """The allowed model that a setting names, whatever its task; raises `SettingsError`."""
        for allowed in self.allowed.values():
            if spec := allowed.get(name):
                return spec
        raise SettingsError(f"{setting}={name!r}: the model is in no allow-list")

    def _learn(self, specs: Iterable[ModelSpec]) -> None:
        """Take in what is not known; a model goes by those of its names that are free."""
        for spec in specs:
            if free := [name for name in spec.names if name not in self._known]:
                here = msgspec.structs.replace(spec, id=free[0], aliases=tuple(free[1:]))
                self._known |= dict.fromkeys(free, here)

    def _configure(self, entries: Sequence[Entry]) -> None:
        """Let the models of `entries` have their keys as names, whoever had these before."""
        here = {spec.located.resolve(): spec for spec in self._known.values() if spec.located}
        listed = [entry for entry in entries if entry.name in self._known]
        bases = {entry.key: self._base(entry, here) for entry in entries}
        for entry in listed:
            if bases[entry.key].origin:
                check_limit(entry, bases[entry.key])
        before, self._known = self._known, {}
        self._learn(configured(entries, list(bases.values())))
        self._learn(before.values())

    def _base(self, entry: Entry, here: dict[Path, ModelSpec]) -> ModelSpec:
        """The model that an entry names; those of this machine are looked up in `here`."""
        task, said = entry.type.task, entry.said("name")
        if not entry.directory:
            spec = self._model(entry.name, task, said)
        elif entry.overrides:
            spec = directory_model(entry, entry.directory)
        else:
            directory = entry.directory.resolve()
            found = here.get(directory)
            # Of another kind, it may be what its files do not tell.
            known = found if found and found.kind in entry.type.kinds else None
            spec = known or directory_model(entry, entry.directory)
            here[directory] = spec
        check_type(entry, spec)
        _check_served(spec, entry.name, task, said)
        return spec

    def _named(self, task: Task, names: Names) -> dict[str, ModelSpec]:
        if _EVERYTHING in names:
            return {**self._everything(task), **self._named(task, _without_star(names))}
        for name in names:
            spec = self._model(name, task, _VARIABLES[task])
            _check_served(spec, name, task, _VARIABLES[task])
        return {name: self._known[name] for name in names}

    def _model(self, name: str, task: Task, said: str) -> ModelSpec:
        """The model of a name that `said` has; raises `SettingsError`."""
        if name not in self._known:
            self._learn([self._found_or_expected(name, task, said)])
        return self._known[name]

    def _everything(self, task: Task) -> dict[str, ModelSpec]:
        """What `*` means: what is on this machine, and published models made for the task."""
        specs = [
            spec
            for spec in self._known.values()
            if spec.kind in SERVED[task]
            and (spec.located or (spec.kind in _MEANT[task] and gpu_friendly(spec)))
        ]
        if not specs:
            raise SettingsError(f"{_VARIABLES[task]}: no model is known that `*` could mean")
        return {spec.id: spec for spec in specs}

    def _found_or_expected(self, name: str, task: Task, said: str) -> ModelSpec:
        """The model of that name on the hub, or what stands for it until the hub is back."""
        try:
            return self._found(name)
        except FilesError as exc:
            log.warning("model.unidentified", model=name, error=str(exc))
            return stand_in(name, SERVED[task][0])
        except SettingsError as exc:
            raise SettingsError(f"{said}: {exc}") from exc

    def _found(self, name: str) -> ModelSpec:
        """The model of a name that no list has; raises as `find` does."""
        reason = ""
        if is_repository(name):
            try:
                return self._look_up(name)
            except (FilesError, ModelFilesError) as exc:
                if isinstance(exc, FilesError) and exc.retry:
                    raise
                reason = f": {exc}"
        raise SettingsError(f"{name!r} is not known{reason}{self._near(name)}")

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._known, n=3, cutoff=0.4)
        return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_served(spec: ModelSpec, name: str, task: Task, said: str) -> None:
    """Raise `SettingsError` if a model that `said` names for a task cannot do it."""
    if spec.kind not in SERVED[task]:
        raise SettingsError(f"{said}: {name!r} is a {spec.kind} model, which cannot {task}")


def _without_star(names: Names) -> Names:
    return tuple(name for name in names if name != _EVERYTHING)


_VARIABLES = {
    Task.EMBED: "INFERENCE_ALLOWED_EMBEDDING_MODELS",
    Task.RERANK: "INFERENCE_ALLOWED_RERANK_MODELS",
}
SERVED = {
    Task.EMBED: (Kind.DENSE, Kind.STATIC, Kind.SPARSE, Kind.MULTI, Kind.IMAGE),
    Task.RERANK: (Kind.CROSS, Kind.DENSE, Kind.STATIC, Kind.MULTI),
}
"""Kinds of models that can do a task."""
_MEANT = {Task.EMBED: SERVED[Task.EMBED], Task.RERANK: (Kind.CROSS,)}
"""Kinds of published models that `*` means: those made for the task."""
