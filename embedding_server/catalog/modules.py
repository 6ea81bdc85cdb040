"""What a model's files make of it: its kind, its pooling, and what else texts go through.

Read are `modules.json` and the directories it names, `config.json` and, for models of the ColBERT
family that pylate wrote, `config_sentence_transformers.json`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from embedding_server.catalog.description import ModelFilesError, read, readable
from embedding_server.convert import ACTIVATIONS, WEIGHTS
from embedding_server.core import (
    FastEmbedModel,
    Kind,
    Markers,
    Overrides,
    Pooling,
    Projection,
    Template,
)
from embedding_server.settings import Names

_POOLING_FLAGS = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_KNOWN = (
    "Transformer",
    "MLMTransformer",
    "StaticEmbedding",
    "Pooling",
    "SpladePooling",
    "Dense",
    "Normalize",
)
_NEW_FLAGS = {
    "pooling_mode_mean": "pooling_mode_mean_tokens",
    "pooling_mode_cls": "pooling_mode_cls_token",
}
_DESCRIBED = ("Pooling", "SpladePooling", "Dense")
"""Modules with a configuration of their own."""
_PLAIN = re.compile(r"\w[\w.-]*")
"""A name of a directory, which is neither `..` nor a pattern."""
_POOLED = "sentence_embedding"
"""What sentence-transformers calls a text's vector."""
_WIDTHS = ("hidden_size", "dim", "hidden_dim", "n_embd", "d_model")
_STATIC = FastEmbedModel("StaticTextEmbedding", "minishlab/potion-base-8M")
"""FastEmbed runs any such model under a name that it knows."""

