"""One module per model family; `FAMILIES` maps `architectures[0]` of config.json to a row."""

import msgspec

from embedding_server.convert.blocks import Encoder, Head
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


_BERT = Family(
    encoder=bert.encoder,
    prefix="bert.",
    classifier=bert.classifier,
    words=bert.words,
    segments=True,
)
_MODERN = Family(
    encoder=modernbert.encoder,
    prefix="model.",
    classifier=modernbert.classifier,
    words=modernbert.words,
)
_NOMIC = Family(
    encoder=nomic_bert.encoder,
    prefix="nomic_bert.",
    classifier=bert.classifier,
    words=nomic_bert.words,
    segments=True,
)
_GTE = Family(
    encoder=gte.encoder,
    prefix="gte.",
    classifier=bert.classifier,
    words=gte.words,
    segments=True,
)
_GTE_NEW = msgspec.structs.replace(_GTE, prefix="new.")
_JINA = Family(
    encoder=jina_bert.encoder,
    prefix="bert.",
    classifier=bert.classifier,
    words=bert.words,
    segments=True,
)
_ROBERTA = Family(
    encoder=roberta.encoder,
    prefix="roberta.",
    classifier=roberta.classifier,
    words=roberta.words,
)
_ELECTRA = Family(
    encoder=electra.encoder,
    prefix="electra.",
    classifier=electra.classifier,
    words=electra.words,
    segments=True,
)
_DISTILBERT = Family(
    encoder=distilbert.encoder,
    prefix="distilbert.",
    classifier=distilbert.classifier,
    words=distilbert.words,
)
_MPNET = Family(
    encoder=mpnet.encoder,
    prefix="mpnet.",
    classifier=roberta.classifier,
    words=roberta.words,
)
_QWEN = Family(encoder=qwen3.encoder, prefix="model.", classifier=qwen3.classifier)
_QWEN_ASKED = Family(encoder=qwen3.encoder, prefix="model.", classifier=qwen3.judge)

FAMILIES: dict[str, Family] = {
    "BertModel": _BERT,
    "BertForMaskedLM": _BERT,
    "BertForSequenceClassification": _BERT,
    "ModernBertModel": _MODERN,
    "ModernBertForMaskedLM": _MODERN,
    "ModernBertForSequenceClassification": _MODERN,
    "NomicBertModel": _NOMIC,
    "NomicBertForMaskedLM": _NOMIC,
    "NomicBertForSequenceClassification": _NOMIC,
    "GteModel": _GTE,
    "GteForMaskedLM": _GTE,
    "GteForSequenceClassification": _GTE,
    "NewModel": _GTE_NEW,
    "NewForMaskedLM": _GTE_NEW,
    "NewForSequenceClassification": _GTE_NEW,
    "JinaBertModel": _JINA,
    "JinaBertForMaskedLM": _JINA,
    "JinaBertForSequenceClassification": _JINA,
    "RobertaModel": _ROBERTA,
    "RobertaForMaskedLM": _ROBERTA,
    "RobertaForSequenceClassification": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "XLMRobertaForMaskedLM": _ROBERTA,
    "XLMRobertaForSequenceClassification": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "CamembertForMaskedLM": _ROBERTA,
    "CamembertForSequenceClassification": _ROBERTA,
    "ElectraModel": _ELECTRA,
    "ElectraForMaskedLM": _ELECTRA,
    "ElectraForSequenceClassification": _ELECTRA,
    "DistilBertModel": _DISTILBERT,
    "DistilBertForMaskedLM": _DISTILBERT,
    "DistilBertForSequenceClassification": _DISTILBERT,
    "MPNetModel": _MPNET,
    "MPNetForMaskedLM": _MPNET,
    "MPNetForSequenceClassification": _MPNET,
    "Qwen2Model": _QWEN,
    "Qwen2ForCausalLM": _QWEN_ASKED,
    "Qwen2ForSequenceClassification": _QWEN,
    "Qwen3Model": _QWEN,
    "Qwen3ForCausalLM": _QWEN_ASKED,
    "Qwen3ForSequenceClassification": _QWEN,
}
