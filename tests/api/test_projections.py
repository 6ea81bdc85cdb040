"""Dense modules behind the pooling, from files to HTTP answers."""

import json
import shutil
from collections.abc import Callable
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.local import complete, read_directory
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.session import Threads
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.source import Source
from tests.conftest import Client, Serve
from tests.tiny import (
    HIDDEN,
    MAX_TOKENS,
    Array,
    add_dense,
    export,
    export_pooled,
    write_model,
)

TEXTS = ["the of and", "a", "to in is it you that he was for on the of and a to in is", ""]
DENSE, CONFIG = "2_Dense/model.safetensors", "2_Dense/config.json"
ACTIVATIONS: dict[str, Callable[[Array], Any]] = {
    "linear.Identity": lambda x: x,
    "activation.Tanh": np.tanh,
    "activation.ReLU": lambda x: np.maximum(x, 0),
    "activation.GELU": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "activation.Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "activation.SiLU": lambda x: x / (1 + np.exp(-x)),
}


def settings(root: Path, *names: str) -> dict[str, Any]:
    """Those of a server of these models."""
    return {
        "model_path": root,
        "allowed_embedding_models": names,
        "allowed_rerank_models": (),
    }


async def vectors(client: Client, model: str, *, normalize: bool = False) -> Array:
    """What a model makes of the texts."""
    body = {"model": model, "input": TEXTS, "normalize": normalize}
    answer = await client.post("/api/embed", json=body)
    return np.array(answer.json()["embeddings"], "f4")


async def test_activations(serve: Serve, tmp_path: Path) -> None:
    """Vectors are activation(x W^T + b), by the book, for every activation."""
    write_model(tmp_path / "plain")
    layers = {
        name: add_dense(write_model(tmp_path / name), 8, activation=name) for name in ACTIVATIONS
    }
    async with serve(**settings(tmp_path, "plain", *ACTIVATIONS)) as client:
        x = await vectors(client, "plain")
        for name, function in ACTIVATIONS.items():
            weight, bias = layers[name]
            expected = function(x @ weight.T + bias)
            assert expected.shape == (len(TEXTS), 8)
            assert np.abs(await vectors(client, name) - expected).max() < 1e-5
            unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
            assert np.abs(await vectors(client, name, normalize=True) - unit).max() < 1e-5
        rows = (await client.get("/api/embedders")).json()
        assert {row["name"]: row["dimensions"] for row in rows}["linear.Identity"] == 8


@pytest.mark.parametrize("exported", [False, True])
async def test_in_order(serve: Serve, tmp_path: Path, *, exported: bool) -> None:
    """Two of them, the second behind a Normalize, without a bias, wherever the states come from."""
    write_model(tmp_path / "plain")
    model = write_model(tmp_path / "deep")
    first, shift = add_dense(model, 48)
    second, nothing = add_dense(model, 16, path="4_Dense", place=4, inputs=48, bias=False)
    assert not nothing.any()
    if exported:
        export(model)
    async with serve(**settings(tmp_path, "plain", "deep")) as client:
        inner = np.tanh(await vectors(client, "plain") @ first.T + shift)
        unit = inner / np.linalg.norm(inner, axis=1, keepdims=True)
        expected = np.tanh(unit @ second.T)
        found = await vectors(client, "deep")
        assert np.abs(found - expected).max() < 1e-5
        assert np.abs(found - np.tanh(inner @ second.T)).max() > 0.1


async def test_pooled_graph_has_them_inside(serve: Serve, tmp_path: Path) -> None:
    """Behind a graph that pools they are not applied once more."""
    model = write_model(tmp_path / "pooled")
    add_dense(model, HIDDEN)
    table = export_pooled(model)
    encodings = Tokenizer(model / "tokenizer.json", MAX_TOKENS).encode(TEXTS)
    expected = np.stack([table[one.item].sum(0) for one in encodings])
    async with serve(**settings(tmp_path, "pooled")) as client:
        assert np.abs(await vectors(client, "pooled") - expected).max() < 1e-5


