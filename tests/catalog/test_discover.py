"""Names that no list has: the real client of the hub against a hub on loopback."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from embedding_server.catalog import Catalog, Locator, open_catalog, open_hub
from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.files import FilesError, Hub
from embedding_server.catalog.local import complete, read_directory
from embedding_server.catalog.published import published_models
from embedding_server.core import Kind, ModelSpec, Origin, Task
from embedding_server.errors import SettingsError
from embedding_server.settings import Names, Settings
from tests.catalog.test_files import no_sockets
from tests.catalog.test_listing import run
from tests.hub import TOKEN, Fault, LocalHub
from tests.tiny import add_dense, export, write_cross_encoder, write_model

GRAPH, WEIGHTS = "onnx/model.onnx", "model.safetensors"
DENSE = ("2_Dense/config.json", "2_Dense/model.safetensors")
CLOSED = "http://127.0.0.1:9"
"""Nobody listens there."""

Files = dict[str, bytes]
Make = Callable[[Path], Path]


@pytest.fixture
def local() -> Iterator[LocalHub]:
    """A hub that has nothing yet."""
    with LocalHub() as hub:
        yield hub


def files_of(directory: Path) -> Files:
    """Every file of a directory, by name."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def settings(local: LocalHub, home: Path, *names: str, rerank: Names = ()) -> Settings:
    """Those of a server that may serve these names from this hub."""
    return Settings(
        allowed_embedding_models=names or ("Xenova/bge-small-en-v1.5",),
        allowed_rerank_models=rerank,
        hf_endpoint=local.url,
        hf_home=home,
    )


def found(local: LocalHub, home: Path, name: str, task: Task = Task.EMBED) -> ModelSpec:
    """The model that a server takes a name for."""
    embed, rerank = ((name,), ()) if task is Task.EMBED else ((), (name,))
    return open_catalog(settings(local, home, *embed, rerank=rerank)).resolve(name, task)


def refusal(local: LocalHub, home: Path, *names: str) -> str:
    """The line with which a start ends."""
    with pytest.raises(SettingsError) as info:
        open_catalog(settings(local, home, *names))
    assert info.value.exit_code == 2
    assert "\n" not in str(info.value)
    return str(info.value)


def sent(local: LocalHub) -> set[str]:
    """The files that were downloaded."""
    paths = [request.path for request in local.requests if request.method == "GET"]
    return {path.rpartition("/")[2] for path in paths}


def age(home: Path) -> None:
    """Make its cache one of an old program: one level higher, without a list of files."""
    (repository,) = (home / "hub").glob("models--*")
    shutil.rmtree(repository.rename(home / repository.name) / "trees")


def exported(directory: Path) -> Path:
    """A model as an exported graph, its other files and a pickle."""
    export(write_model(directory, pooling="cls_token"))
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    return directory


def both(directory: Path) -> Path:
    """An exported graph beside the weights."""
    weights = (write_model(directory) / WEIGHTS).read_bytes()
    export(directory, "model.onnx")
    (directory / WEIGHTS).write_bytes(weights)
    return directory


def dense(directory: Path) -> Path:
    """Weights with a Dense module behind the pooling."""
    add_dense(write_model(directory), 8)
    return directory


