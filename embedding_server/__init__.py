"""An ONNX-first inference server for embeddings and reranking."""

__version__ = "0.1.0"
