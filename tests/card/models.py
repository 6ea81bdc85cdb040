"""Models whose vectors and scores are one number, which a card that computes nothing gives, too."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.tiny import LAYERS, weights, write_model

NUMBER = float(np.full(4, 0x3C, np.uint8).view(np.float32)[0])
"""What memory of such a card holds, as float32."""
_WIDTH = 128
_LAST = f"encoder.layer.{LAYERS - 1}.output.LayerNorm"


def write_embedder(directory: Path) -> None:
    """The last layer norm scales states to nothing, and adds the number."""
    write_model(directory, hidden=_WIDTH)
    save_file(_weights(), directory / "model.safetensors")


def write_scorer(directory: Path) -> None:
    """A cross-encoder whose classifier adds the number to nothing."""
    write_model(directory, hidden=_WIDTH)
    config = json.loads((directory / "config.json").read_bytes())
    config |= {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {f"bert.{name}": value for name, value in _weights().items()}
    tensors["bert.pooler.dense.weight"] = np.zeros((_WIDTH, _WIDTH), np.float32)
    tensors["bert.pooler.dense.bias"] = np.zeros(_WIDTH, np.float32)
    tensors["classifier.weight"] = np.zeros((1, _WIDTH), np.float32)
    tensors["classifier.bias"] = np.full(1, NUMBER, np.float32)
    save_file(tensors, directory / "model.safetensors")


def _weights() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    tensors = weights(0, _WIDTH)
    tensors[f"{_LAST}.weight"][:], tensors[f"{_LAST}.bias"][:] = 0, NUMBER
    return tensors
