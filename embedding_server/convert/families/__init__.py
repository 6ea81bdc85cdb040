"""One module per model family; `FAMILIES` maps `architectures[0]` of config.json to a builder."""

from collections.abc import Callable
from typing import Any

from embedding_server.convert.blocks import Packing, Weights
from embedding_server.convert.families import bert
from embedding_server.convert.graph import Graph
from embedding_server.convert.linear import Linear

Builder = Callable[[Graph, Weights, Linear, dict[str, Any], Packing], str]
"""(graph, weights, linear layers, config, packing) -> token states (tokens, hidden)."""

FAMILIES: dict[str, Builder] = {
    "BertModel": bert.encoder,
    "BertForMaskedLM": bert.encoder,
}
