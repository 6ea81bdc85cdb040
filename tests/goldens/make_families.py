"""Makes `families/*.npz`: what transformers computes for tiny models of every family, in fp32.

Run once in an environment of its own:
    pip install torch==2.13.0 transformers==5.24.0
    python -m tests.goldens.make_families [NAME...]
`tests/convert/test_families.py` builds the same models and compares our graphs with the results.
Jina BERT, which transformers does not have, is `jina.py`.
Weights are drawn from each tensor's name, so that they need not be stored.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.goldens.jina import Jina
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
MODERN = SIZES | {
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "local_attention": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "cls_token_id": None,
    "sep_token_id": None,
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
GTE = BERT | {"type_vocab_size": 1}
JINA = BERT | {
    "vocab_size": VOCABULARY,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
}
ROBERTA = BERT | {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}
MPNET = SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 66, "pad_token_id": 1}
ELECTRA = BERT | {"embedding_size": 16}
DISTILBERT = {
    "dim": 32,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_layers": 2,
    "max_position_embeddings": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "bert-scores": ("BertForSequenceClassification", BERT | {"num_labels": 1}),
    "bert-labels": ("BertForSequenceClassification", BERT | {"num_labels": 3}),
    "bert-words": ("BertForMaskedLM", BERT),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert-scores": ("ModernBertForSequenceClassification", MODERN | {"num_labels": 1}),
    "modernbert-labels": (
        "ModernBertForSequenceClassification",
        MODERN | BIASES | {"num_labels": 3, "classifier_pooling": "mean"},
    ),
    "modernbert-words": ("ModernBertForMaskedLM", MODERN),
    "nomic": ("NomicBertModel", BERT),
    "nomic-scores": ("NomicBertForSequenceClassification", BERT | {"num_labels": 1}),
    "nomic-labels": ("NomicBertForSequenceClassification", BERT | {"num_labels": 3}),
    "nomic-words": ("NomicBertForMaskedLM", BERT),
    "gte": ("GteModel", GTE),
    "gte-scores": ("GteForSequenceClassification", GTE | {"num_labels": 1}),
    "gte-labels": ("GteForSequenceClassification", BERT | {"num_labels": 3}),
    "gte-words": ("GteForMaskedLM", GTE),
    "roberta": ("RobertaModel", ROBERTA),
    "roberta-scores": ("RobertaForSequenceClassification", ROBERTA | {"num_labels": 1}),
    "roberta-labels": ("RobertaForSequenceClassification", ROBERTA | {"num_labels": 3}),
    "roberta-words": ("RobertaForMaskedLM", ROBERTA),
    "xlm-roberta-scores": ("XLMRobertaForSequenceClassification", ROBERTA | {"num_labels": 1}),
    "camembert-words": ("CamembertForMaskedLM", ROBERTA),
    "mpnet": ("MPNetModel", MPNET),
    "mpnet-scores": ("MPNetForSequenceClassification", MPNET | {"num_labels": 1}),
    "mpnet-labels": ("MPNetForSequenceClassification", MPNET | {"num_labels": 3}),
    "mpnet-words": ("MPNetForMaskedLM", MPNET),
    "electra": ("ElectraModel", ELECTRA),
    "electra-scores": ("ElectraForSequenceClassification", ELECTRA | {"num_labels": 1}),
    "electra-labels": ("ElectraForSequenceClassification", ELECTRA | {"num_labels": 3}),
    "electra-words": ("ElectraForMaskedLM", ELECTRA),
    "distilbert": ("DistilBertModel", DISTILBERT),
    "distilbert-scores": ("DistilBertForSequenceClassification", DISTILBERT | {"num_labels": 1}),
    "distilbert-labels": ("DistilBertForSequenceClassification", DISTILBERT | {"num_labels": 3}),
    "distilbert-words": ("DistilBertForMaskedLM", DISTILBERT),
    "qwen3": ("Qwen3Model", QWEN | {"head_dim": 16}),
    "qwen3-scores": ("Qwen3ForSequenceClassification", QWEN | {"head_dim": 16, "num_labels": 1}),
    "qwen3-asked": ("Qwen3ForCausalLM", QWEN | {"head_dim": 16}),
    "qwen2": ("Qwen2Model", QWEN),
}
"""Name -> transformers' class, and what its configuration says beside the vocabulary."""

NOMIC_SETTINGS = {
    "vocab_size": VOCABULARY,
    "type_vocab_size": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_inner": 48,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-12,
    "activation_function": "swiglu",
    "rotary_emb_base": 500,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "prenorm": False,
    "causal": False,
    "qkv_proj_bias": False,
}
NEW_SETTINGS = GTE | {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "rope_theta": 500.0,
    "rope_scaling": {"type": "ntk", "factor": 4.0},
    "pack_qkv": True,
}
NTK = {"rope_parameters": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 4.0 ** (2 / 8)}}
"""transformers has no such type, but angles that are divided: theta * 4, by 4 ** (2 / width)."""

