"""One module per model family; `FAMILIES` maps `architectures[0]` of config.json to a row."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import msgspec

from embedding_server.convert.blocks import Encoder, Head
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.families import (
    bert,
    distilbert,
    electra,
    gte,
    jina_bert,
    modernbert,
    mpnet,
    nomic_bert,
    qwen3,
    roberta,
)


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How an architecture is built.

    `prefix` is what the encoder's tensors are called under where there is a task's head,
    `classifier` scores pairs or texts, `words` gives logits of the vocabulary. `segments`: it tells
    the texts of a pair apart by more than what is between them.
    """

    encoder: Encoder
    prefix: str = ""
    classifier: Head | None = None
    words: Head | None = None
    segments: bool = False


def _family(module: ModuleType, prefix: str, *, segments: bool = False) -> Family:
    """That of a module with an encoder and both heads."""
    return Family(
        encoder=module.encoder,
        prefix=prefix,
        classifier=module.classifier,
        words=module.words,
        segments=segments,
    )


_BERT = _family(bert, "bert.", segments=True)
_NOMIC = msgspec.structs.replace(
    _BERT, encoder=nomic_bert.encoder, prefix="nomic_bert.", words=nomic_bert.words
)
_GTE = msgspec.structs.replace(_BERT, encoder=gte.encoder, prefix="gte.", words=gte.words)
_ROBERTA = _family(roberta, "roberta.")
_QWEN = Family(encoder=qwen3.encoder, prefix="model.", classifier=qwen3.classifier)
_ASKED = Family(encoder=qwen3.encoder, prefix="model.", classifier=qwen3.judge)

_ENCODERS = {
    "Bert": _BERT,
    "Roberta": _ROBERTA,
    "XLMRoberta": _ROBERTA,
    "Camembert": _ROBERTA,
    "MPNet": msgspec.structs.replace(_ROBERTA, encoder=mpnet.encoder, prefix="mpnet."),
    "DistilBert": _family(distilbert, "distilbert."),
    "Electra": _family(electra, "electra.", segments=True),
    "ModernBert": _family(modernbert, "model."),
    "NomicBert": _NOMIC,
    "Gte": _GTE,
    "New": msgspec.structs.replace(_GTE, prefix="new."),
    "JinaBert": msgspec.structs.replace(_BERT, encoder=jina_bert.encoder),
}
_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification")

FAMILIES: dict[str, Family] = {
    f"{name}{head}": family for name, family in _ENCODERS.items() for head in _HEADS
} | {
    "Qwen2Model": _QWEN,
    "Qwen2ForCausalLM": _ASKED,
    "Qwen2ForSequenceClassification": _QWEN,
    "Qwen3Model": _QWEN,
    "Qwen3ForCausalLM": _ASKED,
    "Qwen3ForSequenceClassification": _QWEN,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of the architecture in a config.json; raises `ConvertError` where there is none."""
    architectures = config.get("architectures")
    architecture = (
        str(architectures[0]) if isinstance(architectures, list) and architectures else "none"
    )
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConvertError(f"config.json is of the architecture {architecture}, not one of {known}")
    return FAMILIES[architecture]
