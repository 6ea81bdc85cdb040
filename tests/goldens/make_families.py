"""Makes `families/*.npz`: what transformers computes for tiny models of every family, in fp32.

Run once in an environment of its own:
    pip install torch==2.13.0 transformers==5.24.0
    python -m tests.goldens.make_families [NAME...]
`tests/convert/test_families.py` builds the same models and compares our graphs with the results.
Weights are drawn from each tensor's name, so that they need not be stored.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.goldens.weights import NO, VOCABULARY, YES, pairs, texts, weight

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
BERT = SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 64, "type_vocab_size": 2}
QWEN = SIZES | {
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "bert-scores": ("BertForSequenceClassification", BERT | {"num_labels": 1}),
    "bert-labels": ("BertForSequenceClassification", BERT | {"num_labels": 3}),
    "bert-words": ("BertForMaskedLM", BERT),
    "qwen3": ("Qwen3Model", QWEN | {"head_dim": 16}),
    "qwen3-scores": ("Qwen3ForSequenceClassification", QWEN | {"head_dim": 16, "num_labels": 1}),
    "qwen3-asked": ("Qwen3ForCausalLM", QWEN | {"head_dim": 16}),
    "qwen2": ("Qwen2Model", QWEN),
}
"""Name -> transformers' class, and what its configuration says beside the vocabulary."""


def make(name: str) -> None:
    """Build one model, run it on each text alone, and store what comes out."""
    architecture, settings = MODELS[name]
    cls = getattr(transformers, architecture)
    config = cls.config_class(vocab_size=VOCABULARY, pad_token_id=0, **settings)
    config.architectures = [architecture]
    model = cls._from_config(config, attn_implementation="eager").eval()
    shapes, tied = {}, set(getattr(model, "all_tied_weights_keys", {}) or {})
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in key and key not in tied:
                shapes[key] = tuple(tensor.shape)
                tensor.copy_(torch.from_numpy(weight(key, shapes[key])))
        model.tie_weights()
        outputs = [
            _run(model, ids, kinds).numpy() for ids, kinds in zip(texts(), pairs(), strict=True)
        ]
    path = Path(__file__).parent / "families" / f"{name}.npz"
    described = json.dumps({"config": config.to_dict(), "shapes": shapes}, default=str)
    np.savez_compressed(path, described=np.array(described), values=np.concatenate(outputs))
    print(name, np.concatenate(outputs).shape, path.stat().st_size)


def _run(model: Any, ids: list[int], kinds: list[int]) -> torch.Tensor:
    """Token states (tokens, hidden), scores (1, labels), or the words' weights (1, vocabulary)."""
    feeds = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    scores = "Classification" in type(model).__name__
    if scores and getattr(model.config, "type_vocab_size", 0) > 1:
        feeds["token_type_ids"] = torch.tensor([kinds])
    output = model(**feeds)
    if scores:
        return output.logits
    if "CausalLM" in type(model).__name__:
        return (output.logits[:, -1, YES] - output.logits[:, -1, NO])[:, None]
    if "MaskedLM" in type(model).__name__:
        return torch.log1p(torch.relu(output.logits.max(dim=1).values))
    return output.last_hidden_state[0]


if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODELS:
        make(wanted)