ORIGINALS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "nomic-original": (
        "NomicBertModel",
        "NomicBertModel",
        BERT | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        NOMIC_SETTINGS,
    ),
    "gte-original": ("GteModel", "NewModel", GTE | NTK | {"type_vocab_size": 0}, NEW_SETTINGS),
    "gte-original-scores": (
        "GteForSequenceClassification",
        "NewForSequenceClassification",
        GTE | NTK | {"num_labels": 1},
        NEW_SETTINGS,
    ),
    "gte-original-words": ("GteForMaskedLM", "NewForMaskedLM", GTE | NTK, NEW_SETTINGS),
}
"""Checkpoints as their authors' own code names tensors and settings, which transformers reads:
name -> transformers' class, the original one, and the settings of each."""

JINAS: dict[str, tuple[str, dict[str, Any], str]] = {
    "jina": ("JinaBertModel", JINA, ""),
    "jina-heads": ("JinaBertModel", JINA | {"hidden_size": 48, "num_attention_heads": 6}, ""),
    "jina-reglu": ("JinaBertModel", JINA | {"feed_forward_type": "reglu"}, ""),
    "jina-code": ("JinaBertModel", JINA, ""),
    "jina-scores": ("JinaBertForSequenceClassification", JINA | {"num_labels": 1}, "classifier"),
    "jina-labels": ("JinaBertForSequenceClassification", JINA | {"num_labels": 3}, "classifier"),
    "jina-words": ("JinaBertForMaskedLM", JINA, "words"),
}
"""Name -> architecture, config.json, and the head that `Jina` is to have."""

Run = Callable[[list[int], list[int]], torch.Tensor]


def make(name: str) -> None:
    """Build one model, run it on each text alone, and store what comes out."""
    build = _jina if name in JINAS else _original if name in ORIGINALS else _native
    with torch.no_grad():
        run, config, shapes = build(name)
        outputs = [run(ids, kinds).numpy() for ids, kinds in zip(texts(), pairs(), strict=True)]
    path = Path(__file__).parent / "families" / f"{name}.npz"
    described = json.dumps({"config": config, "shapes": shapes}, default=str)
    np.savez_compressed(path, described=np.array(described), values=np.concatenate(outputs))
    print(name, np.concatenate(outputs).shape, path.stat().st_size)


def _native(name: str) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """A model with tensors as transformers has them."""
    model, shapes = native(name)
    return partial(_run, model), model.config.to_dict(), shapes


def native(name: str) -> tuple[Any, dict[str, Any]]:
    """A model with weights drawn, and their shapes."""
    architecture, settings = MODELS[name]
    model = _model(architecture, settings)
    shapes, tied = {}, set(getattr(model, "all_tied_weights_keys", {}) or {})
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "inv_freq" not in key and key not in tied:
            shapes[key] = tuple(tensor.shape)
            tensor.copy_(torch.from_numpy(weight(key, shapes[key])))
    model.tie_weights()
    return model, shapes


def _original(name: str) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """A model that transformers reads from tensors as they were called first."""
    architecture, published, settings, config = ORIGINALS[name]
    model = _model(architecture, settings)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        file = Path(directory, "model.safetensors")
        shapes = {
            key.replace("gte.", "new."): tuple(tensor.shape)
            for key, tensor in load_file(file).items()
        }
        drawn = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}
        save_file(drawn, file)
        model, report = type(model).from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    return partial(_run, model.eval()), config | {"architectures": [published]}, shapes


def _jina(name: str) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    architecture, config, head = JINAS[name]
    model = Jina(config, head, code=name == "jina-code")
    shapes = model.shapes()
    model.weights = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}

    def run(ids: list[int], kinds: list[int]) -> torch.Tensor:
        pair = head == "classifier"
        output: torch.Tensor = model(
            torch.tensor(ids), torch.tensor(kinds if pair else [0] * len(ids))
        )
        return _word_weights(output[None]) if head == "words" else output

    return run, config | {"architectures": [architecture]}, shapes


def _model(architecture: str, settings: dict[str, Any]) -> Any:
    cls = getattr(transformers, architecture)
    config = cls.config_class(**{"vocab_size": VOCABULARY, "pad_token_id": 0} | settings)
    config.architectures = [architecture]
    return cls._from_config(config, attn_implementation="eager").eval()


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
        return _word_weights(output.logits)
    return output.last_hidden_state[0]


def _word_weights(logits: torch.Tensor) -> torch.Tensor:
    """SPLADE's."""
    return torch.log1p(torch.relu(logits.max(dim=1).values))


if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODELS | ORIGINALS | JINAS:
        make(wanted)
