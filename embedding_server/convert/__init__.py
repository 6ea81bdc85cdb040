"""safetensors -> ONNX without torch: `convert` builds a graph, `Int8` asks for an 8-bit one."""

from embedding_server.convert.blocks import ConvertError
from embedding_server.convert.build import WEIGHTS, convert
from embedding_server.convert.quantize import Int8

__all__ = ["WEIGHTS", "ConvertError", "Int8", "convert"]
