"""A directory in the sentence-transformers layout -> a `ModelSpec`.

Read are `config.json`, `modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`,
`tokenizer_config.json` and `config_sentence_transformers.json`; only the first must be there, and
an exported graph or `model.safetensors`.
"""

import json
from pathlib import Path
from typing import Any

from embedding_server.core import ModelSpec, Pooling
from embedding_server.settings import Names

_POOLING_FLAGS = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_GRAPHS, _WEIGHTS = ("model.onnx", "onnx/model.onnx"), "model.safetensors"
_UNLIMITED = 1_000_000
"""tokenizer_config.json writes 1e30 where it knows no limit."""


class ModelFilesError(Exception):
    """A model's files are missing or say something that cannot be served."""


def read_directory(
    directory: Path,
    name: str,
    *,
    aliases: Names = (),
    description: str = "",
    weights_sha256: str | None = None,
) -> ModelSpec:
    """Describe the model in `directory` under the id `name`.

    Raises:
        ModelFilesError: a file is missing, is no JSON, or asks for a pooling that is not known.
    """
    try:
        return _describe(directory, name, aliases, description, weights_sha256)
    except (KeyError, TypeError, AttributeError) as exc:
        raise ModelFilesError(f"{directory}: its JSON files lack {exc}") from exc


def _describe(
    directory: Path, name: str, aliases: Names, description: str, weights_sha256: str | None
) -> ModelSpec:
    config = _read(directory / "config.json", required=True)
    modules = _read(directory / "modules.json") or [{"type": "Transformer"}, {"type": "Pooling"}]
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ModelFilesError(f"{directory}/modules.json: {', '.join(unknown)} is not supported")
    prompts = _read(directory / "config_sentence_transformers.json").get("prompts") or {}
    return ModelSpec(
        id=name,
        located=directory,
        pooling=_pooling(directory / "1_Pooling" / "config.json"),
        max_tokens=_max_tokens(directory, config),
        dimensions=config["hidden_size"],
        file=_graph(directory),
        pad=config.get("pad_token_id") or 0,
        description=description,
        aliases=aliases,
        prompts={key: text for key, text in prompts.items() if text},
        weights_sha256=weights_sha256,
    )


def _graph(directory: Path) -> str | None:
    """The exported graph, if there is one; else there must be weights that can be converted."""
    root = directory.resolve()
    for name in (*_GRAPHS, _WEIGHTS):
        path = directory / name
        if path.exists():
            if not path.resolve().is_relative_to(root):
                raise ModelFilesError(
                    f"{path} is a link to {path.resolve()}, outside its directory"
                )
            return None if name == _WEIGHTS else name
    known = ", ".join((*_GRAPHS, _WEIGHTS))
    raise ModelFilesError(f"{directory} has none of {known}; pickled weights are not read")


def _pooling(path: Path) -> Pooling:
    flags = _read(path) or {"pooling_mode_mean_tokens": True}
    chosen = [key for key, on in flags.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in _POOLING_FLAGS:
        known = ", ".join(_POOLING_FLAGS)
        raise ModelFilesError(f"{path}: pooling {chosen} is not supported, one of {known} is")
    return _POOLING_FLAGS[chosen[0]]


def _max_tokens(directory: Path, config: dict[str, Any]) -> int:
    """`max_seq_length`, else the tokenizer's limit, else the positions; never above these."""
    positions = int(config["max_position_embeddings"])
    listed = _read(directory / "sentence_bert_config.json").get("max_seq_length")
    tokenizer = _read(directory / "tokenizer_config.json").get("model_max_length")
    if listed is None and tokenizer is not None and tokenizer < _UNLIMITED:
        listed = tokenizer
    return min(int(listed or positions), positions)


def _read(path: Path, *, required: bool = False) -> Any:
    """The parsed file; {} where it may be and is missing."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        if required:
            raise ModelFilesError(f"{path} is missing") from exc
        return {}
    except ValueError as exc:
        raise ModelFilesError(f"{path}: {exc}") from exc
