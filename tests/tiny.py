"""A tiny real model on disk, as sentence-transformers lays it out, with random weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 64
MAX_TOKENS = 32
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_WORDS = ["the", "a", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on"]
VOCABULARY = _SPECIAL + _WORDS + [chr(code) for code in range(97, 123)]
VOCABULARY += [f"##{chr(code)}" for code in range(97, 123)]


def write_model(directory: Path, *, pooling: str = "mean_tokens", seed: int = 0) -> Path:
    """A BERT of `LAYERS` layers and its tokenizer; returns `directory`."""
    (directory / "1_Pooling").mkdir(parents=True)
    _json(directory / "config.json", _CONFIG)
    _json(
        directory / "modules.json",
        [
            {"type": f"sentence_transformers.models.{kind}"}
            for kind in ("Transformer", "Pooling", "Normalize")
        ],
    )
    _json(directory / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True})
    _json(directory / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS})
    prompts = {"query": "the query: ", "document": ""}
    _json(directory / "config_sentence_transformers.json", {"prompts": prompts})
    save_file(weights(seed), directory / "model.safetensors")
    _tokenizer().save(str(directory / "tokenizer.json"))
    return directory


_CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 2,
    "vocab_size": len(VOCABULARY),
}


def weights(seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Random weights under BERT's names, by torch's convention (out, in)."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        linears = {f"attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
        linears["attention.output.dense"] = (HIDDEN, HIDDEN)
        linears["intermediate.dense"] = (INNER, HIDDEN)
        linears["output.dense"] = (HIDDEN, INNER)
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (HIDDEN,)
    return {
        name: random.normal(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, shape).astype("f4")
        for name, shape in shapes.items()
    }


def _tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # As in files people publish: both must be cleared by whoever loads this.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
