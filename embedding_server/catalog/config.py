"""`INFERENCE_MODEL_CONFIG`: a YAML file of models -> entries; what they mean `overrides` says.

```yaml
models:
  my-dense: {name: org/model-or-directory, type: embeddings, pooling: mean, max_tokens: 512}
  my-reranker: {name: BAAI/bge-reranker-base, type: rerank}
```

Every mistake is a `SettingsError` that names the file and the line.
"""

import difflib
import os.path
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import msgspec
import yaml

from embedding_server.core import Kind, Overrides, Pooling, Precision, Task, TokenIds
from embedding_server.errors import SettingsError

_MODELS = "models"
_MOST_TOKENS, _MOST_DIMENSIONS = 1 << 20, 1 << 16
_NAME = re.compile(r"[^\s,*]+")
_FILE = r"^(?!.*(^|/)\.\.?(/|$))([^/]+/)*([^/]+\.onnx|model\.safetensors)$"
_REVISION = r"^(?!.*\.\.)\w[\w./-]*$"
_POOLINGS = (Pooling.MEAN, Pooling.CLS, Pooling.LAST)
"""Those of dense models; the others follow from what a model is."""


class Type(StrEnum):
    """What the file calls a model."""

    EMBEDDINGS = "embeddings"
    SPARSE = "sparse-embeddings"
    MULTI = "late-interaction"
    IMAGE = "image-embeddings"
    RERANK = "rerank"

    @classmethod
    def of(cls, task: Task, kind: Kind) -> "Type":
        """What a model of this kind is called that serves this task."""
        return next(one for one in cls if one.task is task and kind in one.kinds)

    @property
    def task(self) -> Task:
        """What clients may ask of it."""
        return Task.RERANK if self is Type.RERANK else Task.EMBED

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it may be."""
        return _KINDS[self]


_KINDS = {
    Type.EMBEDDINGS: (Kind.DENSE, Kind.STATIC),
    Type.SPARSE: (Kind.SPARSE,),
    Type.MULTI: (Kind.MULTI,),
    Type.IMAGE: (Kind.IMAGE,),
    Type.RERANK: (Kind.CROSS, Kind.DENSE, Kind.STATIC, Kind.MULTI),
}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the file: `key` is what clients call it, `name` what it is.

    `directory` is where it lies, if that is on this machine. `lines` are those of its own key, as
    "", and of the keys below that.
    """

    key: str
    name: str
    type: Type
    overrides: Overrides
    directory: Path | None
    path: Path
    lines: Mapping[str, int]

    def said(self, key: str = "") -> str:
        """Where the file says this."""
        return f"{_where(self.path, self.lines.get(key) or self.lines[''])}: {self.key}"


class _Key(NamedTuple):
    """What a key's value must be; `expected` says it in words."""

    type: Any
    expected: str


def _text(pattern: str, expected: str) -> _Key:
    return _Key(Annotated[str, msgspec.Meta(pattern=pattern)], expected)


def _choice(values: Collection[str]) -> _Key:
    return _text(f"^({'|'.join(values)})$", f"one of {', '.join(values)}")


def _number(most: int) -> _Key:
    return _Key(Annotated[int, msgspec.Meta(ge=1, le=most)], f"a number from 1 to {most}")


_KEYS: Mapping[str, _Key] = {
    "name": _text(r"\S", "an id, an alias or a directory"),
    "type": _choice(list(Type)),
    "pooling": _choice(_POOLINGS),
    "max_tokens": _number(_MOST_TOKENS),
    "prompts": _Key(dict[str, str], "a mapping of input types to texts"),
    "dimensions": _number(_MOST_DIMENSIONS),
    "precision": _choice(list(Precision)),
    "revision": _text(_REVISION, "a branch, a tag or a commit, in quotes if it is a number"),
    "file": _text(_FILE, "an .onnx file, or model.safetensors, below the model's directory"),
    "token_ids": _choice(get_args(TokenIds)),
    "long_text": _text("^truncate$", "truncate, nothing else is supported"),
}


def read_config(path: Path, model_path: Path | None = None) -> tuple[Entry, ...]:
    """The models of a file, in its order.

    Args:
        path: the file; directories may be named as seen from where it lies.
        model_path: directories of models that have names already.

    Raises:
        SettingsError: it cannot be read, or says something wrong.
    """
    path = path.expanduser()
    with _located(path):
        root = yaml.compose(_read(path), Loader=yaml.SafeLoader)
        if root is None:
            return ()
        reader = _Reader(path, model_path)
        models = reader.fields(root, (_MODELS,), "the file").get(_MODELS)
        if models is None or _is_null(models[1]):
            return ()
        found = reader.fields(models[1], None, _MODELS)
        return tuple(reader.entry(key, *nodes) for key, nodes in found.items())


