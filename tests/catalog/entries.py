"""Files of `INFERENCE_MODEL_CONFIG` for tests, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from embedding_server.catalog import Catalog, open_catalog
from embedding_server.errors import SettingsError
from embedding_server.settings import Settings

E5, PASSAGE = "intfloat/multilingual-e5-small", {"query": "query: ", "document": "passage: "}
BGE, GRAPH = "Xenova/bge-small-en-v1.5", "onnx/model.onnx"


def write(config: Path, *lines: str) -> Path:
    """The file with these models, from its second line on."""
    config.write_text("\n".join(["models:", *(f"  {line}" for line in lines)]))
    return config


def catalog(config: Path, *lines: str, **changes: Any) -> Catalog:
    """What these models and nothing else make."""
    settings: dict[str, Any] = {
        "allowed_embedding_models": (),
        "model_config": config,
        "hf_home": config.parent / "hf",
        "hf_hub_offline": True,
    }
    write(config, *lines)
    return open_catalog(Settings(**(settings | changes)))


def mistake(config: Path, *lines: str, **changes: Any) -> tuple[int, str]:
    """The line that an error names, and what it says."""
    with pytest.raises(SettingsError) as error:
        catalog(config, *lines, **changes)
    where, text = str(error.value).split(": ", 1)
    assert "\n" not in text
    assert where.startswith(f"INFERENCE_MODEL_CONFIG={str(config)!r}, line ")
    return int(where.rpartition(" ")[2]), text
