"""Every family's graph gives what transformers gives, in batches of mixed lengths and alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedding_server.convert import packing
from embedding_server.convert.build import convert
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Target
from embedding_server.core import SEGMENT, Ids, Kind, ModelSpec, Pooling, Precision
from embedding_server.runtime.layout import Packed, Value
from tests.goldens.weights import NO, YES, pairs, texts, weight

FAMILIES = Path(__file__).parents[1] / "goldens" / "families"
GOLDENS = sorted(FAMILIES.glob("*.npz"))
PADDED = np.load(FAMILIES.parent / "padded.npz")
KINDS = {"scores": Kind.CROSS, "asked": Kind.CROSS, "labels": Kind.CROSS, "words": Kind.SPARSE}


class Golden:
    """A tiny model, and what transformers makes of `texts`."""

    def __init__(self, file: Path) -> None:
        stored = np.load(file)
        described = json.loads(str(stored["described"]))
        self.config, self.shapes = described["config"], described["shapes"]
        self.values: NDArray[np.float32] = stored["values"]
        self.kind = KINDS.get(file.stem.rpartition("-")[2], Kind.DENSE)

    def write(self, directory: Path) -> None:
        """Its files."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        tensors = {name: weight(name, tuple(shape)) for name, shape in self.shapes.items()}
        save_file(tensors, directory / "model.safetensors")
        vocabulary = {"model": {"vocab": {"yes": YES, "no": NO}}}
        (directory / "tokenizer.json").write_text(json.dumps(vocabulary))

    def convert(
        self,
        directory: Path,
        rounded: Precision = Precision.FP32,
        pooling: Pooling = Pooling.MEAN,
        target: Target = "cpu",
    ) -> Path:
        """Its graph; `pooling` is that of a dense model."""
        self.write(directory / "model")
        spec = ModelSpec(
            id="m",
            kind=self.kind,
            located=directory / "model",
            pooling=Pooling.SPLADE if self.kind is Kind.SPARSE else pooling,
            max_tokens=64,
            dimensions=0,
        )
        return convert(spec, directory / "cache", rounded=rounded, target=target)

    def close(self, values: Any, expected: Any) -> bool:
        """Whether numbers agree, for their size."""
        scale = max(1.0, float(np.abs(expected).max()))
        return bool(np.abs(np.asarray(values) - expected).max() <= 1e-5 * scale)


def inputs(kind: Kind) -> list[Ids]:
    """The texts, for scores as pairs."""
    ids = [np.array(text, np.int64) for text in texts()]
    if kind is not Kind.CROSS:
        return ids
    return [one + SEGMENT * np.array(kinds) for one, kinds in zip(ids, pairs(), strict=True)]


def run(golden: Golden, graph: Path, items: list[Ids], *, pooled: bool = False) -> Any:
    """What one run gives: states of all tokens one after another, or a row per text."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    declared = [Value(one.name, one.type, one.shape) for one in session.get_inputs()]
    feeds = Packed(declared).feeds(items)
    states = golden.kind is Kind.DENSE and not pooled
    output = "token_embeddings" if states else "sentence_embedding"
    return session.run([output], feeds)[0]


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_values(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States, scores and words' weights; together, alone, and with attention in blocks."""
    golden = Golden(file)
    graph, items = golden.convert(tmp_path), inputs(golden.kind)
    together = run(golden, graph, items)
    assert golden.close(together, golden.values)
    alone = np.concatenate([run(golden, graph, [one]) for one in items])
    assert golden.close(alone, golden.values)
    same = run(golden, graph, [items[3]] * 3)
    assert golden.close(same[: len(same) // 3], alone_of(golden, 3))
    monkeypatch.setattr(packing, "_BLOCK", 16)
    monkeypatch.setattr(packing, "_CAUSAL_AT_ONCE", 8)
    monkeypatch.setattr(packing, "_CAUSAL_BLOCK", 5)
    blocks = Golden(file).convert(tmp_path / "blocks")
    assert golden.close(run(golden, blocks, items), golden.values)


@pytest.mark.parametrize("name", sorted({key.partition("/")[0] for key in PADDED}))
def test_padding(name: str, tmp_path: Path) -> None:
    """A row per text is what transformers gives, on whichever side it pads the batch."""
    golden = Golden(FAMILIES / f"{name}.npz")
    pooling = Pooling.LAST if name.startswith("qwen") else Pooling.MEAN
    graph = golden.convert(tmp_path, pooling=pooling)
    found = run(golden, graph, inputs(golden.kind), pooled=True)
    sides = [key for key in PADDED if key.startswith(f"{name}/")]
    assert len(sides) == 1 + (pooling is Pooling.LAST)
    for side in sides:
        assert np.abs(found - PADDED[side]).max() <= 1e-5


def alone_of(golden: Golden, index: int) -> Any:
    """The golden's values of one text."""
    if golden.kind is not Kind.DENSE:
        return golden.values[index : index + 1]
    lengths = [len(text) for text in texts()]
    start = sum(lengths[:index])
    return golden.values[start : start + lengths[index]]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("bert", "is_decoder", True),
        ("electra", "position_embedding_type", "relative_key"),
        ("roberta", "position_embedding_type", "relative_key_query"),
        ("roberta-words", "tie_word_embeddings", False),
        ("mpnet", "relative_attention_num_buckets", 64),
        ("mpnet", "pad_token_id", 0),
    ],
)
def test_not_built(name: str, key: str, value: Any, tmp_path: Path) -> None:
    """What config.json asks for and is not built is refused by its name and value."""
    golden = Golden(FAMILIES / f"{name}.npz")
    golden.config[key] = value
    with pytest.raises(ConvertError, match=f"{key}={value!r}"):
        golden.convert(tmp_path)
