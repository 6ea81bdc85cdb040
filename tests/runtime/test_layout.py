"""How texts become the inputs of exported graphs, and outputs vectors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_server.convert.graph import Graph
from embedding_server.core import Pooling
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.layout import LayoutError, Padded, Value
from embedding_server.runtime.session import OnnxSession
from tests.fakes import ids

IDS = Value("input_ids", "tensor(int64)", ["n", "t"])
MASK = Value("attention_mask", "tensor(int64)", ["n", "t"])
STATES = Value("last_hidden_state", "tensor(float)", ["n", "t", 2])
TEXTS = [ids(3, 5), ids(1, 9)]


def layout(*inputs: Value, outputs: Any = (STATES,), pooling: Pooling = Pooling.MEAN) -> Padded:
    """A padded layout; id 7 fills up."""
    return Padded(inputs or (IDS, MASK), list(outputs), pooling=pooling, pad=7)


def test_rows_are_filled_up_at_their_end() -> None:
    """Ids and mask have a row per text; other inputs follow from them, in the graph's own types."""
    feeds = layout(
        IDS,
        Value("attention_mask", "tensor(int32)", ["n", "t"]),
        Value("token_type_ids", "tensor(int64)", ["n", "t"]),
        Value("position_ids", "tensor(int64)", ["n", "t"]),
        Value("past_key_values.0.key", "tensor(float16)", ["n", 4, "past", 8]),
    ).feeds(TEXTS)
    assert feeds["input_ids"].tolist() == [[5, 6, 7], [9, 7, 7]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert feeds["attention_mask"].dtype == np.int32
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0]] * 2
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2
    past = feeds["past_key_values.0.key"]
    assert past.shape == (2, 4, 0, 8)
    assert past.dtype == np.float16


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (Pooling.MEAN, [[3.0, 4.0], [7.0, 8.0]]),
        (Pooling.CLS, [[1.0, 2.0], [7.0, 8.0]]),
        (Pooling.LAST, [[5.0, 6.0], [7.0, 8.0]]),
    ],
)
def test_pooling_leaves_padding_out(pooling: Pooling, expected: Any) -> None:
    """What stands at padded places does not matter."""
    states = np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [99, 99], [99, 99]]], np.float16)
    rows = np.asarray(layout(pooling=pooling).vectors(states, TEXTS))
    assert rows.dtype == np.float32
    assert rows.tolist() == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_mean_of_any_lengths(lengths: list[int]) -> None:
    """The mean is that of each text's own states."""
    states = np.random.default_rng(0).normal(size=(len(lengths), max(lengths), 3)).astype("f4")
    rows = np.asarray(layout().vectors(states, [ids(length) for length in lengths]))
    expected = [one[:length].mean(0) for one, length in zip(states, lengths, strict=True)]
    assert np.abs(rows - expected).max() < 1e-5


def test_vectors_are_taken_before_states() -> None:
    """An output that is pooled already is used as it is, unless an operator wants a pooling."""
    pooled = Value("sentence_embedding", "tensor(float)", ["n", 2])
    chosen = layout(outputs=(STATES, pooled))
    assert chosen.output == "sentence_embedding"
    rows = np.ones((2, 2), np.float32)
    assert chosen.vectors(rows, TEXTS) is rows
    here = Padded([IDS, MASK], [STATES, pooled], pooling=Pooling.CLS, pad=0, pooled_here=True)
    assert here.output == "last_hidden_state"
    other = Value("anything", "tensor(float)", ["n", "t", 2])
    assert layout(outputs=(other,)).output == "anything"


def test_what_is_not_known_is_named() -> None:
    """An input or a shape that nobody knows is an error that says which."""
    with pytest.raises(LayoutError, match="takes pixel_values, which is not known"):
        layout(IDS, Value("pixel_values", "tensor(float)", ["n", 3, 224, 224]))
    with pytest.raises(LayoutError, match="a state per token, and no pooling is known"):
        layout(pooling=Pooling.NONE)
    with pytest.raises(LayoutError, match="output scores has 1 axes"):
        layout(outputs=(Value("scores", "tensor(float)", ["n"]),))


def test_a_graph_that_cannot_be_used(tmp_path: Path) -> None:
    """The session's error names the file and what is wrong with it."""
    graph = Graph("test")
    states = graph.node("Cast", graph.input("pixels", "n", "t", "c"), to=1)
    graph.output("last_hidden_state", states, "n", "t", "c")
    graph.save(tmp_path / "model.onnx")

    def choose(inputs: Any, outputs: Any) -> Padded:
        return Padded(inputs, outputs, pooling=Pooling.MEAN, pad=0)

    with pytest.raises(SessionError, match="model.onnx: the graph takes pixels"):
        OnnxSession(tmp_path / "model.onnx", 1, layout=choose)
