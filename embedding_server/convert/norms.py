"""Layer norms that exporters spell out, as the one operator that they are.

Before opset 17 ONNX has no `LayerNormalization`; ONNX Runtime has it in all of them, with sums of
float32 inside.
"""

from collections import Counter

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper


def joined(graph: onnx.GraphProto) -> None:
    """Put them together, in the graph's place."""
    pattern = _Pattern(graph)
    for node in list(graph.node):
        found = pattern.norm(node)
        if found:
            graph.node.insert(list(graph.node).index(node), found)
            graph.node.remove(node)
    pattern.drop_unused()


class _Pattern:
    """(x - mean) / sqrt(mean of its square + epsilon) * scale + bias."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._stored = {one.name: one for one in graph.initializer}

    def norm(self, node: NodeProto) -> NodeProto | None:
        """The norm that ends in this sum; None where there is none."""
        if node.op_type != "Add" or not (parts := self._with_stored(node)):
            return None
        product, bias = self._makers.get(parts[0]), parts[1]
        if product is None or product.op_type != "Mul" or not (parts := self._with_stored(product)):
            return None
        quotient, scale = self._makers.get(parts[0]), parts[1]
        if quotient is None or quotient.op_type != "Div":
            return None
        source = self._centred(quotient.input[0])
        epsilon = self._deviation(quotient.input[1], quotient.input[0])
        if source is None or epsilon is None or len(self._stored[scale].dims) != 1:
            return None
        return helper.make_node(
            "LayerNormalization",
            [source, scale, bias],
            node.output,
            name=f"{node.name or node.output[0]}_norm",
            axis=-1,
            epsilon=epsilon,
        )

    def drop_unused(self) -> None:
        """What no node needs any more."""
        ends = {one.name for one in self._graph.output}
        while True:
            used = Counter(name for node in self._graph.node for name in node.input)
            unused = [
                node
                for node in self._graph.node
                if not any(used[name] or name in ends for name in node.output)
            ]
            if not unused:
                return
            for node in unused:
                self._graph.node.remove(node)

    def _centred(self, value: str) -> str | None:
        """X of x - mean(x)."""
        node = self._makers.get(value)
        if node is None or node.op_type != "Sub":
            return None
        mean = self._makers.get(node.input[1])
        same = mean is not None and self._over_last(mean) and mean.input[0] == node.input[0]
        return str(node.input[0]) if same else None

    def _deviation(self, value: str, centred: str) -> float | None:
        """Epsilon of sqrt(mean(centred ** 2) + epsilon)."""
        root = self._makers.get(value)
        total = self._makers.get(root.input[0]) if root and root.op_type == "Sqrt" else None
        if total is None or total.op_type != "Add" or not (parts := self._with_stored(total)):
            return None
        mean = self._makers.get(parts[0])
        square = self._makers.get(mean.input[0]) if mean and self._over_last(mean) else None
        if square is None or square.input[0] != centred:
            return None
        twice = square.op_type == "Mul" and square.input[1] == centred
        power = square.op_type == "Pow" and self._number(square.input[1]) == 2
        return self._number(parts[1]) if twice or power else None

    def _with_stored(self, node: NodeProto) -> tuple[str, str] | None:
        """Its inputs, if one is stored: that one last."""
        for value, other in (node.input, reversed(node.input)):
            if other in self._stored and value not in self._stored:
                return value, other
        return None

    def _number(self, name: str) -> float | None:
        tensor = self._stored.get(name)
        if tensor is None or np.prod(tensor.dims) != 1:
            return None
        return float(numpy_helper.to_array(tensor).reshape(-1)[0])

    def _over_last(self, node: NodeProto) -> bool:
        """Whether it is a mean over the last axis."""
        if node.op_type != "ReduceMean":
            return False
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        axes = given.get("axes")
        if axes is None and len(node.input) > 1 and node.input[1] in self._stored:
            axes = numpy_helper.to_array(self._stored[node.input[1]]).tolist()
        return list(axes or ()) == [-1] and given.get("keepdims", 1) == 1
