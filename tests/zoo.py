"""A tiny real model of every kind that is not a plain embedder, as FastEmbed's catalogue has them.

Each function writes the files of one id into a directory; graphs are ours, weights are random.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from embedding_server.convert.graph import Graph
from tests.tiny import MAX_TOKENS, VOCABULARY, Array, write_cross_encoder, write_model

_SIDE = 224
_WORDS = ("the", "of", "that", "was")


def write_splade(directory: Path) -> None:
    """`prithivida/Splade_PP_en_v1`: a logit per token and word, of either sign."""
    _write_tokenizer(directory)
    graph = Graph("splade")
    ids, mask, _ = _token_inputs(graph)
    states = _embedded(graph, ids, 8)
    mixed = graph.node("Add", states, _mean_state(graph, states, mask))
    logits = graph.node("MatMul", mixed, graph.weight("head", _random(8, len(VOCABULARY))))
    graph.output("logits", logits, "n", "t", len(VOCABULARY))
    graph.save(directory / "model.onnx")


def write_if_splade(directory: Path) -> None:
    """`opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte`: a table for queries."""
    write_splade(directory)
    table = {word: 1.0 + index / 10 for index, word in enumerate(VOCABULARY)}
    (directory / "idf.json").write_text(json.dumps(table))


def write_bm25(directory: Path) -> None:
    """`Qdrant/bm25`: no graph, an empty configuration and stop words of many languages."""
    from fastembed.sparse.bm25 import supported_languages  # noqa: PLC0415

    directory.mkdir()
    (directory / "config.json").write_text("")
    for language in supported_languages:
        (directory / f"{language}.txt").write_text("the\nof\n")


def write_bm42(directory: Path) -> None:
    """`Qdrant/bm42-all-minilm-l6-v2-attentions`: attention as the weight of a word."""
    _write_tokenizer(directory)
    (directory / "stopwords.txt").write_text("the\n")
    graph = Graph("bm42")
    ids, mask, _ = _token_inputs(graph)
    states = _embedded(graph, ids, 8)
    turned = graph.node("Transpose", states, perm=[0, 2, 1])
    seen = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([1]))
    hidden = graph.node("Mul", graph.node("Sub", graph.constant(1.0), seen), graph.constant(-1e9))
    scores = graph.node("Add", graph.node("MatMul", states, turned), hidden)
    shares = graph.node("Softmax", scores, axis=-1)
    graph.output("attention_6", graph.node("Unsqueeze", shares, graph.constant([1])), *"nhtt")
    graph.save(directory / "model.onnx")


def write_minicoil(directory: Path) -> None:
    """`Qdrant/minicoil-v1`: four numbers per known word, by what its tokens' states say."""
    _write_tokenizer(directory)
    (directory / "stopwords.txt").write_text("the\n")
    vocabulary = {"vocab": list(_WORDS), "stem_mapping": {word: word for word in _WORDS}}
    (directory / "minicoil.triplet.model.vocab").write_text(json.dumps(vocabulary))
    np.save(directory / "minicoil.triplet.model.npy", _random(len(_WORDS) + 1, 8, 4))
    graph = Graph("minicoil")
    ids, mask, _ = _token_inputs(graph)
    states = _embedded(graph, ids, 8)
    mixed = graph.node("Add", states, _mean_state(graph, states, mask))
    graph.output("last_hidden_state", mixed, "n", "t", 8)
    (directory / "onnx").mkdir()
    graph.save(directory / "onnx/model.onnx")


def write_static(directory: Path) -> None:
    """`minishlab/potion-base-8M`: a vector per word, no graph."""
    _write_tokenizer(directory)
    save_file({"embeddings": _random(len(VOCABULARY), 256)}, directory / "model.safetensors")


def write_states(
    directory: Path,
    file: str = "onnx/model.onnx",
    *,
    width: int,
    output: str = "last_hidden_state",
) -> None:
    """A state per token, so wide."""
    _write_tokenizer(directory)
    graph = Graph("states")
    ids, mask = (graph.input(name, "n", "t") for name in ("input_ids", "attention_mask"))
    states = _embedded(graph, graph.node("Mod", ids, graph.constant(len(VOCABULARY))), width)
    mixed = graph.node("Add", states, _mean_state(graph, states, mask))
    graph.output(output, mixed, "n", "t", width)
    (directory / file).parent.mkdir(exist_ok=True)
    graph.save(directory / file)


def write_colbert(directory: Path) -> None:
    """`colbert-ir/colbertv2.0` and its like."""
    write_states(directory, "model.onnx", width=128, output="contextual")