def test_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Other weights of a Dense module make another model, of exported graphs too."""
    one = write_model(tmp_path / "one")
    add_dense(one, 8)
    export(one)
    other = Path(shutil.copytree(one, tmp_path / "other"))
    prints = [fingerprint(one, tmp_path), fingerprint(other, tmp_path)]
    assert prints[0] == prints[1]
    tensors = load_file(other / DENSE)
    save_file(tensors | {"linear.bias": tensors["linear.bias"] + 1}, other / DENSE)
    assert fingerprint(other, tmp_path) != prints[0]


def fingerprint(directory: Path, cache: Path) -> str:
    """That of the model in a directory."""
    return Source(read_directory(directory, "m"), RunPlan(cache=cache), 1).fingerprint("cpu")


def test_damaged_graph_is_made_anew(tmp_path: Path) -> None:
    """One that cannot be opened is dropped, and made again at the next load."""
    add_dense(write_model(tmp_path / "m"), 8)
    spec = read_directory(tmp_path / "m", "m")
    plan = RunPlan(cache=tmp_path)
    Source(spec, plan, 1).open(Threads())
    (graph,) = (
        path for path in tmp_path.glob("graphs/*/*.onnx") if b"2_Dense" in path.read_bytes()
    )
    graph.write_bytes(b"damaged")
    with pytest.raises(SessionError):
        Source(spec, plan, 1).open(Threads())
    assert np.shape(Source(spec, plan, 1).open(Threads()).run([np.arange(3)])) == (1, 8)


def _change(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / file).read_bytes())
        (model / file).write_text(json.dumps(content | changes))

    return change


def _pickled(model: Path) -> None:
    (model / DENSE).rename(model / "2_Dense" / "pytorch_model.bin")


def _link(name: str) -> Callable[[Path], None]:
    def link(model: Path) -> None:
        (model / name).rename(model.parent / "elsewhere")
        (model / name).symlink_to(model.parent / "elsewhere")

    return link


def _path(path: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        modules = json.loads((model / "modules.json").read_bytes())
        modules[2]["path"] = path
        (model / "modules.json").write_text(json.dumps(modules))

    return change


def _first(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_bytes())
    (model / "modules.json").write_text(json.dumps([modules[0], modules[2], modules[1]]))


def _nameless(model: Path) -> None:
    save_file({"weight": np.ones((8, HIDDEN), "f4")}, model / DENSE)


def _cut(model: Path) -> None:
    (model / DENSE).write_bytes((model / DENSE).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_pickled, "m has no 2_Dense/model.safetensors; pickled weights are not read"),
        (_link(DENSE), "2_Dense/model.safetensors is a link to .*, outside its directory"),
        (_link(CONFIG), "2_Dense/config.json is a link to .*, outside its directory"),
        (_path("../m/2_Dense"), "modules.json: '../m/2_Dense' is no directory within it"),
        (_path("/2_Dense"), "modules.json: '/2_Dense' is no directory within it"),
        (_path("[0-9]_Dense"), "is no directory within it"),
        (_path("3_Dense"), "3_Dense/config.json is missing"),
        (_first, "modules.json: Dense before Pooling is not served"),
        (_nameless, "2_Dense: model.safetensors has no tensor linear.weight"),
        (_cut, "2_Dense: model.safetensors: "),
        (
            _change(CONFIG, out_features=9),
            r"linear.weight has shape \(8, 32\), its config.json says \(9, 32\)",
        ),
        (_change(CONFIG, in_features=31), "2_Dense/config.json: in_features 31, but 32 go into it"),
        (
            _change(CONFIG, activation_function="torch.nn.modules.activation.Mish"),
            "2_Dense/config.json: torch.nn.modules.activation.Mish is not supported, one of ",
        ),
        (
            _change(CONFIG, module_input_name="token_embeddings"),
            "module_input_name token_embeddings",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    """What is missing, odd, or outside the directory is named in one line."""
    model = write_model(tmp_path / "m")
    add_dense(model, 8)
    assert read_directory(model, "m").dimensions == 8
    damage(model)
    with pytest.raises(ModelFilesError, match=said) as info:
        read_directory(model, "m")
    assert "\n" not in str(info.value)


def test_fetched_weights_are_checked(tmp_path: Path) -> None:
    """What the hub sent is refused like an own model."""
    model = write_model(tmp_path / "m")
    add_dense(model, 8)
    spec = read_directory(model, "m")
    _nameless(model)
    with pytest.raises(ModelFilesError, match="has no tensor linear.weight"):
        complete(spec, model)