@pytest.mark.parametrize(
    ("make", "kind", "files"),
    [
        (exported, Kind.DENSE, (GRAPH,)),
        (write_model, Kind.DENSE, (WEIGHTS,)),
        (both, Kind.DENSE, ("model.onnx",)),
        (write_cross_encoder, Kind.CROSS, ("model.onnx",)),
        (dense, Kind.DENSE, (WEIGHTS, *DENSE)),
    ],
)
def test_as_an_own_model(
    local: LocalHub, tmp_path: Path, make: Make, kind: Kind, files: Names
) -> None:
    """It is what the same files are as an own model, and the weights are left for later."""
    own = read_directory(make(tmp_path / "own"), "some/body")
    local.publish("some/body", files_of(tmp_path / "own"), lfs=files)
    task = Task.RERANK if kind is Kind.CROSS else Task.EMBED
    spec = found(local, tmp_path / "hf", "some/body", task)
    assert spec == msgspec.structs.replace(
        own, located=None, origin=Origin(repo="some/body", files=files)
    )
    assert spec.kind is kind
    assert "tokenizer.json" in sent(local)
    assert not {"model.onnx", WEIGHTS, "pytorch_model.bin"} & sent(local)
    located = Locator(settings(local, tmp_path / "hf"))(spec)
    assert located == msgspec.structs.replace(spec, located=located.directory)
    for name in files:
        assert (located.directory / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    assert "pytorch_model.bin" not in sent(local)


def test_dense_modules(local: LocalHub, tmp_path: Path) -> None:
    """They are looked for where an old program left them out, and pickles are refused."""
    files = files_of(dense(tmp_path / "own"))
    local.publish("some/body", files)
    home = tmp_path / "hf"
    first = found(local, home, "some/body")
    Locator(settings(local, home))(first)
    age(home)
    shutil.rmtree(next(home.glob("models--*/snapshots/*/2_Dense")))
    assert found(local, home, "some/body") == first
    weights = files.pop(DENSE[1])
    local.publish("some/pickle", files | {"2_Dense/pytorch_model.bin": weights})
    line = refusal(local, home, "some/pickle")
    assert "some/pickle has no 2_Dense/model.safetensors; pickled weights are not read" in line
    modules = files["modules.json"].replace(b"2_Dense", b"../../2_Dense")
    local.publish("some/path", files | {"modules.json": modules})
    assert "'../../2_Dense' is no directory within it" in refusal(local, home, "some/path")


def test_external_data(local: LocalHub, tmp_path: Path) -> None:
    """Whatever has the graph's name as its beginning belongs to it; other graphs do not."""
    files = files_of(exported(tmp_path / "own"))
    data = (f"{GRAPH}.data", f"{GRAPH}_data", f"{GRAPH}_data_1")
    others = ("onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data", "model.onnx_data")
    local.publish("some/body", files | dict.fromkeys((*data, *others), b"x"), lfs=(GRAPH, *data))
    spec = found(local, tmp_path / "hf", "some/body")
    assert spec.origin
    assert spec.origin.files == (GRAPH, *data)


def test_only_what_no_list_has_is_looked_up(local: LocalHub, tmp_path: Path) -> None:
    """Own and published models, and `*`, ask nobody."""
    write_model(tmp_path / "own" / "mine")
    wanted = msgspec.structs.replace(
        settings(local, tmp_path / "hf", "mine", "BAAI/bge-m3", "*"), model_path=tmp_path / "own"
    )
    assert len(open_catalog(wanted).models) > 10
    assert local.requests == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {GRAPH: None},
            "none of model.onnx, .*, model.safetensors, .*; pickled weights",
        ),
        ({"config.json": None}, "some/body has no config.json"),
        ({"tokenizer.json": None}, "some/body has no tokenizer.json"),
        ({"modules.json": b'[{"type": "some.Router"}]'}, "Router is not supported"),
        ({"config.json": b"[]"}, "its JSON files lack"),
        (
            {GRAPH: None, WEIGHTS: b"", "config.json": b"MistralModel"},
            "of the architecture MistralModel, not one of BertModel, ",
        ),
    ],
)
def test_what_cannot_be_served(
    local: LocalHub, tmp_path: Path, change: dict[str, bytes | None], said: str
) -> None:
    """A repository without a usable model ends the start, with what it lacks."""
    files = files_of(exported(tmp_path / "own"))
    if change.get("config.json") == b"MistralModel":
        config = json.loads(files["config.json"]) | {"architectures": ["MistralModel"]}
        change = change | {"config.json": json.dumps(config).encode()}
    kept = {name: content for name, content in (files | change).items() if content is not None}
    local.publish("some/body", kept)
    line = refusal(local, tmp_path / "hf", "some/body")
    assert line.startswith("INFERENCE_ALLOWED_EMBEDDING_MODELS: 'some/body' is not known: ")
    assert re.search(said, line)


def test_what_is_not_there(local: LocalHub, tmp_path: Path) -> None:
    """A repository that does not exist is refused with the names that are nearest."""
    line = refusal(local, tmp_path, "Xenova/bge-smal-en-v1.5")
    assert "is not known: Xenova/bge-smal-en-v1.5 does not exist or is private (HTTP 401)" in line
    assert "; did you mean Xenova/bge-small-en-v1.5 or " in line
    del local.requests[:]
    assert "'bge-small' is not known; did you mean " in refusal(local, tmp_path, "bge-small")
    assert "'a/b/c' is not known" in refusal(local, tmp_path, "a/b/c")
    assert local.requests == []


