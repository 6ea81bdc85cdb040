"""A tiny real model on disk, as sentence-transformers lays it out, with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from benchmarks.peers import padded_graph
from embedding_server.convert.graph import Graph

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 64
MAX_TOKENS = 32
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_WORDS = ["the", "a", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on"]
VOCABULARY = _SPECIAL + _WORDS + [chr(code) for code in range(97, 123)]
VOCABULARY += [*(f"##{chr(code)}" for code in range(97, 123)), "[MASK]", "<mask>"]


def write_model(
    directory: Path, *, pooling: str = "mean_tokens", seed: int = 0, hidden: int = HIDDEN
) -> Path:
    """A BERT of `LAYERS` layers and its tokenizer; returns `directory`."""
    (directory / "1_Pooling").mkdir(parents=True)
    _json(directory / "config.json", _CONFIG | {"hidden_size": hidden})
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
    save_file(weights(seed, hidden), directory / "model.safetensors")
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


def add_dense(
    directory: Path,
    outputs: int,
    *,
    path: str = "2_Dense",
    place: int = 2,
    inputs: int = HIDDEN,
    activation: str = "activation.Tanh",
    bias: bool = True,
) -> tuple[Array, Array]:
    """Put a Dense module at a place of a model's modules; returns weight (out, in) and bias."""
    modules = json.loads((directory / "modules.json").read_bytes())
    modules.insert(place, {"type": "sentence_transformers.models.Dense", "path": path})
    _json(directory / "modules.json", modules)
    (directory / path).mkdir()
    config: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "bias": bias}
    config["activation_function"] = f"torch.nn.modules.{activation}"
    _json(directory / path / "config.json", config)
    random = np.random.default_rng(outputs)
    weight, shift = (
        random.normal(0, 1, shape).astype("f4") for shape in ((outputs, inputs), outputs)
    )
    tensors = {"linear.weight": weight} | ({"linear.bias": shift} if bias else {})
    save_file(tensors, directory / path / "model.safetensors")
    return weight, shift * bias


def export_pooled(directory: Path) -> Array:
    """Replace a model's weights by a graph that pools: sums embeddings (words, width), returned."""
    (directory / "model.safetensors").unlink()
    table = np.random.default_rng(0).normal(0, 1, (len(VOCABULARY), HIDDEN)).astype("f4")
    graph = Graph("pooled")
    ids, mask = (graph.input(name, "n", "t") for name in ("input_ids", "attention_mask"))
    taken = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([2]))
    states = graph.node("Mul", graph.node("Gather", graph.weight("words", table), ids), taken)
    sums = graph.node("ReduceSum", states, graph.constant([1]), keepdims=0)
    graph.output("sentence_embedding", sums, "n", HIDDEN)
    graph.save(directory / "model.onnx")
    return table


def export(directory: Path, file: str = "onnx/model.onnx") -> Path:
    """Replace a model's weights by an exported graph of them."""
    (directory / file).parent.mkdir(exist_ok=True)
    padded_graph(directory, directory / file)
    (directory / "model.safetensors").unlink()
    return directory


def write_cross_encoder(directory: Path) -> Path:
    """An exported graph that scores pairs: sums embeddings of tokens and segments, then weighs."""
    write_model(directory)
    (directory / "model.safetensors").unlink()
    config = _CONFIG | {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    _json(directory / "config.json", config)
    words, kinds, head = cross_encoder_weights()
    graph = Graph("cross-encoder")
    ids, mask, types = (
        graph.input(name, "n", "t") for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    states = graph.node(
        "Add",
        graph.node("Gather", graph.weight("words", words), ids),
        graph.node("Gather", graph.weight("kinds", kinds), types),
    )
    taken = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([2]))
    sums = graph.node(
        "ReduceSum", graph.node("Mul", states, taken), graph.constant([1]), keepdims=0
    )
    graph.output("logits", graph.node("MatMul", sums, graph.weight("head", head)), "n", 1)
    graph.save(directory / "model.onnx")
    return directory


def cross_encoder_weights() -> tuple[Array, Array, Array]:
    """Embeddings of words (vocabulary, width) and segments (2, width), and a head (width, 1)."""
    random = np.random.default_rng(0)
    shapes = ((len(VOCABULARY), HIDDEN), (2, HIDDEN), (HIDDEN, 1))
    words, kinds, head = (random.normal(0, 0.1, shape).astype("f4") for shape in shapes)
    return words, kinds, head


def weights(seed: int, hidden: int = HIDDEN) -> dict[str, Array]:
    """Random weights under BERT's names, by torch's convention (out, in)."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), hidden),
        "embeddings.position_embeddings.weight": (POSITIONS, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        linears = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        linears["attention.output.dense"] = (hidden, hidden)
        linears["intermediate.dense"] = (INNER, hidden)
        linears["output.dense"] = (hidden, INNER)
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
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
