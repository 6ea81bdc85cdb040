"""Nodes of graphs for CUDA put together: what a kernel does on the way costs no pass over memory.

A linear layer's bias is a pass of its own there (`Gemm` first fills its output with it), and so is
each sum. Here a bias goes into the activation or the norm that follows, a residual sum into its
norm, and that of keys, which changes nothing, is left out. ONNX Runtime fuses the like by itself
only for states of three axes.

`SkipLayerNormalization` adds up in the type of its inputs unless the provider's option
`enable_skip_layer_norm_strict_mode` is on: sessions for CUDA set it.
"""

from collections import Counter
from collections.abc import Sequence

from onnx import NodeProto, helper

_CONTRIB = "com.microsoft"
_KEY = 1
_BIASED = {"Gelu": "BiasGelu", "FastGelu": "FastGelu"}
"""Activation -> the same with a bias before it."""


def fused(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The same computation in fewer nodes; `nodes` may be changed."""
    graph = _Nodes(nodes)
    for node in nodes:
        if node.op_type == "LayerNormalization":
            _join_sum(graph, node)
        elif node.op_type in _BIASED:
            _join_bias(graph, node)
        elif node.op_type == "PackedMultiHeadAttention":
            # What is added to all keys is added to all scores of a query: its softmax is the same.
            graph.without_bias(node.input[_KEY])
    return [graph.replaced.get(node.name, node) for node in nodes if node.name not in graph.gone]


class _Nodes:
    """Who makes and who uses a value, and what has become of nodes."""

    def __init__(self, nodes: Sequence[NodeProto]) -> None:
        self._makers = {name: node for node in nodes for name in node.output}
        self._uses = Counter(name for node in nodes for name in node.input)
        self.replaced: dict[str, NodeProto] = {}
        self.gone: set[str] = set()

    def maker(self, value: str, op: str) -> NodeProto | None:
        """The node of that kind that makes it."""
        node = self._makers.get(value)
        return node if node is not None and node.op_type == op else None

    def made(self, value: str) -> bool:
        """Whether it is computed, and no weight."""
        return value in self._makers

    def lone(self, value: str) -> bool:
        """Whether only one node uses it."""
        return self._uses[value] == 1

    def without_bias(self, value: str) -> str:
        """Takes the bias from the linear layer that alone makes this value for one other node."""
        gemm = self.maker(value, "Gemm")
        if gemm is None or len(gemm.input) < 3 or not self.lone(value):
            return ""
        bias = gemm.input.pop()
        assert isinstance(bias, str)
        return bias


def _join_sum(graph: _Nodes, norm: NodeProto) -> None:
    """A norm of a sum."""
    add = graph.maker(norm.input[0], "Add")
    if add is None or add.name in graph.replaced or not all(map(graph.made, add.input)):
        return
    (one, other), (total,) = add.input, add.output
    bias = graph.without_bias(one) or graph.without_bias(other)
    outputs = list(norm.output) if graph.lone(total) else [*norm.output, "", "", total]
    beta = norm.input[2] if len(norm.input) > 2 else ""
    inputs = [one, other, norm.input[1], beta, bias]
    while not inputs[-1]:
        inputs.pop()
    graph.gone.add(norm.name)
    # In the sum's place: others that need it may stand before the norm.
    graph.replaced[add.name] = helper.make_node(
        "SkipLayerNormalization",
        inputs,
        outputs,
        name=norm.name,
        domain=_CONTRIB,
        epsilon=helper.get_node_attr_value(norm, "epsilon"),
    )


def _join_bias(graph: _Nodes, activation: NodeProto) -> None:
    """An activation of a linear layer's output."""
    if bias := graph.without_bias(activation.input[0]):
        graph.replaced[activation.name] = helper.make_node(
            _BIASED[activation.op_type],
            [activation.input[0], bias],
            activation.output,
            name=activation.name,
            domain=_CONTRIB,
        )