def test_another_task(local: LocalHub, tmp_path: Path) -> None:
    """A cross-encoder does not embed; a dense model reranks, by cosine."""
    local.publish("some/scorer", files_of(write_cross_encoder(tmp_path / "scorer")))
    local.publish("some/body", files_of(write_model(tmp_path / "body")))
    line = refusal(local, tmp_path / "hf", "some/scorer")
    assert "'some/scorer' is a cross-encoder model, which cannot embed" in line
    assert found(local, tmp_path / "hf", "some/body", Task.RERANK).kind is Kind.DENSE


def test_private_repositories(local: LocalHub, tmp_path: Path) -> None:
    """They need the token."""
    local.publish("some/secret", files_of(exported(tmp_path / "own")), private=True)
    assert "is private (HTTP 401): check it, or set HF_TOKEN" in refusal(
        local, tmp_path / "hf", "some/secret"
    )
    wanted = msgspec.structs.replace(
        settings(local, tmp_path / "hf", "some/secret"), hf_token=TOKEN
    )
    assert open_catalog(wanted).resolve("some/secret", Task.EMBED).file == GRAPH


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_cached_means_no_socket(
    local: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    offline: bool,
    old: bool,
) -> None:
    """What is cached, by old programs too, is known and located without the network."""
    local.publish("some/body", files_of(exported(tmp_path / "own")), lfs=(GRAPH,))
    home = tmp_path / "hf"
    first = Locator(settings(local, home))(found(local, home, "some/body"))
    local.publish("some/body", {"config.json": b"newer"})
    if old:
        age(home)
    no_sockets(monkeypatch)
    wanted = settings(local, home, "some/body")
    wanted = msgspec.structs.replace(wanted, hf_hub_offline=offline)
    spec = open_catalog(wanted).resolve("some/body", Task.EMBED)
    again = Locator(wanted)(spec)
    assert msgspec.structs.replace(again, located=first.located) == first
    assert again.directory.name == first.directory.name


def test_a_cache_without_listing_or_model(local: LocalHub, tmp_path: Path) -> None:
    """The hub is asked where an old cache has only the configuration; a pickle is no model."""
    local.publish("some/body", files_of(exported(tmp_path / "own")), lfs=(GRAPH,))
    home = tmp_path / "hf"
    found(local, home, "some/body")
    age(home)
    (snapshot,) = home.glob("models--*/snapshots/*")
    (snapshot / "pytorch_model.bin").write_bytes(b"a pickle")
    assert found(local, home, "some/body").file == GRAPH


