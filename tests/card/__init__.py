"""The server on a GPU: on a real one, and on one that computes nothing (`card.c`).

The second shows, anywhere, what the CUDA provider of ONNX Runtime, its arenas and its errors do to
us: memory that is counted and runs out, cards that break. What kernels compute it cannot show.
"""
