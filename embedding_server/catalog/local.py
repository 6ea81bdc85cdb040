"""A directory in the sentence-transformers layout -> a `ModelSpec`.

Read are `config.json`, `modules.json`, `1_Pooling/config.json`, those of Dense modules,
`sentence_bert_config.json`, `tokenizer_config.json` and `config_sentence_transformers.json`; only
the first must be there, and an exported graph or `model.safetensors`.
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from embedding_server.convert import ACTIVATIONS, ConvertError, require_weights
from embedding_server.core import Kind, ModelSpec, Overrides, Pooling, Projection
from embedding_server.settings import Names

_POOLING_FLAGS = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_GRAPHS, _WEIGHTS = ("model.onnx", "onnx/model.onnx"), "model.safetensors"
_PLAIN = re.compile(r"\w[\w.-]*")
"""A name of a directory, which is neither `..` nor a pattern."""
_POOLED = "sentence_embedding"
"""What sentence-transformers calls a text's vector."""
_SHARDS = "model.safetensors.index.json"
_DATA = ("model.onnx_data", "onnx/model.onnx_data")
_DESCRIPTIONS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_WIDTHS = ("hidden_size", "dim", "n_embd", "d_model")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Types of models whose positions begin behind the padding id."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_trained_positions")
_NOTHING = Overrides()
_UNLIMITED = 1_000_000
"""tokenizer_config.json writes 1e30 where it knows no limit."""


class ModelFilesError(Exception):
    """A model's files are missing or say something that cannot be served."""


class FilesError(Exception):
    """Files cannot be had; the message is one line that says which, why, and what to do.

    `retry`: another try later may work, the hub could not be reached or the transfer broke.
    """

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


def read_directory(
    directory: Path,
    name: str,
    *,
    aliases: Names = (),
    description: str = "",
    weights_sha256: str | None = None,
    said: Overrides = _NOTHING,
) -> ModelSpec:
    """Describe the model in `directory` under the id `name`.

    What the directory cannot say (pooling, limit, which file), `said` may.

    Raises:
        ModelFilesError: a file is missing, is no JSON, or asks for a pooling that is not known.
    """
    wanted = (said.file,) if said.file else (*_GRAPHS, _WEIGHTS, _SHARDS)
    _require_inside(directory, (*wanted, *_DATA, *_DESCRIPTIONS))
    _require_inside(directory, dense_files(directory))
    spec = describe(directory, name, said)
    _require_weights(directory, spec)
    there = [file for file in wanted if (directory / file).is_file()]
    return msgspec.structs.replace(
        spec,
        located=directory,
        file=model_file(there, directory, wanted),
        description=description,
        aliases=aliases,
        weights_sha256=weights_sha256,
    )


def describe(directory: Path, name: str, said: Overrides = _NOTHING) -> ModelSpec:
    """What the configuration in `directory` says of the model `name`; nothing of its weights.

    What it cannot say, `said` may.

    Raises:
        ModelFilesError: as in `read_directory`.
    """
    with _readable(directory):
        return _describe(directory, name, said)


def dense_files(directory: Path) -> Names:
    """What the Dense modules in `directory` consist of: configurations, then weights.

    Raises:
        ModelFilesError: modules.json is odd, or a module lies outside the directory.
    """
    with _readable(directory):
        modules = _read(directory / "modules.json")
        paths = [_path(directory, module) for module in modules if _kind(module) == "Dense"]
    return tuple(f"{path}/{name}" for name in ("config.json", _WEIGHTS) for path in paths)


def model_file(
    names: Collection[str], owner: object, wanted: Names = (*_GRAPHS, _WEIGHTS)
) -> str | None:
    """The exported graph among these files of `owner`, None: weights that are to be converted.

    `wanted` are those that would do, the best first.

    Raises:
        ModelFilesError: there is neither.
    """
    for name in wanted:
        if name in names and name != _SHARDS:
            return None if name == _WEIGHTS else name
    if _SHARDS in names:
        raise ModelFilesError(f"{owner} has its weights in shards ({_SHARDS}): not served yet")
    known = ", ".join(wanted)
    raise ModelFilesError(f"{owner} has none of {known}; pickled weights are not read")


