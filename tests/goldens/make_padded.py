"""Makes `padded.npz`: what transformers computes for batches of mixed lengths, padded either side.

In the environment of `make_families`:
    python -m tests.goldens.make_padded
Decoders are padded left and right; encoders, which count positions from the first place, right. As
in model cards, no positions are given: on the left they begin at the padding, and what is rotary
does not mind. Printed is how far apart the sides are.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tests.goldens.make_families import MODELS, native
from tests.goldens.weights import NO, YES, pairs, texts

Side = Literal["left", "right"]
"""As tokenizers call it."""
BOTH: tuple[Side, ...] = ("left", "right")


def padded(rows: list[list[int]], side: Side, filler: int) -> torch.Tensor:
    """The rows at one length."""
    longest = max(map(len, rows))
    fillers = ([filler] * (longest - len(row)) for row in rows)
    joined = zip(fillers, rows, strict=True) if side == "left" else zip(rows, fillers, strict=True)
    return torch.tensor([first + second for first, second in joined])


def run(model: Any, side: Side) -> NDArray[np.float32]:
    """One row per text: the last token's state of decoders, the mean of encoders, or its scores."""
    config, rows = model.config, texts()
    mask = padded([[1] * len(row) for row in rows], side, 0)
    feeds = {"input_ids": padded(rows, side, config.pad_token_id), "attention_mask": mask}
    name = type(model).__name__
    if "Classification" in name and getattr(config, "type_vocab_size", 0) > 1:
        feeds["token_type_ids"] = padded(pairs(), side, 0)
    output = model(**feeds)
    if "Classification" in name:
        return np.asarray(output.logits)
    states = output.logits if "For" in name else output.last_hidden_state
    kept = [row[there.bool()] for row, there in zip(states, mask, strict=True)]
    return np.asarray(torch.stack([_pooled(name, one) for one in kept]))


def _pooled(name: str, states: torch.Tensor) -> torch.Tensor:
    """A text's, of its own tokens' states or logits (tokens, width)."""
    if "CausalLM" in name:
        return (states[-1, YES] - states[-1, NO])[None]
    if "MaskedLM" in name:
        return torch.log1p(torch.relu(states.max(dim=0).values))
    return states[-1] if name.startswith("Qwen") else states.mean(dim=0)


def main() -> None:
    """See the module."""
    found: dict[str, Any] = {}
    for name, (architecture, _) in MODELS.items():
        with torch.no_grad():
            model, _ = native(name)
            sides = BOTH if "Qwen" in architecture else BOTH[1:]
            rows = {side: run(model, side) for side in sides}
        found |= {f"{name}/{side}": one for side, one in rows.items()}
        if len(rows) > 1:
            print(name, "sides are apart by", np.abs(rows["left"] - rows["right"]).max())
    path = Path(__file__).parent / "padded.npz"
    np.savez_compressed(path, **found)
    print(path, len(found), path.stat().st_size)


if __name__ == "__main__":
    main()
