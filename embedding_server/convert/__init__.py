"""safetensors -> ONNX without torch: `convert` is the only name other packages need."""

from embedding_server.convert.build import ConvertError, convert

__all__ = ["ConvertError", "convert"]