def test_offline(local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, what is not cached ends the start; of a graph and weights what is there counts."""
    files = files_of(both(tmp_path / "own"))
    commit = local.publish("some/body", files)
    home = tmp_path / "hf"
    wanted = msgspec.structs.replace(settings(local, home, "some/body"), hf_hub_offline=True)
    said = "'some/body' is not known: some/body: .*HF_HUB_OFFLINE is set: fill it with"
    with pytest.raises(SettingsError, match=said) as info:
        open_catalog(wanted)
    assert info.value.exit_code == 2
    found(local, home, "some/body")
    with pytest.raises(SettingsError, match="some/body has none of model.onnx"):
        open_catalog(wanted)
    open_hub(settings(local, home)).fetch(Origin(repo="some/body", files=(WEIGHTS,)))
    no_sockets(monkeypatch)
    spec = open_catalog(wanted).resolve("some/body", Task.EMBED)
    assert spec.origin
    assert spec.origin.files == (WEIGHTS,)
    (home / "hub" / "models--some--body" / "snapshots" / commit / WEIGHTS).write_bytes(b"half")
    with pytest.raises(SettingsError, match="model.safetensors not in .*, or damaged"):
        open_catalog(wanted)


def test_unreachable(local: LocalHub, tmp_path: Path) -> None:
    """A hub that cannot be reached stops no start; who needs the model now is told."""
    local.publish("some/body", files_of(exported(tmp_path / "own")), lfs=(GRAPH,))
    local.publish("some/scorer", files_of(write_cross_encoder(tmp_path / "scorer")))
    wanted = settings(local, tmp_path / "hf", "some/body", rerank=("some/scorer", "some/body"))
    catalog = open_catalog(msgspec.structs.replace(wanted, hf_endpoint=CLOSED))
    body, scorer = catalog.models["some/body"], catalog.models["some/scorer"]
    assert (body.kind, scorer.kind) == (Kind.DENSE, Kind.CROSS)
    assert body.unidentified
    assert scorer.unidentified
    with pytest.raises(FilesError, match="ConnectError") as info:
        Locator(msgspec.structs.replace(wanted, hf_endpoint=CLOSED))(body)
    assert info.value.retry
    locate, online = Locator(wanted), open_catalog(wanted)
    for spec in (body, scorer):
        there = online.models[spec.id]
        assert locate(spec) == complete(there, locate(spec).directory)
        assert not there.unidentified


def test_a_hub_in_trouble_is_asked_once(local: LocalHub, tmp_path: Path) -> None:
    """However many names there are, a start waits for one of them at most."""
    local.fault("/api/models", Fault.ERROR)
    catalog = open_catalog(settings(local, tmp_path, "some/body", "some/other", "some/third"))
    assert all(spec.unidentified for spec in catalog.models.values())
    assert {request.path for request in local.requests} == {"/api/models/some/body"}


def test_what_a_stand_in_turns_out_to_be(local: LocalHub, tmp_path: Path) -> None:
    """A model that cannot do what it was allowed for, or is none, is an error for good."""
    local.publish("some/scorer", files_of(write_cross_encoder(tmp_path / "scorer")))
    local.publish("some/body", files_of(write_model(tmp_path / "body")))
    local.publish("some/pickle", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    names, rerank = ("some/scorer", "some/pickle"), ("some/body",)
    wanted = settings(local, tmp_path / "hf", *names, rerank=rerank)
    models = open_catalog(msgspec.structs.replace(wanted, hf_endpoint=CLOSED)).models
    locate = Locator(wanted)
    with pytest.raises(ModelFilesError, match="some/scorer is a cross-encoder model, which cannot"):
        locate(models["some/scorer"])
    with pytest.raises(ModelFilesError, match="pickled weights are not read"):
        locate(models["some/pickle"])
    assert locate(models["some/body"]).kind is Kind.DENSE


def test_find(local: LocalHub, tmp_path: Path) -> None:
    """Names that are not allowed are looked up too, once each, and then known."""
    local.publish("some/body", files_of(exported(tmp_path / "own")))
    catalog = open_catalog(settings(local, tmp_path / "hf"))
    spec = catalog.find("some/body")
    del local.requests[:]
    assert catalog.find("some/body") is spec
    assert catalog.known["some/body"] is spec
    assert local.requests == []


def test_a_catalogue_without_a_hub() -> None:
    """Without somewhere to look, names that no list has are not known."""
    with pytest.raises(SettingsError, match="'some/body' is not known"):
        Catalog([], {Task.EMBED: ("some/body",)}, published_models)


def fetch(local: LocalHub, home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """`embedding-server fetch` with this hub."""
    return run("fetch", *words, offline="0", HF_HOME=str(home), HF_ENDPOINT=local.url)


def test_fetch(local: LocalHub, tmp_path: Path) -> None:
    """The command downloads the weights of a repository, which offline is then there."""
    data = f"{GRAPH}_data"
    files = files_of(exported(tmp_path / "own")) | {data: b"weights"}
    local.publish("some/body", files, lfs=(GRAPH, data))
    ran = fetch(local, tmp_path / "hf", "some/body")
    assert ran.returncode == 0, ran.stderr
    directory = Path(ran.stdout.strip().removeprefix("some/body: "))
    assert all((directory / name).read_bytes() == files[name] for name in (GRAPH, data))
    hub = Hub(tmp_path / "hf", offline=True)
    assert hub.cached(Origin(repo="some/body", files=(GRAPH, data)))


def test_fetch_mistakes_are_one_line(local: LocalHub, tmp_path: Path) -> None:
    """What is not there is a wrong name, a hub in trouble is not."""
    allowed = ("--allowed", "--allowed-embedding-models", "some/body")
    ran = fetch(local, tmp_path, "some/body")
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "'some/body' is not known: some/body does not exist or is private" in ran.stderr
    local.fault("/api/models", Fault.ERROR)
    for words in (("some/body",), allowed):
        ran = fetch(local, tmp_path, *words)
        assert ran.returncode == 1
        assert ran.stderr.splitlines()[-1] == (
            "embedding-server: some/body: the hub answered HTTP 500: check HF_ENDPOINT"
        )