def complete(spec: ModelSpec, directory: Path) -> ModelSpec:
    """What the catalogue knows of a model, and what the files in `directory` add to it.

    Raises:
        ModelFilesError: a file is missing or is no JSON.
    """
    _require_weights(directory, spec)
    with _readable(directory):
        own = spec.fastembed or spec.kind is Kind.IMAGE
        config = _read(directory / "config.json", required=not own)
        limited = not own or (directory / "tokenizer.json").exists()
        limit = _max_tokens(directory, config, spec.max_tokens) if limited else 0
        return msgspec.structs.replace(
            spec,
            located=directory,
            max_tokens=limit + (spec.markers is not None and not spec.markers.counted),
            pad=config.get("pad_token_id") or 0,
            prompts=spec.prompts or _prompts(directory),
        )


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Turn what odd JSON leads to into a `ModelFilesError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as exc:
        raise ModelFilesError(f"{directory}: its JSON files lack {exc}") from exc
    except ValueError as exc:
        raise ModelFilesError(f"{directory}: its JSON files are odd: {exc}") from exc


def _require_inside(directory: Path, names: Names) -> None:
    """Refuse links that leave the directory."""
    root = directory.resolve()
    for path in (directory / name for name in names):
        if not path.resolve().is_relative_to(root):
            raise ModelFilesError(f"{path} is a link to {path.resolve()}, outside its directory")


def _require_weights(directory: Path, spec: ModelSpec) -> None:
    try:
        require_weights(directory, spec.projections)
    except ConvertError as exc:
        raise ModelFilesError(str(exc)) from exc


def _describe(directory: Path, name: str, said: Overrides) -> ModelSpec:
    config = _read(directory / "config.json", required=True)
    modules = _read(directory / "modules.json") or [{"type": "Transformer"}, {"type": "Pooling"}]
    kinds = [_kind(module) for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Dense", "Normalize"}
    if unknown:
        raise ModelFilesError(f"{directory}/modules.json: {', '.join(unknown)} is not supported")
    architecture = (config.get("architectures") or [""])[0]
    scores = architecture.endswith("ForSequenceClassification")
    width = 0 if scores else _width(config)
    projections = _projections(directory, modules, width)
    return ModelSpec(
        id=name,
        kind=Kind.CROSS if scores else Kind.DENSE,
        pooling=Pooling.NONE
        if scores
        else said.pooling or _pooling(directory / "1_Pooling" / "config.json"),
        max_tokens=said.max_tokens or _max_tokens(directory, config),
        projections=projections,
        dimensions=projections[-1].outputs if projections else width,
        pad=config.get("pad_token_id") or 0,
        prompts=_prompts(directory),
    )


def _kind(module: dict[str, str]) -> str:
    return module["type"].rpartition(".")[2]


def _path(directory: Path, module: dict[str, str]) -> str:
    path = module["path"]
    if not all(map(_PLAIN.fullmatch, path.split("/"))):
        raise ModelFilesError(f"{directory}/modules.json: {path!r} is no directory within it")
    return path


def _projections(
    directory: Path, modules: list[dict[str, str]], width: int
) -> tuple[Projection, ...]:
    """The Dense modules behind a pooling that gives vectors of `width`."""
    found: list[Projection] = []
    kinds = [_kind(module) for module in modules]
    for index, module in enumerate(modules):
        if kinds[index] != "Dense":
            continue
        if "Pooling" not in kinds[:index]:
            raise ModelFilesError(f"{directory}/modules.json: Dense before Pooling is not served")
        normalized = kinds[index - 1] == "Normalize"
        one = _projection(directory, _path(directory, module), normalized=normalized)
        if one.inputs != width:
            path = f"{directory / one.path}/config.json"
            raise ModelFilesError(f"{path}: in_features {one.inputs}, but {width} go into it")
        found.append(one)
        width = one.outputs
    return tuple(found)


def _projection(directory: Path, path: str, *, normalized: bool) -> Projection:
    file = directory / path / "config.json"
    config = _read(file, required=True)
    if (taken := config.get("module_input_name", _POOLED)) != _POOLED:
        raise ModelFilesError(f"{file}: module_input_name {taken} is not supported, {_POOLED} is")
    if (activation := config["activation_function"]) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelFilesError(f"{file}: {activation} is not supported, one of {known} is")
    return Projection(
        path=path,
        inputs=int(config["in_features"]),
        outputs=int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=activation,
        normalized=normalized,
    )


def _prompts(directory: Path) -> dict[str, str]:
    prompts = _read(directory / "config_sentence_transformers.json").get("prompts") or {}
    return {key: text for key, text in prompts.items() if text}


def _pooling(path: Path) -> Pooling:
    flags = _read(path) or {"pooling_mode_mean_tokens": True}
    chosen = [key for key, on in flags.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in _POOLING_FLAGS:
        known = ", ".join(_POOLING_FLAGS)
        raise ModelFilesError(f"{path}: pooling {chosen} is not supported, one of {known} is")
    return _POOLING_FLAGS[chosen[0]]


def _width(config: dict[str, Any]) -> int:
    found = [int(config[key]) for key in _WIDTHS if config.get(key)]
    if not found:
        raise KeyError(_WIDTHS[0])
    return found[0]


def _max_tokens(directory: Path, config: dict[str, Any], known: int = 0) -> int:
    """`max_seq_length`, else the tokenizer's limit, else the positions; never above these.

    `known` is what the catalogue says that the weights allow; 0 where it does not say.
    """
    positions = min(filter(None, (_positions(config), known)), default=0)
    listed = _read(directory / "sentence_bert_config.json").get("max_seq_length")
    tokenizer = _read(directory / "tokenizer_config.json").get("model_max_length")
    if listed is None and tokenizer is not None and tokenizer < _UNLIMITED:
        listed = tokenizer
    if not listed and not positions:
        raise KeyError(_POSITIONS[0])
    return min(int(listed or positions), positions or int(listed))


def weights_limit(directory: Path) -> int:
    """Tokens that the weights in `directory` have positions for; 0: their config does not say.

    Raises:
        ModelFilesError: it cannot be read.
    """
    with _readable(directory):
        return _positions(_read(directory / "config.json"))


def _positions(config: dict[str, Any]) -> int:
    found = next((int(config[key]) for key in _POSITIONS if config.get(key)), 0)
    if config.get("model_type") in _OFFSET_POSITIONS:
        found -= 1 + (config.get("pad_token_id") or 0)
    return found


def _read(path: Path, *, required: bool = False) -> Any:
    """The parsed file; {} where it may be and is missing."""
    try:
        content = path.read_bytes()
        return json.loads(content) if content or required else {}
    except FileNotFoundError as exc:
        if required:
            raise ModelFilesError(f"{path} is missing") from exc
        return {}
    except OSError as exc:
        raise ModelFilesError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ModelFilesError(f"{path}: {exc}") from exc
