"""safetensors -> ONNX without torch: `convert` is the only name other packages need."""

from embedding_server.convert.blocks import ConvertError
from embedding_server.convert.build import convert

__all__ = ["ConvertError", "convert"]
