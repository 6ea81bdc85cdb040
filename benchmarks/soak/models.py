"""The models of the soak: the demo model, and small ones of every kind with random weights."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_models import NO_HEAD, Shape, write
from benchmarks.peers import padded_graph
from embedding_server.catalog.demo import demo_model

DEMO = "sentence-transformers/all-MiniLM-L6-v2"
CONVERTED, EXPORTED, CROSS, SPARSE, MULTI = "converted", "exported", "cross", "sparse", "multi"
DENSE = (DEMO, CONVERTED, EXPORTED)
MODELS = (*DENSE, CROSS, SPARSE, MULTI)

_WIDTH = 96
_SHAPE = Shape(layers=2, width=_WIDTH, inner=2 * _WIDTH, heads=4)
_SCALE = 0.15
"""Large enough that texts differ by far more than batches do."""
_SPREAD = 30.0
"""Makes scores of random weights differ as those of a trained cross-encoder do."""
_RARE = -4.0 * _SCALE * _WIDTH**0.5
"""A bias that few words' logits exceed: a text has dozens of words, not thousands."""


def write_models(root: Path) -> None:
    """A directory for each of `WRITERS`."""
    for name, writer in WRITERS.items():
        directory = root / name
        directory.mkdir(parents=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(demo_model().directory / file, directory)
        writer(directory)


def _converted(directory: Path) -> None:
    write(_SHAPE, directory, scale=_SCALE)


def _exported(directory: Path) -> None:
    write(_SHAPE, directory, scale=_SCALE)
    padded_graph(directory, directory / "model.onnx")
    (directory / "model.safetensors").unlink()


def _cross(directory: Path) -> None:
    head = _weights({"pooler.dense": (_WIDTH, _WIDTH), "classifier": (1, _WIDTH)})
    head["classifier.weight"] *= _SPREAD
    _write_as("BertForSequenceClassification", directory, head)


def _sparse(directory: Path) -> None:
    transform = "cls.predictions.transform"
    head = _weights({f"{transform}.dense": (_WIDTH, _WIDTH)})
    head[f"{transform}.LayerNorm.weight"] = np.ones(_WIDTH, np.float32)
    head[f"{transform}.LayerNorm.bias"] = np.zeros(_WIDTH, np.float32)
    head["cls.predictions.bias"] = np.full(_SHAPE.vocabulary, _RARE, np.float32)
    _write_as("BertForMaskedLM", directory, head)
    types = ("MLMTransformer", "SpladePooling")
    modules = [{"type": f"x.{one}", "path": f"{at}_{one}" * at} for at, one in enumerate(types)]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_SpladePooling").mkdir()
    (directory / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "max"}')


def _multi(directory: Path) -> None:
    _exported(directory)
    further = {"query_prefix": "[unused0]", "query_length": 32, "do_query_expansion": False}
    further |= {"document_prefix": "[unused1]", "document_length": 128}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(further))


WRITERS: Mapping[str, Callable[[Path], None]] = {
    CONVERTED: _converted,
    EXPORTED: _exported,
    CROSS: _cross,
    SPARSE: _sparse,
    MULTI: _multi,
}
"""Own models, by what writes their files."""


def _write_as(
    architecture: str, directory: Path, head: Mapping[str, NDArray[np.float32]] = NO_HEAD
) -> None:
    shape = msgspec.structs.replace(_SHAPE, architecture=architecture)
    write(shape, directory, scale=_SCALE, head=head)


def _weights(shapes: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[np.float32]]:
    """Linear layers (out, in) and their biases."""
    random = np.random.default_rng(1)
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = random.normal(0, 1 / _WIDTH**0.5, shape).astype("f4")
        found[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return found
