"""A directory in the sentence-transformers layout -> a `ModelSpec`.

Read are `config.json`, `modules.json`, `1_Pooling/config.json`, those of Dense modules,
`sentence_bert_config.json`, `tokenizer_config.json` and `config_sentence_transformers.json`; the
first must be there, `tokenizer.json` where texts are read, and an exported graph or
`model.safetensors`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from embedding_server.catalog.description import (
    CONFIGURATION,
    ModelFilesError,
    read,
    readable,
)
from embedding_server.catalog.fastembed import STATIC_TOKENS
from embedding_server.catalog.modules import form, module_files
from embedding_server.convert import (
    INDEX,
    WEIGHTS,
    ConvertError,
    family_of,
    require_weights,
    weight_files,
)
from embedding_server.core import Kind, ModelSpec, Overrides
from embedding_server.settings import Names

_GRAPHS = ("model.onnx", "onnx/model.onnx")
LOADABLE = (*_GRAPHS, WEIGHTS, INDEX)
"""What a model may be, the best first."""
_DATA = ("model.onnx_data", "onnx/model.onnx_data")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Types of models whose positions begin behind the padding id."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_trained_positions")
_NOTHING = Overrides()
_EXPORTED = (Kind.MULTI, Kind.IMAGE)
"""Kinds that are not converted from weights."""
_UNLIMITED = 1_000_000
"""tokenizer_config.json writes 1e30 where it knows no limit."""


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
    kind: Kind | None = None,
) -> ModelSpec:
    """Describe the model in `directory` under the id `name`.

    What the directory cannot say (pooling, limit, which file), `said` may; nor what `kind` it is,
    where nothing tells it from a dense model.

    Raises:
        ModelFilesError: a file is missing, is no JSON, or asks for a pooling that is not known.
    """
    wanted = (said.file,) if said.file else LOADABLE
    _require_inside(directory, (*wanted, *_DATA, *CONFIGURATION))
    _require_inside(directory, module_files(directory))
    spec = describe(directory, name, said, kind)
    if spec.kind is not Kind.IMAGE and not (directory / "tokenizer.json").exists():
        raise ModelFilesError(f"{directory / 'tokenizer.json'} is missing")
    _require_weights(directory, spec)
    there = [file for file in wanted if (directory / file).is_file()]
    file = model_file(spec, there, directory, wanted)
    if file is None:
        require_family(directory, directory)
        _require_inside(directory, tuple(path.name for path in _weights(directory)))
    return msgspec.structs.replace(
        spec,
        located=directory,
        file=file,
        description=description,
        aliases=aliases,
        weights_sha256=weights_sha256,
    )


def describe(
    directory: Path, name: str, said: Overrides = _NOTHING, kind: Kind | None = None
) -> ModelSpec:
    """What the configuration in `directory` says of the model `name`; nothing of its weights.

    What it cannot say, `said` and `kind` may.

    Raises:
        ModelFilesError: as in `read_directory`.
    """
    with readable(directory):
        return _describe(directory, name, said, kind)


def model_file(
    spec: ModelSpec, names: Collection[str], owner: object, wanted: Names = LOADABLE
) -> str | None:
    """What to load among these files of `owner`, None: weights that are to be converted.

    `wanted` are those that would do, the best first.

    Raises:
        ModelFilesError: there is nothing.
    """
    for name in [spec.file] if spec.file else wanted:
        if name not in names:
            continue
        if name not in (WEIGHTS, INDEX) or spec.file:
            return name
        if spec.kind in _EXPORTED:
            raise ModelFilesError(f"{owner}: {spec.kind} models need an exported graph, model.onnx")
        return None
    raise nothing_to_load(owner, wanted)


def require_family(directory: Path, owner: object) -> None:
    """Raise `ModelFilesError` if the architecture in `directory`, of `owner`, is not converted."""
    with readable(directory):
        config = read(directory / "config.json", required=True)
        try:
            family_of(config)
        except ConvertError as exc:
            raise ModelFilesError(f"{owner}: {exc}") from exc


def _weights(directory: Path) -> list[Path]:
    try:
        return weight_files(directory)
    except ConvertError as exc:
        raise ModelFilesError(str(exc)) from exc


def nothing_to_load(owner: object, wanted: Names = LOADABLE) -> ModelFilesError:
    """What is wrong with `owner` where it has none of these files."""
    return ModelFilesError(f"{owner} has none of {', '.join(wanted)}; pickled weights are not read")


def complete(spec: ModelSpec, directory: Path) -> ModelSpec:
    """What the catalogue knows of a model, and what the files in `directory` add to it.

    Raises:
        ModelFilesError: a file is missing or is no JSON.
    """
    _require_weights(directory, spec)
    with readable(directory):
        own = spec.fastembed or spec.kind is Kind.IMAGE
        config = read(directory / "config.json", required=not own)
        tokenised = spec.kind is not Kind.IMAGE and (directory / "tokenizer.json").exists()
        limited = tokenised or not own
        limit = _max_tokens(directory, config, spec.max_tokens) if limited else 0
        return msgspec.structs.replace(
            spec,
            located=directory,
            max_tokens=limit + (spec.markers is not None and not spec.markers.counted),
            pad=config.get("pad_token_id") or 0,
            prompts=spec.prompts or _prompts(directory),
        )


def descriptions(directory: Path) -> list[str]:
    """Files in `directory` that say what the model there is, with the weights of Dense modules.

    Raises:
        ModelFilesError: modules.json is odd.
    """
    modules = (str(path.relative_to(directory)) for path in directory.glob("*/config.json"))
    names = {*CONFIGURATION, *module_files(directory), *modules}
    return sorted(name for name in names if (directory / name).is_file())


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as exc:  # links in a circle
        raise ModelFilesError(f"{path}: {exc}") from exc


def _require_inside(directory: Path, names: Names) -> None:
    """Refuse links that leave the directory."""
    root = directory.resolve()
    for path in (directory / name for name in names):
        if not _resolved(path).is_relative_to(root):
            raise ModelFilesError(f"{path} is a link to {_resolved(path)}, outside its directory")


def _require_weights(directory: Path, spec: ModelSpec) -> None:
    try:
        require_weights(directory, spec.projections)
    except ConvertError as exc:
        raise ModelFilesError(str(exc)) from exc


def _describe(directory: Path, name: str, said: Overrides, wanted: Kind | None) -> ModelSpec:
    pictures = (directory / "preprocessor_config.json").exists()
    config = read(directory / "config.json", required=not pictures)
    found = form(directory, config, said, wanted)
    limit = STATIC_TOKENS if found.kind is Kind.STATIC else said.max_tokens
    if found.markers and not limit:
        # pylate writes the limit of whatever it tokenised last elsewhere.
        limit = max(found.markers.query_tokens, found.markers.document_tokens)
    if not limit and found.kind is not Kind.IMAGE:
        limit = _max_tokens(directory, config)
    return ModelSpec(
        id=name,
        max_tokens=limit or 0,
        pad=config.get("pad_token_id") or 0,
        prompts=_prompts(directory),
        **msgspec.structs.asdict(found),
    )


def _prompts(directory: Path) -> dict[str, str]:
    prompts = read(directory / "config_sentence_transformers.json").get("prompts") or {}
    return {key: text for key, text in prompts.items() if isinstance(text, str)}


def _max_tokens(directory: Path, config: dict[str, Any], known: int = 0) -> int:
    """`max_seq_length`, else the tokenizer's limit, else the positions; never above these.

    `known` is what the catalogue says that the weights allow; 0 where it does not say.
    """
    positions = min(filter(None, (_positions(config), known)), default=0)
    listed = read(directory / "sentence_bert_config.json").get("max_seq_length")
    tokenizer = read(directory / "tokenizer_config.json").get("model_max_length")
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
    with readable(directory):
        return _positions(read(directory / "config.json"))


def _positions(config: dict[str, Any]) -> int:
    found = next((int(config[key]) for key in _POSITIONS if config.get(key)), 0)
    if found and config.get("model_type") in _OFFSET_POSITIONS:
        pad = config.get("pad_token_id")
        found -= 2 if pad is None else 1 + pad
    return found
