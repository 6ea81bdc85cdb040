"""Graphs for CUDA: what transformers gives, by operators that have CUDA kernels, well fed.

They run on the CPU with CUDA's own operators replaced by plain ones (`lowering.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from embedding_server.catalog.local import read_directory
from embedding_server.convert import ConvertError, convert, convert_layers
from embedding_server.convert.quantize import Int8
from embedding_server.core import SEGMENT, Ids, Kind, Pooling, Precision, normalized
from embedding_server.runtime.layout import LayoutError, Packed, Value
from embedding_server.runtime.packed import INPUTS, feeds
from embedding_server.runtime.session import outputs
from tests.convert.lowering import lowered
from tests.convert.test_families import FAMILIES, GOLDENS, PADDED, Golden, alone_of, inputs, run
from tests.tiny import write_model

DECODERS = [file for file in GOLDENS if file.stem.startswith("qwen")]
ENCODERS = [file for file in GOLDENS if file not in DECODERS]
HALVES = [(file, Precision.FP16) for file in GOLDENS] + [
    (file, Precision.BF16) for file in DECODERS
]

KERNELS = {
    "": "Abs Add Cast CastLike Concat ConstantOfShape Div Flatten Gather Gemm Greater Identity"
    " LayerNormalization Log MatMul Mul Pow ReduceMean Relu Reshape ScatterND Shape Split Sqrt"
    " Squeeze Sub Tanh Transpose Unsqueeze Where",
    "com.microsoft": "BiasGelu FastGelu Gelu GroupQueryAttention PackedMultiHeadAttention"
    " QuickGelu RotaryEmbedding SkipLayerNormalization",
}
"""Domain -> operators that onnxruntime-gpu 1.31.1 ran with its CUDA provider for all goldens, in
fp32 and fp16, those of decoders in bf16 too, with no copy between host and device inside the graph;
`Concat` of two sizes is the one that it chose the CPU for. It ran on a stand-in for CUDA's
libraries that computes nothing, which shows which kernels take what, and no numbers."""
ON_HOST = {"Shape": None, "Concat": "Shape", "ConstantOfShape": "Concat"}
"""What deals with sizes and not with numbers, and what its inputs come from."""


def lengths_of(golden: Golden, items: Sequence[Ids]) -> int:
    """How many rows a run gives."""
    return sum(map(len, items)) if golden.kind is Kind.DENSE else len(items)


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_values(file: Path, tmp_path: Path) -> None:
    """In fp32: all together, alone, the shortest, the longest, and equally long ones."""
    golden, graph = graph_of(file, tmp_path)
    items = inputs(golden.kind)
    assert golden.close(run(golden, graph, items), golden.values)
    for index, item in enumerate(items):
        assert golden.close(run(golden, graph, [item]), alone_of(golden, index))
    same = run(golden, graph, [items[3]] * 3)
    assert lengths_of(golden, [items[3]] * 3) == len(same)
    for part in np.split(same, 3):
        assert golden.close(part, alone_of(golden, 3))
    mixed = run(golden, graph, [items[4], items[0], items[5]])
    expected = np.concatenate([alone_of(golden, index) for index in (4, 0, 5)])
    assert golden.close(mixed, expected)


@pytest.mark.parametrize(
    ("file", "precision"), HALVES, ids=lambda one: one.stem if isinstance(one, Path) else one
)
def test_halves(file: Path, precision: Precision, tmp_path: Path) -> None:
    """Half precision gives nearly the same, as float32."""
    golden, graph = graph_of(file, tmp_path, precision)
    items, expected = inputs(golden.kind), golden.values
    found = run(golden, graph, items)
    assert found.dtype == np.float32
    if expected.shape[1] > 3:
        assert np.vecdot(normalized(found), normalized(expected)).min() >= 0.999
    else:
        off = 0.02 if precision is Precision.FP16 else 0.1
        assert np.abs(found - expected).max() <= off * max(1.0, np.abs(expected).max())
    assert np.isfinite(found).all()


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.LAST])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_pooling(pooling: Pooling, precision: Precision, tmp_path: Path) -> None:
    """Every pooling is what the graph for a CPU gives; means of fp16 states are exact to fp32."""
    file = FAMILIES / "bert.npz"
    golden, graph = graph_of(file, tmp_path, precision, pooling)
    items = inputs(golden.kind)
    found = run(golden, graph, items, pooled=True)
    reference = Golden(file)
    expected = run(
        reference, reference.convert(tmp_path / "cpu", pooling=pooling), items, pooled=True
    )
    assert np.abs(found - expected).max() <= (1e-5 if precision is Precision.FP32 else 1e-2)
    states = np.split(run(golden, graph, items), np.cumsum([len(item) for item in items])[:-1])
    pooled = {
        Pooling.MEAN: [one.mean(axis=0) for one in states],
        Pooling.CLS: [one[0] for one in states],
        Pooling.LAST: [one[-1] for one in states],
    }
    assert np.abs(found - np.stack(pooled[pooling])).max() <= 1e-6


@pytest.mark.parametrize("name", sorted({key.partition("/")[0] for key in PADDED}))
def test_padding(name: str, tmp_path: Path) -> None:
    """A row per text is what transformers gives."""
    pooling = Pooling.LAST if name.startswith("qwen") else Pooling.MEAN
    golden, graph = graph_of(FAMILIES / f"{name}.npz", tmp_path, pooling=pooling)
    found = run(golden, graph, inputs(golden.kind), pooled=True)
    for side in [key for key in PADDED if key.startswith(f"{name}/")]:
        assert np.abs(found - PADDED[side]).max() <= 1e-5


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_operators(file: Path, tmp_path: Path) -> None:
    """Every operator has a CUDA kernel, none is a loop or a choice, sizes alone are the host's."""
    precisions = [Precision.FP32, Precision.FP16]
    for precision in [*precisions, Precision.BF16] if file in DECODERS else precisions:
        golden = Golden(file)
        model = onnx.load(golden.convert(tmp_path / precision, precision, target="cuda"))
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            assert node.op_type in KERNELS[node.domain].split(), node.op_type
            assert not any(one.type == onnx.AttributeProto.GRAPH for one in node.attribute)
            maker = ON_HOST.get(node.op_type)
            assert not maker or {makers[name] for name in node.input} == {maker}
        floats = {
            one.data_type
            for one in model.graph.initializer
            if one.data_type not in (TensorProto.INT64, TensorProto.INT32)
        }
        half = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
        assert half.get(precision, TensorProto.FLOAT) in floats
        wide = [
            one.name
            for one in model.graph.initializer
            if one.data_type == TensorProto.FLOAT and one.dims
        ]
        assert precision is Precision.FP32 or not wide