class _Reader:
    """Turns nodes of one file into values."""

    def __init__(self, path: Path, model_path: Path | None) -> None:
        self._path = path
        self._roots = [root for root in (model_path, path.parent) if root]
        self._yaml = yaml.constructor.SafeConstructor()
        self._merged: set[int] = set()
        """Nodes, by `id`, that have what they merge; an alias leads to one more than once."""

    def entry(self, key: str, key_node: Any, node: Any) -> Entry:
        """The model called `key`."""
        if not _NAME.fullmatch(key):
            raise self._error(key_node, f"{key!r} is no name: no spaces, commas and `*`")
        nodes = self.fields(node, _KEYS, key)
        if "name" not in nodes:
            raise self._error(key_node, f"{key}: name is missing: say which model it is")
        values = {field: self._checked(key, field, one) for field, (_, one) in nodes.items()}
        lines = {field: _line(first) for field, (first, _) in nodes.items()}
        return Entry(
            key=key,
            name=values["name"],
            type=Type(values.get("type", Type.EMBEDDINGS)),
            overrides=msgspec.convert(values, Overrides),
            directory=self._directory(key, values["name"], nodes["name"][1]),
            path=self._path,
            lines=lines | {"": _line(key_node)},
        )

    def fields(
        self, node: Any, known: Collection[str] | None, owner: str
    ) -> dict[str, tuple[Any, Any]]:
        """The nodes of a mapping's keys and values; `known` None: any keys.

        Merged ones (`<<`) come first, so that the mapping's own win.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{owner}: expected a mapping{_hint(known)}")
        if id(node) not in self._merged:
            self._check_twice(node, owner)
            self._yaml.flatten_mapping(node)
            self._merged.add(id(node))
        fields = {self._key(first, owner): (first, second) for first, second in node.value}
        for key, (key_node, _) in fields.items():
            if known is not None and key not in known:
                raise self._error(key_node, f"{owner}: {key} is not known{_near(key, known)}")
        return fields

    def _check_twice(self, node: Any, owner: str) -> None:
        seen: dict[str, int] = {}
        for one, _ in node.value:
            key = self._key(one, owner)
            if key in seen:
                raise self._error(one, f"{owner}: {key} is on line {seen[key]} already")
            seen[key] = _line(one)

    def _key(self, node: Any, owner: str) -> str:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":str", ":merge")):
            return str(node.value)
        raise self._error(node, f"{owner}: a key must be text, put it in quotes")

    def _checked(self, owner: str, key: str, node: Any) -> Any:
        wanted = _KEYS[key]
        try:
            return msgspec.convert(self._value(node, f"{owner}: {key}"), wanted.type)
        except (ValueError, msgspec.ValidationError) as exc:
            given = repr(node.value) if isinstance(node, yaml.ScalarNode) else node.id
            text = f"{owner}: {key}: expected {wanted.expected}, got {given}"
            raise self._error(node, text) from exc

    def _value(self, node: Any, owner: str) -> Any:
        """A scalar, or a mapping of scalars."""
        if isinstance(node, yaml.ScalarNode):
            return self._yaml.construct_object(node)
        fields = self.fields(node, None, owner)
        for _, one in fields.values():
            if not isinstance(one, yaml.ScalarNode) or not one.tag.endswith(":str"):
                raise self._error(one, f"{owner}: expected texts, put them in quotes")
        return {key: one.value for key, (_, one) in fields.items()}

    def _directory(self, key: str, name: str, node: Any) -> Path | None:
        """Where on this machine the model lies; what looks like a path must be there."""
        relative = os.path.expanduser(name)  # Path raises where there is no home
        for root in self._roots:
            if os.path.isdir(root / relative):  # Path raises where it may not look
                return root / relative
        if name.startswith(("/", ".", "~")):
            raise self._error(node, f"{key}: name: there is no directory {name}")
        return None

    def _error(self, node: Any, text: str) -> SettingsError:
        return SettingsError(f"{_where(self._path, _line(node))}: {text}")


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Say where YAML went wrong."""
    try:
        yield
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        text = f"no YAML: {exc.problem or exc.context}"
        raise SettingsError(f"{_where(path, mark.line + 1)}: {text}") from exc


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        text = content.decode()
        yaml.reader.Reader(text)
    except OSError as exc:
        raise SettingsError(f"{_VARIABLE}={str(path)!r}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise SettingsError(f"{_where(path, line)}: this is no UTF-8") from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise SettingsError(f"{_where(path, line)}: {exc.reason}") from exc
    return text


_VARIABLE = "INFERENCE_MODEL_CONFIG"


def _where(path: Path, line: int) -> str:
    return f"{_VARIABLE}={str(path)!r}, line {line}"


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _is_null(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")


def _hint(known: Collection[str] | None) -> str:
    return f" with keys {', '.join(known)}" if known else ""


def _near(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {near[0]}?" if near else f": one of {', '.join(known)} is"
