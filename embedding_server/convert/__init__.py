"""safetensors -> ONNX without torch: `convert` builds a graph, `Int8` asks for an 8-bit one.

`convert_projections` builds that of what follows the pooling, `halved` one in fp16 of an exported
one.
"""

from embedding_server.convert.build import convert, convert_layers, convertible, model_type
from embedding_server.convert.checkpoint import INDEX, WEIGHTS, stored_precision, weight_files
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.families import family_of
from embedding_server.convert.files import intact
from embedding_server.convert.graph import Target
from embedding_server.convert.halves import halved
from embedding_server.convert.hashes import content_hash
from embedding_server.convert.origin import GraphOrigin, origins
from embedding_server.convert.progress import Progress
from embedding_server.convert.projection import (
    ACTIVATIONS,
    convert_projections,
    require_weights,
)
from embedding_server.convert.quantize import Int8

__all__ = [
    "ACTIVATIONS",
    "INDEX",
    "WEIGHTS",
    "ConvertError",
    "GraphOrigin",
    "Int8",
    "Progress",
    "Target",
    "content_hash",
    "convert",
    "convert_layers",
    "convert_projections",
    "convertible",
    "family_of",
    "halved",
    "intact",
    "model_type",
    "origins",
    "require_weights",
    "stored_precision",
    "weight_files",
]
