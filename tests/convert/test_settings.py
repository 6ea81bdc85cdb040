"""What config.json of a family may say otherwise, and what no graph is built for."""

from pathlib import Path
from typing import Any

import pytest

from embedding_server.convert import ConvertError
from tests.convert.test_families import GOLDENS, Golden, inputs, run

FILES = {file.stem: file for file in GOLDENS}


def changed(name: str, *without: str, **settings: Any) -> Golden:
    """A golden's model with other settings."""
    golden = Golden(FILES[name])
    golden.config = {
        key: value for key, value in golden.config.items() if key not in without
    } | settings
    return golden


@pytest.mark.parametrize(
    "golden",
    [
        changed(
            "modernbert",
            "layer_types",
            "rope_parameters",
            global_attn_every_n_layers=3,
            global_rope_theta=160_000.0,
            local_rope_theta=10_000.0,
        ),
        changed("modernbert", "layer_types", "rope_parameters"),
        changed("gte", "rope_parameters", rope_theta=160_000.0),
        changed("nomic", "rope_parameters", rotary_emb_base=1000, n_positions=8192),
        changed("nomic-original", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ],
    ids=["modernbert", "modernbert's defaults", "gte", "nomic", "nomic's both"],
)
def test_settings_of_other_versions(golden: Golden, tmp_path: Path) -> None:
    """The same model, described as older or newer code does, gives the same."""
    states = run(golden, golden.convert(tmp_path), inputs(golden.kind))
    assert golden.close(states, golden.values)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("modernbert", {"layer_types": ["chunked_attention"] * 4}, "layer_types=.*chunked"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ("modernbert-scores", {"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ("modernbert-words", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("nomic-original", {"moe_every_n_layers": 2}, "moe_every_n_layers=2"),
        ("nomic-original", {"prenorm": True}, "prenorm=True"),
        ("nomic-original", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor=2.0"),
        ("nomic-original", {"activation_function": "gelu"}, "activation_function='gelu'"),
        ("gte-original", {"logn_attention_scale": True}, "logn_attention_scale=True"),
        ("gte-original", {"position_embedding_type": "absolute"}, "'absolute'"),
        ("gte-original", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            "gte-original",
            {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.5}},
            "mixed_b",
        ),
        ("jina", {"feed_forward_type": "original"}, "feed_forward_type='original'"),
        ("jina", {"position_embedding_type": "absolute"}, "position_embedding_type='absolute'"),
    ],
)
def test_what_is_refused(name: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The setting that no graph is built for is named."""
    with pytest.raises(ConvertError, match=message):
        changed(name, **settings).convert(tmp_path)