def write_jina_colbert(directory: Path) -> None:
    """`jinaai/jina-colbert-v2`."""
    write_states(directory, width=128, output="contextual")
    (directory / "onnx/model.onnx_data").write_bytes(b"\0")


def write_clip_text(directory: Path) -> None:
    """`Qdrant/clip-ViT-B-32-text`: a vector per text, pooled in the graph."""
    _write_tokenizer(directory)
    graph = Graph("clip-text")
    ids, mask = (graph.input(name, "n", "t") for name in ("input_ids", "attention_mask"))
    mean = _mean_state(graph, _embedded(graph, ids, 512), mask)
    graph.output("text_embeds", graph.node("Squeeze", mean, graph.constant([1])), "n", 512)
    graph.save(directory / "model.onnx")


def write_ms_marco(directory: Path) -> None:
    """`Xenova/ms-marco-MiniLM-L-6-v2`: a score of a pair."""
    write_cross_encoder(directory)
    _write_tokenizer(directory)
    (directory / "onnx").mkdir()
    (directory / "model.onnx").rename(directory / "onnx/model.onnx")


def write_jina_v3(directory: Path) -> None:
    """`jinaai/jina-embeddings-v3`: a graph that wants the number of a task."""
    _write_tokenizer(directory)
    graph = Graph("jina-v3")
    ids, mask, _ = _token_inputs(graph)
    task = graph.input("task_id")
    states = _embedded(graph, ids, 1024)
    shift = graph.node("Gather", graph.weight("tasks", _random(5, 1024)), task)
    mixed = graph.node("Add", graph.node("Add", states, shift), _mean_state(graph, states, mask))
    graph.output("text_embeds", mixed, "n", "t", 1024)
    (directory / "onnx").mkdir()
    graph.save(directory / "onnx/model.onnx")
    (directory / "onnx/model.onnx_data").write_bytes(b"\0")


def write_siglip_text(directory: Path) -> None:
    """`google/siglip2-base-patch16-224`: its rows have one length, the last state is the text."""
    _write_tokenizer(directory)
    graph = Graph("siglip")
    ids = graph.input("input_ids", "n", "t")
    states = _embedded(graph, ids, 768)
    graph.output("last_hidden_state", states, "n", "t", 768)
    last = graph.node("Gather", states, graph.constant(MAX_TOKENS - 1), axis=1)
    mean = graph.node("ReduceMean", states, graph.constant([1]), keepdims=0)
    graph.output("pooler_output", graph.node("Add", last, mean), "n", 768)
    (directory / "onnx").mkdir()
    graph.save(directory / "onnx/text_model.onnx")


def write_clip(directory: Path) -> None:
    """`Qdrant/clip-ViT-B-32-vision`: a vector of a square image."""
    _write_preprocessor(directory)
    graph = Graph("clip")
    patches = _patches(graph)
    flat = graph.node("Flatten", patches)
    vectors = graph.node("MatMul", flat, graph.weight("head", _random(3 * 49, 512)))
    graph.output("image_embeds", vectors, "n", 512)
    graph.save(directory / "model.onnx")


def write_nomic_vision(directory: Path) -> None:
    """`nomic-ai/nomic-embed-vision-v1.5`: states of patches, the first one is the image's."""
    _write_preprocessor(directory)
    graph = Graph("nomic")
    rows = graph.node("Reshape", _patches(graph), graph.constant([0, 3, 49]))
    states = graph.node("Transpose", rows, perm=[0, 2, 1])
    states = graph.node("MatMul", states, graph.weight("head", _random(3, 768)))
    mean = graph.node("ReduceMean", states, graph.constant([1]), keepdims=1)
    graph.output("last_hidden_state", graph.node("Add", states, mean), "n", 49, 768)
    (directory / "onnx").mkdir()
    graph.save(directory / "onnx/model.onnx")


def write_resnet(directory: Path) -> None:
    """`Qdrant/resnet50-onnx`: a vector with two axes of length 1 behind it."""
    _write_preprocessor(directory)
    graph = Graph("resnet")
    flat = graph.node("Flatten", _patches(graph))
    vectors = graph.node("MatMul", flat, graph.weight("head", _random(3 * 49, 2048)))
    square = graph.node("Unsqueeze", vectors, graph.constant([2, 3]))
    graph.output("output", square, "n", 2048, 1, 1)
    graph.save(directory / "model.onnx")