def test_inputs() -> None:
    """They are laid out as the operators' descriptions say (`bert_padding.cu` has this example)."""
    texts = [np.arange(1), np.arange(2) + SEGMENT, np.arange(4)]
    found = feeds(texts, INPUTS)
    offsets = found["token_offset"]
    assert offsets.dtype == np.int32
    assert offsets.shape == (3, 16)  # because of `steps`
    assert feeds(texts, ["token_offset"])["token_offset"].tolist() == [
        [0, 4, 5, 8],
        [9, 10, 11, 1],
        [2, 3, 6, 7],
    ]
    assert sorted(offsets.ravel()) == list(range(48))
    cumulative = found["cumulative_sequence_length"]
    assert cumulative.dtype == found["seqlens_k"].dtype == np.int32
    assert cumulative.tolist() == [0, 1, 3, 7]
    assert found["positions"].tolist() == [0, 0, 1, 0, 1, 2, 3]
    assert found["texts_of_tokens"].tolist() == [[0], [1], [1], [2], [2], [2], [2]]
    assert found["firsts"].tolist() == [0, 1, 3]
    assert found["lasts"].tolist() == [0, 2, 6]
    assert found["token_type_ids"].tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert found["input_ids"].tolist() == [0, 0, 1, 0, 1, 2, 3]
    assert found["steps"].tolist() == [0, 1, 2, *[3] * 13]
    assert found["seqlens_k"].tolist() == [0, 1, 3]
    narrow = feeds(texts, ["slots", "rows", "total_sequence_length"])
    assert narrow["slots"].tolist() == [[0, 0, 0, 0], [1, 2, 2, 2], [3, 4, 5, 6]]
    assert narrow["rows"].tolist() == [0, 4, 5, 8, 9, 10, 11]
    assert narrow["total_sequence_length"].tolist() == [4]
    assert narrow["slots"].ravel()[narrow["rows"]].tolist() == list(range(7))


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_declarations(file: Path, tmp_path: Path) -> None:
    """What a graph declares is what it is fed, in type and in axes; what it does not know is named.

    Sizes of the same name are equal.
    """
    golden = Golden(file)
    graph = onnx.load(golden.convert(tmp_path, target="cuda"), load_external_data=False).graph
    given = feeds(inputs(golden.kind), [one.name for one in graph.input])
    sizes: dict[str, int] = {}
    for one in graph.input:
        value, tensor = given[one.name], one.type.tensor_type
        assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == value.dtype
        assert len(tensor.shape.dim) == value.ndim
        for axis, size in zip(tensor.shape.dim, value.shape, strict=True):
            assert sizes.setdefault(axis.dim_param or str(axis.dim_value), size) == size
    assert sizes["tokens"] == sum(map(len, inputs(golden.kind)))
    with pytest.raises(LayoutError, match="attention_mask"):
        Packed([Value("attention_mask", "tensor(int64)", ["a", "b"])])


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_stored_weights_are_used_where_they_lie(precision: Precision, tmp_path: Path) -> None:
    """A checkpoint that has the graph's precision is not written a second time."""
    dtypes = {Precision.FP16: "float16", Precision.BF16: "bfloat16"}
    golden = Golden(FAMILIES / "qwen3.npz")
    golden.shapes["embed_tokens.weight"] = [4096, 32]
    golden.config["vocab_size"] = 4096
    golden.write(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({k: v.astype(dtypes[precision]) for k, v in load_file(file).items()}, file)
    spec = read_directory(tmp_path / "model", "m")
    graph = convert(spec, tmp_path / "cache", rounded=precision, target="cuda")
    (table,) = [
        one
        for one in onnx.load(graph, load_external_data=False).graph.initializer
        if one.name == "embed_tokens.weight"
    ]
    assert {one.key: one.value for one in table.external_data}["location"] == "weights-0"
    assert (graph.parent / "weights-0").samefile(file)
    assert graph.with_name("model.onnx_data").stat().st_size < 300_000


def test_cache(tmp_path: Path) -> None:
    """Graphs for CUDA lie apart from those for a CPU, which keep their place."""
    spec = read_directory(write_model(tmp_path / "m"), "m")
    cpu, cuda = (convert(spec, tmp_path, target=target) for target in ("cpu", "cuda"))
    half = convert(spec, tmp_path, rounded=Precision.FP16, target="cuda")
    assert len({cpu.parent, cuda.parent, half.parent}) == 3
    assert convert(spec, tmp_path) == cpu


def test_fusing(tmp_path: Path) -> None:
    """Sums go into norms, biases into norms and activations, where nothing else needs them."""
    plain = ["bert", "modernbert-labels", "nomic-words", "electra"]
    for name in plain:
        graph = Golden(FAMILIES / f"{name}.npz").convert(tmp_path / name, target="cuda")
        nodes = onnx.load(graph, load_external_data=False).graph.node
        makers = {value: node for node in nodes for value in node.output}
        for node in nodes:
            if node.op_type == "LayerNormalization":
                source = makers[node.input[0]]
                assert source.op_type != "Add" or source.input[1] not in makers
            if node.op_type == "PackedMultiHeadAttention":
                source = makers[node.input[1]]
                assert source.op_type != "Gemm" or len(source.input) == 2
            if node.op_type == "Gelu":
                source = makers[node.input[0]]
                assert source.op_type != "Gemm" or len(source.input) == 2
    kinds = [node.op_type for node in nodes]
    assert kinds.count("SkipLayerNormalization") == 5
    assert kinds.count("BiasGelu") == 2
    assert "Add" not in kinds[kinds.index("PackedMultiHeadAttention") :]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_layers(precision: Precision, tmp_path: Path) -> None:
    """States behind every layer are outputs, those that a norm would have swallowed, too."""
    golden = Golden(FAMILIES / "modernbert.npz")
    golden.write(tmp_path / "m")
    spec = read_directory(tmp_path / "m", "m")
    found = {}
    for target in ("cpu", "cuda"):
        (tmp_path / target).mkdir()
        graph = convert_layers(spec, tmp_path / target, rounded=precision, target=target)
        graph = lowered(graph, tmp_path / target / "lowered.onnx") if target == "cuda" else graph
        found[target] = outputs(graph, inputs(golden.kind)[2])
    assert found["cuda"].keys() == found["cpu"].keys() > {"layer_0", "layer_4"}
    for name, states in found["cuda"].items():
        assert states.dtype == np.float32
        off = np.abs(states - found["cpu"][name]).max()
        assert off <= (1e-5 if precision is Precision.FP32 else 2e-2) * np.abs(states).max()


def test_what_is_refused(tmp_path: Path) -> None:
    """8 bits, and encoders in bf16, for which there is no attention."""
    spec = read_directory(write_model(tmp_path / "m"), "m")
    with pytest.raises(ConvertError, match="choose fp16"):
        convert(spec, tmp_path, rounded=Precision.BF16, target="cuda")
    int8 = Int8(lambda *_: {}, "k", 127, 0.0)
    with pytest.raises(ConvertError, match="8-bit graphs are for a CPU"):
        convert(spec, tmp_path, int8=int8, target="cuda")


def graph_of(
    file: Path,
    directory: Path,
    precision: Precision = Precision.FP32,
    pooling: Pooling = Pooling.MEAN,
) -> tuple[Golden, Path]:
    """A golden and its graph for CUDA, lowered."""
    golden = Golden(file)
    graph = golden.convert(directory / "cuda", precision, pooling, target="cuda")
    return golden, lowered(graph, directory / "lowered.onnx")
