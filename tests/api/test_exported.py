"""Exported ONNX graphs in a directory, from file to HTTP answer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.local import read_directory
from tests.conftest import Serve
from tests.tiny import export, write_model

TEXTS = ["the of and", "a", "to in is it you that he was for on the of and a to in is", ""]


@pytest.mark.parametrize("file", ["model.onnx", "onnx/model.onnx"])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
async def test_same_vectors_as_converted(
    serve: Serve, tmp_path: Path, file: str, pooling: str
) -> None:
    """An exported graph gives what the same weights give, alone and among other texts."""
    converted = write_model(tmp_path / "converted", pooling=pooling)
    export(Path(shutil.copytree(converted, tmp_path / "exported")), file)
    names = ("converted", "exported")
    async with serve(
        model_path=tmp_path, allowed_embedding_models=names, allowed_rerank_models=names
    ) as client:
        answers = [
            (await client.post("/api/embed", json={"model": name, "input": TEXTS})).json()
            for name in names
        ]
        vectors = [np.array(answer["embeddings"]) for answer in answers]
        assert np.abs(vectors[0] - vectors[1]).max() < 1e-5
        alone = await client.post("/api/embed", json={"model": "exported", "text": TEXTS[0]})
        assert np.abs(np.array(alone.json()["embeddings"]) - vectors[1][:1]).max() < 1e-5
        ranked = await client.post(
            "/api/rerank", json={"model": "exported", "query": "the", "documents": TEXTS}
        )
        assert len(ranked.json()["results"]) == len(TEXTS)


async def test_measured_and_padded(serve: Serve, tmp_path: Path) -> None:
    """The schedule knows that such graphs pad; what it measured is found at the next start."""
    export(write_model(tmp_path / "models" / "m"))
    settings: dict[str, Any] = {
        "model_path": tmp_path / "models",
        "allowed_embedding_models": ("m",),
    }
    settings |= {"allowed_rerank_models": (), "cache_dir": tmp_path, "warmup_ms": 100}
    async with serve(**settings) as client:
        assert (await client.post("/api/embed", json={"model": "m", "input": TEXTS})).is_success
    (profile,) = (tmp_path / "profiles").iterdir()
    assert '"padded":true' in profile.read_text()


async def test_int8_needs_weights(serve: Serve, tmp_path: Path) -> None:
    """Eight bits are asked of an exported graph in vain, which the health page says."""
    export(write_model(tmp_path / "m"))
    settings: dict[str, Any] = {
        "model_path": tmp_path,
        "allowed_embedding_models": ("m",),
        "precision": "int8",
    }
    async with serve(**settings, allowed_rerank_models=(), preload=()) as client:
        answer = await client.post("/api/embed", json={"model": "m", "text": "a"})
        assert answer.json()["code"] == "MODEL_LOAD_ERROR"
        status = (await client.get("/health/status")).json()["models"]["m"]
        assert "needs model.safetensors" in status["error"]


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _outside(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.rename(directory.parent / "elsewhere")
    weights.symlink_to(directory.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_pickled, "pickled weights are not read"), (_outside, "outside its directory")],
)
def test_what_is_refused(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    """Pickled weights, and links that leave the directory, are refused by name."""
    directory = write_model(tmp_path / "m")
    damage(directory)
    with pytest.raises(ModelFilesError, match=said):
        read_directory(directory, "m")