_RERANKER = Template(
    prefix="<|im_start|>system\nJudge whether the Document meets the requirements based on the"
    ' Query and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n",
    body=(
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
        "<Query>: ",
        "\n<Document>: ",
    ),
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
"""How Qwen3-Reranker's model card has it asked."""


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a `ModelSpec` that says what becomes of a text; `file` None: as it is found."""

    kind: Kind
    pooling: Pooling = Pooling.NONE
    dimensions: int = 0
    projections: tuple[Projection, ...] = ()
    markers: Markers | None = None
    template: Template | None = None
    fastembed: FastEmbedModel | None = None
    takes_images: bool = False
    file: str | None = None


class _Files:
    """A model's directory, as far as its kind depends on it."""

    def __init__(self, directory: Path, config: dict[str, Any], said: Overrides) -> None:
        self.directory, self.config, self.said = directory, config, said
        self.modules: list[dict[str, str]] = read(directory / "modules.json") or []
        self.kinds = [_kind(module) for module in self.modules]
        self.further = read(directory / "config_sentence_transformers.json")
        self.architecture = (config.get("architectures") or [""])[0]
        if unknown := set(self.kinds) - set(_KNOWN):
            raise ModelFilesError(
                f"{directory}/modules.json: {', '.join(unknown)} is not supported"
            )

    def described(self, kind: str) -> list[Path]:
        """The configurations of the modules of a kind, in their order."""
        modules = (one for one in self.modules if _kind(one) == kind and "path" in one)
        return [self.directory / _path(self.directory, one) / "config.json" for one in modules]


def form(directory: Path, config: dict[str, Any], said: Overrides, wanted: Kind | None) -> Form:
    """The form of the model in `directory`; an operator may have `said` what it cannot say.

    `wanted` is its kind where the files do not tell it from a dense model.

    Raises:
        ModelFilesError, KeyError: a file is missing, or says what cannot be served.
    """
    files = _Files(directory, config, said)
    kind = next((kind for kind, told in _TOLD.items() if told(files)), wanted or Kind.DENSE)
    return _FORMS[kind](files)


def _is_image(files: _Files) -> bool:
    there = [(files.directory / name).exists() for name in ("preprocessor_config.json", _TOKENIZER)]
    return there == [True, False]


def _is_scored(files: _Files) -> bool:
    told = files.modules or files.said.pooling
    asked = files.architecture.endswith("ForCausalLM") and not told
    return asked or files.architecture.endswith("ForSequenceClassification")


_TOKENIZER = "tokenizer.json"
_TOLD: Mapping[Kind, Callable[[_Files], bool]] = {
    Kind.IMAGE: _is_image,
    Kind.STATIC: lambda files: files.architecture == "StaticModel",
    Kind.SPARSE: lambda files: "SpladePooling" in files.kinds,
    Kind.MULTI: lambda files: "query_prefix" in files.further,
    Kind.CROSS: _is_scored,
}
"""Kind -> whether the files tell that it is one; the first that they tell holds."""


def _dense(files: _Files) -> Form:
    modules = files.modules or [{"type": "Transformer"}, {"type": "Pooling"}]
    width = _width(files.config)
    projections = _projections(files.directory, modules, width)
    return Form(
        kind=Kind.DENSE,
        pooling=files.said.pooling or _pooling(files),
        dimensions=projections[-1].outputs if projections else width,
        projections=projections,
    )


def _sparse(files: _Files) -> Form:
    for path in files.described("SpladePooling"):
        for key, value in (("pooling_strategy", "max"), ("activation_function", "relu")):
            if (found := read(path).get(key, value)) != value:
                raise ModelFilesError(f"{path}: {key} {found} is not supported, {value} is")
    return Form(
        kind=Kind.SPARSE, pooling=Pooling.SPLADE, dimensions=int(files.config["vocab_size"])
    )


def _multi(files: _Files) -> Form:
    """Its Dense module is inside the exported graph, as pylate writes it."""
    said, width, markers = files.further, _width(files.config), None
    for path in files.described("Dense"):
        width = int(read(path, required=True)["out_features"])
    if "query_prefix" in said:
        markers = Markers(
            query=said["query_prefix"],
            document=said["document_prefix"],
            expand=int(said["query_length"]) if said.get("do_query_expansion", True) else 0,
            attend=bool(said.get("attend_to_expansion_tokens")),
            skip="".join(word for word in said.get("skiplist_words", ()) if len(word) == 1),
            mask=_mask(files),
            query_tokens=int(said["query_length"]),
            document_tokens=int(said["document_length"]),
        )
    return Form(kind=Kind.MULTI, pooling=Pooling.TOKENS, dimensions=width, markers=markers)


def _mask(files: _Files) -> str:
    """The token that the tokenizer's configuration calls the mask."""
    said = read(files.directory / "tokenizer_config.json").get("mask_token") or "[MASK]"
    return str(said["content"] if isinstance(said, dict) else said)


def _cross(files: _Files) -> Form:
    asked = files.architecture.endswith("ForCausalLM")
    return Form(kind=Kind.CROSS, template=_RERANKER if asked else None)


def _image(files: _Files) -> Form:
    width = files.config.get("projection_dim") or _width(files.config)
    pooling = files.said.pooling or Pooling.NONE
    return Form(kind=Kind.IMAGE, pooling=pooling, dimensions=int(width), takes_images=True)


def _static(files: _Files) -> Form:
    width = _width(files.config)
    return Form(kind=Kind.STATIC, dimensions=width, fastembed=_STATIC, file=WEIGHTS)


_FORMS: Mapping[Kind, Callable[[_Files], Form]] = {
    Kind.DENSE: _dense,
    Kind.SPARSE: _sparse,
    Kind.MULTI: _multi,
    Kind.CROSS: _cross,
    Kind.IMAGE: _image,
    Kind.STATIC: _static,
}


def module_files(directory: Path) -> Names:
    """What describes the modules in `directory`, and then the weights of Dense ones.

    Raises:
        ModelFilesError: modules.json is odd, or a module lies outside the directory.
    """
    with readable(directory):
        modules = read(directory / "modules.json") or []
        described = [one for one in modules if _kind(one) in _DESCRIBED and "path" in one]
        paths = {_path(directory, one): _kind(one) for one in described}
    weights = [f"{path}/{WEIGHTS}" for path, kind in paths.items() if kind == "Dense"]
    return (*(f"{path}/config.json" for path in paths), *weights)


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
    config = read(file, required=True)
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


def _pooling(files: _Files) -> Pooling:
    """What the Pooling module says; where none is described, it is the mean."""
    described = files.described("Pooling")
    path = described[0] if described else files.directory / "1_Pooling" / "config.json"
    said = read(path, required=bool(described))
    if said.get("include_prompt", True) is False:
        raise ModelFilesError(f"{path}: include_prompt false is not supported")
    chosen = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if mode := said.get("pooling_mode"):  # as newer versions write it
        chosen += [f"pooling_mode_{one}" for one in ([mode] if isinstance(mode, str) else mode)]
    names = dict.fromkeys(_NEW_FLAGS.get(flag, flag) for flag in chosen)
    if not said:
        return Pooling.MEAN
    if len(names) != 1 or not names.keys() <= _POOLING_FLAGS.keys():
        known = ", ".join(_POOLING_FLAGS)
        raise ModelFilesError(f"{path}: pooling {list(names)} is not supported, one of {known} is")
    return _POOLING_FLAGS[next(iter(names))]


def _width(config: dict[str, Any]) -> int:
    found = [int(config[key]) for key in _WIDTHS if config.get(key)]
    if not found:
        raise KeyError(_WIDTHS[0])
    return found[0]
