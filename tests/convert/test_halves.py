"""Exported graphs in fp16: near to fp32, exact where sums are large, cached by content."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedding_server.convert import ConvertError, halved, intact
from embedding_server.convert.halves import in_half
from embedding_server.core import normalized
from tests.tiny import HIDDEN, export, export_pooled, write_model

FLOAT = TensorProto.FLOAT


def run(path: Path | bytes, feeds: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    """The graph's first output."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def batch(lengths: list[int]) -> dict[str, NDArray[np.generic]]:
    """Padded texts."""
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    random = np.random.default_rng(0)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = random.integers(4, 40, length), 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def test_exported(tmp_path: Path) -> None:
    """States agree, come as float32, and the weights are half as large; made once."""
    path = export(write_model(tmp_path / "m")) / "onnx" / "model.onnx"
    half = halved(path, tmp_path)
    assert halved(path, tmp_path) == half
    feeds = batch([20, 3, 1])
    found, expected = run(half, feeds), run(path, feeds)
    assert found.dtype == np.float32
    real = feeds["attention_mask"] == 1
    assert np.vecdot(normalized(found[real]), normalized(expected[real])).min() > 0.9999
    sizes = [
        sum(numpy_helper.to_array(one).nbytes for one in onnx.load(file).graph.initializer)
        for file in (path, half)
    ]
    assert sizes[1] < 0.55 * sizes[0]
    onnx.checker.check_model(half)


def test_weights_beside_it(tmp_path: Path) -> None:
    """They may have several links, as the hub's files have."""
    path = export(write_model(tmp_path / "m")) / "onnx" / "model.onnx"
    apart = tmp_path / "apart" / "model.onnx"
    apart.parent.mkdir()
    onnx.save_model(
        onnx.load(path), apart, save_as_external_data=True, location="data", size_threshold=0
    )
    (tmp_path / "link").hardlink_to(apart.parent / "data")
    feeds = batch([20, 3, 1])
    assert np.array_equal(run(halved(apart, tmp_path), feeds), run(halved(path, tmp_path), feeds))
    data = (apart.parent / "data").read_bytes()
    (apart.parent / "data").write_bytes(data[:-8])
    with pytest.raises(ConvertError, match="data ends within"):
        halved(apart, tmp_path / "short")
    (apart.parent / "data").unlink()
    with pytest.raises(ConvertError, match="data"):
        halved(apart, tmp_path / "other")


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname"])
def test_weights_elsewhere(tmp_path: Path, place: str) -> None:
    """A graph cannot have files read that do not lie beside it."""
    path = export(write_model(tmp_path / "m")) / "onnx" / "model.onnx"
    model = onnx.load(path)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], place)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConvertError, match="not beside the graph"):
        halved(path, tmp_path)
    assert not intact(path)


def test_pooled_in_the_graph(tmp_path: Path) -> None:
    """A sum over tokens that fp16 cannot hold is exact."""
    directory = write_model(tmp_path / "m")
    table = export_pooled(directory)
    half = halved(directory / "model.onnx", tmp_path)
    ids = np.full((1, 60_000), int(np.abs(table).max(axis=1).argmax()))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found, expected = run(half, feeds), 60_000 * table[ids[0, 0]]
    assert np.abs(expected).max() > np.finfo(np.float16).max
    assert np.allclose(found[0], expected, rtol=2e-3)


def spelt_out(*, power: bool) -> onnx.ModelProto:
    """A norm as torch exported it before opset 17, and a mean of tokens as sentence-transformers'.

    x is (n, t, width), mask (n, t).
    """
    numbers = {
        "two": 2.0,
        "epsilon": 1e-12,
        "least": 1e-9,
    }
    stored = [
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in numbers.items()
    ]
    random = np.random.default_rng(0)
    stored += [
        numpy_helper.from_array(random.normal(1, 0.1, HIDDEN).astype("f4"), name)
        for name in ("scale", "bias")
    ]
    stored.append(numpy_helper.from_array(np.array([2]), "last"))
    stored.append(numpy_helper.from_array(np.array([1]), "tokens"))
    square = ("Pow", ["d", "two"]) if power else ("Mul", ["d", "d"])
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("ReduceMean", ["x"], "mean", {"axes": [-1]}),
        ("Sub", ["x", "mean"], "d", {}),
        (*square, "p", {}),
        ("ReduceMean", ["p"], "v", {"axes": [-1]}),
        ("Add", ["v", "epsilon"], "a", {}),
        ("Sqrt", ["a"], "s", {}),
        ("Div", ["d", "s"], "n", {}),
        ("Mul", ["n", "scale"], "m", {}),
        ("Add", ["m", "bias"], "states", {}),
        ("Cast", ["mask"], "seen", {"to": FLOAT}),
        ("Unsqueeze", ["seen", "last"], "wide", {}),
        ("Mul", ["states", "wide"], "kept", {}),
        ("ReduceSum", ["kept", "tokens"], "sums", {"keepdims": 0}),
        ("ReduceSum", ["wide", "tokens"], "counts", {"keepdims": 0}),
        ("Clip", ["counts", "least"], "counted", {}),
        ("Div", ["sums", "counted"], "y", {}),
    ]
    nodes = [helper.make_node(op, given, [out], **how) for op, given, out, how in steps]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["n", "t", HIDDEN]),
            helper.make_tensor_value_info("mask", TensorProto.INT64, ["n", "t"]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, ["n", HIDDEN])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


@pytest.mark.parametrize("power", [True, False])
def test_spelt_out_norms(power: bool) -> None:  # noqa: FBT001 - two forms of a square
    """They become one operator, in which squares beyond fp16 are no matter; nor is epsilon."""
    model = spelt_out(power=power)
    random = np.random.default_rng(1)
    x = random.normal(0, 3000, (2, 5, HIDDEN)).astype("f4")
    feeds = {"x": x, "mask": np.array([[1] * 5, [1, 1, 0, 0, 0]])}
    expected = run(model.SerializeToString(), feeds)
    half = in_half(model)
    found = run(half.SerializeToString(), feeds)
    kinds = [node.op_type for node in half.graph.node]
    assert "LayerNormalization" in kinds
    assert not {"Pow", "Sqrt", "ReduceMean"} & set(kinds)
    assert np.abs(found - expected).max() < 5e-3
    # Behind the sums all is exact.
    assert kinds[-1] == "Div"


def test_other_norms_stay_exact() -> None:
    """A norm that is none of ours, by its axis, is computed in fp32 from square to root."""
    model = spelt_out(power=True)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "axes":
                attribute.ints[:] = [1]
    x = np.random.default_rng(1).normal(0, 3000, (2, 5, HIDDEN)).astype("f4")
    feeds = {"x": x, "mask": np.ones((2, 5), np.int64)}
    expected = run(model.SerializeToString(), feeds)
    half = in_half(model)
    assert "LayerNormalization" not in [node.op_type for node in half.graph.node]
    assert np.abs(run(half.SerializeToString(), feeds) - expected).max() < 2e-2


def test_what_stays(tmp_path: Path) -> None:
    """Graphs with branches, or of whole numbers already, and files that are none, are named."""
    branch = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", FLOAT, [1])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(ConvertError, match="branches"):
        in_half(helper.make_model(helper.make_graph([node], "g", [], [])))
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    with pytest.raises(ConvertError, match="DynamicQuantizeLinear"):
        in_half(helper.make_model(helper.make_graph([node], "g", [], [])))
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(ConvertError, match=r"no\.onnx"):
        halved(tmp_path / "no.onnx", tmp_path)
