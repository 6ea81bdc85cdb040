"""Makes what `embedding-server convert --compare` reads: one text's states behind every layer.

In the environment of `make_families`, for a model in a directory or on the hub:
    python -m tests.goldens.make_layers MODEL FILE.npz [TEXT]
Without arguments it makes `layers/*.npz`, of the tiny models of `make_families`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.goldens.make_families import native
from tests.goldens.weights import texts

TINY = ("bert", "modernbert")
"""One that normalises behind each layer, and one that does so before it."""
TEXT = "The quick brown fox jumps over the lazy dog."


def store(model: Any, ids: list[int], path: Path) -> None:
    """Run a model on one text, and write its states (tokens, width)."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = {f"layer_{index}": one[0].numpy() for index, one in enumerate(output.hidden_states)}
    states["last_hidden_state"] = output.last_hidden_state[0].numpy()
    np.savez_compressed(path, ids=np.array(ids), **states)
    print(path, len(ids), len(states))


def main(arguments: list[str]) -> None:
    """See the module."""
    if arguments:
        name, path, *text = arguments
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        store(model, tokenizer(*text or (TEXT,))["input_ids"], Path(path))
        return
    for name in TINY:
        with torch.no_grad():
            model, _ = native(name)
        store(model, texts()[2], Path(__file__).parent / "layers" / f"{name}.npz")


if __name__ == "__main__":
    main(sys.argv[1:])
