"""CUDA's operators by plain ones, so that graphs for CUDA run on a CPU: for tests only.

They are written from the operators' descriptions (onnxruntime 1.31, `docs/ContribOperators.md`, and
the layout of `token_offset` in `contrib_ops/cuda/bert/bert_padding.cu`), not from our own code.
Floating-point inputs become float32 and outputs what they are in the graph: CUDA's kernels, too,
add up in float32.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from embedding_server.convert.files import loaded

_DOMAIN = "lowered"

_PACKED_ATTENTION = """
PackedMultiHeadAttention <num_heads: int = 1>
  (query, key, value, bias, token_offset, cumulative, attention_bias) => (output)
{
  one = Constant <value = int64 {1}> ()
  two = Constant <value = int64 {2}> ()
  flat = Constant <value = int64[1] {-1}> ()
  zero = Constant <value = int64[1] {0}> ()
  heads = Constant <value_ints: ints = @heads> ()
  batch_and_length = Shape (token_offset)
  width = Shape <start = 1> (query)
  cells = ReduceProd <keepdims = 1> (batch_and_length)
  empty_shape = Concat <axis = 0> (cells, width)
  empty = ConstantOfShape (empty_shape)
  tokens = Shape <end = 1> (query)
  offsets = Cast <to = 7> (token_offset)
  all_offsets = Reshape (offsets, flat)
  kept = Slice (all_offsets, zero, tokens)
  last_axis = Constant <value = int64[1] {1}> ()
  indices = Unsqueeze (kept, last_axis)
  by_head = Concat <axis = 0> (batch_and_length, heads, flat)
  q0 = Cast <to = 1> (query)
  k0 = Cast <to = 1> (key)
  v0 = Cast <to = 1> (value)
  q1 = ScatterND (empty, indices, q0)
  k1 = ScatterND (empty, indices, k0)
  v1 = ScatterND (empty, indices, v0)
  q2 = Reshape (q1, by_head)
  k2 = Reshape (k1, by_head)
  v2 = Reshape (v1, by_head)
  q = Transpose <perm = [0, 2, 1, 3]> (q2)
  k = Transpose <perm = [0, 2, 3, 1]> (k2)
  v = Transpose <perm = [0, 2, 1, 3]> (v2)
  products = MatMul (q, k)
  size = Shape <start = 3> (q)
  size_float = Cast <to = 1> (size)
  root = Sqrt (size_float)
  scaled = Div (products, root)
  added = Cast <to = 1> (attention_bias)
  biased = Add (scaled, added)
  cu = Cast <to = 7> (cumulative)
  begin = Slice (cu, zero, flat)
  start = Constant <value = int64[1] {1}> ()
  far = Constant <value = int64[1] {1000000}> ()
  end = Slice (cu, start, far)
  lengths = Sub (end, begin)
  length_vector = Shape <start = 1> (token_offset)
  length = Squeeze (length_vector)
  zero_scalar = Constant <value = int64 {0}> ()
  steps = Range (zero_scalar, length, one)
  axes = Constant <value = int64[3] {1, 2, 3}> ()
  limits = Unsqueeze (lengths, axes)
  seen = Less (steps, limits)
  never = Constant <value = float {-3.0e38}> ()
  masked = Where (seen, biased, never)
  weights = Softmax <axis = -1> (masked)
  mixed = MatMul (weights, v)
  turned = Transpose <perm = [0, 2, 1, 3]> (mixed)
  rows_shape = Concat <axis = 0> (cells, flat)
  rows = Reshape (turned, rows_shape)
  taken = Gather (rows, kept)
  output = CastLike (taken, query)
}
"""


def lowered(path: Path, out: Path) -> Path:
    """The graph at `path`, for a CPU, as the file `out`."""
    model = loaded(path)
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    halves = _halves(model)
    for node in graph.node:
        if node.op_type == "PackedMultiHeadAttention":
            nodes += _packed_attention(model, node)
        elif node.domain == "com.microsoft" and halves:
            nodes += _in_single(node, halves)
        elif halves == TensorProto.BFLOAT16:
            nodes += _rounded(node)
        else:
            nodes.append(node)
    if halves == TensorProto.BFLOAT16:
        _widen(graph)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save_model(model, out)
    return out


def _halves(model: onnx.ModelProto) -> int:
    types = {one.data_type for one in model.graph.initializer}
    return next(iter(types & {TensorProto.FLOAT16, TensorProto.BFLOAT16}), 0)


def _packed_attention(model: onnx.ModelProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A call of the function that stands for it, and the bias, of zeros where there is none."""
    heads = helper.get_node_attr_value(node, "num_heads")
    name = f"PackedMultiHeadAttention{heads}"
    if name not in {one.name for one in model.functions}:
        text = _PACKED_ATTENTION.replace(
            "heads = Constant <value_ints: ints = @heads> ()",
            f"heads = Constant <value = int64[1] {{{heads}}}> ()",
        ).replace("PackedMultiHeadAttention <num_heads: int = 1>", name)
        function = onnx.parser.parse_function(
            f'<opset_import: ["" : 18], domain: "{_DOMAIN}">{text}'
        )
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    inputs = [*node.input, *[""] * (7 - len(node.input))]
    assert not inputs[3]
    if not inputs[6]:
        inputs[6] = f"{node.name}_no_bias"
        zero = numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), inputs[6])
        model.graph.initializer.append(zero)
    return [helper.make_node(name, inputs, node.output, name=node.name, domain=_DOMAIN)]


def _in_single(node: onnx.NodeProto, half: int) -> list[onnx.NodeProto]:
    """The same operator on float32, as far as its inputs are no integers."""
    integers = _INTEGERS.get(node.op_type, ())
    nodes, inputs = [], []
    for at, name in enumerate(node.input):
        if name and at not in integers:
            inputs.append(f"{node.name}_single_{at}")
            nodes.append(helper.make_node("Cast", [name], [inputs[-1]], to=TensorProto.FLOAT))
        else:
            inputs.append(name)
    outputs = [f"{one}_single" if one else "" for one in node.output]
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    back = [
        helper.make_node("Cast", [wide], [name], to=half)
        for wide, name in zip(outputs, node.output, strict=True)
        if name
    ]
    nodes.append(copy)
    return [*nodes, *back] if half == TensorProto.FLOAT16 else [*nodes, *_both(back)]


_INTEGERS = {"GroupQueryAttention": (5, 6), "RotaryEmbedding": (1,)}
"""Operator -> which of its inputs are integers."""


def _rounded(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A node of bfloat16, which no CPU kernel takes: of float32, and products rounded."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
    if node.op_type not in ("Gemm", "MatMul"):
        return [copy]
    copy.output[0] = f"{node.output[0]}_exact"
    cast = helper.make_node("Cast", copy.output, node.output, to=TensorProto.BFLOAT16)
    return [copy, *_both([cast])]


def _both(casts: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Casts to bfloat16, and back."""
    nodes = []
    for cast in casts:
        (name,) = cast.output
        cast.output[0] = f"{name}_rounded"
        nodes += [cast, helper.make_node("Cast", cast.output, [name], to=TensorProto.FLOAT)]
    return nodes


def _widen(graph: onnx.GraphProto) -> None:
    """Initializers of bfloat16 as float32."""
    for at, one in enumerate(graph.initializer):
        if one.data_type == TensorProto.BFLOAT16:
            wide = numpy_helper.to_array(one).view(ml_dtypes.bfloat16).astype(np.float32)
            graph.initializer[at].CopyFrom(numpy_helper.from_array(wide, one.name))