def write_colpali(directory: Path) -> None:
    """`Qdrant/colpali-v1.3-fp16`: late interaction of texts and images, in one graph."""
    _write_tokenizer(directory)
    _write_preprocessor(directory, 448)
    graph = Graph("colpali")
    ids, mask = (graph.input(name, "n", "t") for name in ("input_ids", "attention_mask"))
    pixels = _pixels(graph, 448)
    bounded = graph.node("Mod", ids, graph.constant(len(VOCABULARY)))
    states = _embedded(graph, bounded, 128)
    colour = graph.node("ReduceMean", pixels, graph.constant([1, 2, 3]), keepdims=0)
    shift = graph.node("Unsqueeze", colour, graph.constant([1, 2]))
    taken = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([2]))
    mixed = graph.node("Mul", graph.node("Add", states, shift), taken)
    graph.output("embeddings", mixed, "n", "t", 128)
    graph.save(directory / "model.onnx")
    (directory / "model.onnx_data").write_bytes(b"\0")


ZOO: Mapping[str, Callable[[Path], object]] = {
    "snowflake/snowflake-arctic-embed-xs": partial(write_states, width=384),
    "jinaai/jina-embeddings-v2-small-en": partial(write_states, width=512),
    "nomic-ai/nomic-embed-text-v1.5": partial(write_states, width=768),
    "Qwen/Qwen3-Embedding-0.6B-Q": partial(
        write_states, file="onnx/model_quantized.onnx", width=1024
    ),
    "Qdrant/clip-ViT-B-32-text": write_clip_text,
    "Xenova/ms-marco-MiniLM-L-6-v2": write_ms_marco,
    "prithivida/Splade_PP_en_v1": write_splade,
    "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte": write_if_splade,
    "Qdrant/bm25": write_bm25,
    "Qdrant/bm42-all-minilm-l6-v2-attentions": write_bm42,
    "Qdrant/minicoil-v1": write_minicoil,
    "minishlab/potion-base-8M": write_static,
    "colbert-ir/colbertv2.0": write_colbert,
    "lightonai/LateOn": write_colbert,
    "lightonai/mLateOn": write_colbert,
    "jinaai/jina-colbert-v2": write_jina_colbert,
    "jinaai/jina-embeddings-v2-small-en-tokens": partial(write_states, width=512),
    "jinaai/jina-embeddings-v3": write_jina_v3,
    "google/siglip2-base-patch16-224": write_siglip_text,
    "Qdrant/clip-ViT-B-32-vision": write_clip,
    "nomic-ai/nomic-embed-vision-v1.5": write_nomic_vision,
    "Qdrant/resnet50-onnx": write_resnet,
    "Qdrant/colpali-v1.3-fp16": write_colpali,
}
"""Id -> what writes its files."""


def _write_tokenizer(directory: Path) -> None:
    """The tokenizer of `tiny`, with the files that FastEmbed reads beside it."""
    if not directory.exists():
        write_model(directory)
        (directory / "model.safetensors").unlink()
    (directory / "config_sentence_transformers.json").unlink()  # it has prompts
    limits = {"model_max_length": MAX_TOKENS, "pad_token": "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(limits))
    tokens = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokens |= {"unk_token": "[UNK]", "mask_token": "[MASK]", "other_mask_token": "<mask>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens))


def _write_preprocessor(directory: Path, side: int = _SIDE) -> None:
    directory.mkdir(exist_ok=True)
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text("{}")
    steps = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": side,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(steps))


def _token_inputs(graph: Graph) -> tuple[str, str, str]:
    ids, mask, types = (
        graph.input(name, "n", "t") for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    return ids, mask, types


def _pixels(graph: Graph, side: int) -> str:
    shape = ("n", 3, side, side)
    graph._inputs.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape))
    return "pixel_values"


def _patches(graph: Graph) -> str:
    """Mean colours of 7 x 7 patches, shape (n, 3, 7, 7)."""
    return graph.node("AveragePool", _pixels(graph, _SIDE), kernel_shape=[32, 32], strides=[32, 32])


def _embedded(graph: Graph, ids: str, width: int) -> str:
    return graph.node("Gather", graph.weight("words", _random(len(VOCABULARY), width)), ids)


def _mean_state(graph: Graph, states: str, mask: str) -> str:
    """Of the tokens that are seen, shape (n, 1, width): what makes padding matter."""
    taken = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([2]))
    total = graph.node("ReduceSum", graph.node("Mul", states, taken), graph.constant([1]))
    return graph.node("Div", total, graph.node("ReduceSum", taken, graph.constant([1])))


def _random(*shape: int) -> Array:
    return np.random.default_rng(0).normal(0, 1, shape).astype("f4")
