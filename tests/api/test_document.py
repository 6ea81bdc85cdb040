"""The OpenAPI document is true: its examples work, and what it says of failures holds."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from tests.conftest import Client, Serve
from tests.fuzz.__main__ import SERVED, write_models


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of every kind."""
    root = tmp_path_factory.mktemp("kinds")
    write_models(root)
    return root


@pytest_asyncio.fixture
async def client(serve: Serve, every_kind: Path) -> AsyncIterator[Client]:
    """A client of a server that has something for every route."""
    lists: dict[str, Any] = {key: tuple(names.split(",")) for key, names in SERVED.items()}
    async with serve(model_path=every_kind, **lists) as client:
        yield client


async def document_of(client: Client) -> dict[str, Any]:
    """The document of an application."""
    document: dict[str, Any] = (await client.get("/api/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and operation."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def bodies(operation: dict[str, Any]) -> list[Any]:
    """The examples of a request's body; of no body None."""
    if "requestBody" not in operation:
        return [None]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    return [example["value"] for example in examples.values()]


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    """Raises where a value is not what a schema of the document says."""
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


async def test_examples_work(client: Client) -> None:
    """Every route has an example that fits its schema, and a success that fits its own."""
    document = await document_of(client)
    for path, method, operation in operations(document):
        for body in bodies(operation):
            if body is not None:
                content = operation["requestBody"]["content"]["application/json"]
                check(document, content["schema"], body)
            answer = await client.request(method, path.replace("{id}", "dense"), json=body)
            assert answer.status_code == 200, (path, body, answer.text)
            said = operation["responses"]["200"]
            media = answer.headers["content-type"].partition(";")[0]
            value = answer.json() if media == "application/json" else answer.text
            check(document, said["content"][media]["schema"], value)
            for name, header in said["headers"].items():
                told = document["components"]["headers"].get(name, header)
                assert name in answer.headers or not told.get("required"), (path, name)
        assert bodies(operation), path


async def test_failures_are_declared(client: Client) -> None:
    """A body that is no object, and a method that is not there, are as every route says."""
    document = await document_of(client)
    for path, method, operation in operations(document):
        where = path.replace("{id}", "dense")
        answers = [await client.request("PATCH", where)]
        if "requestBody" in operation:
            wrong: list[Any] = [
                {"content": b""},
                {"content": b"[]"},
                {"content": b"\xff"},
                {"data": {"a": "b"}},
            ]
            answers += [await client.request(method, where, **one) for one in wrong]
        for answer in answers:
            said = operation["responses"][str(answer.status_code)]
            check(document, said["content"]["application/json"]["schema"], answer.json())
            for name in said["headers"]:
                assert name in answer.headers, (path, answer.status_code, name)


async def test_models_are_listed_where_they_work(client: Client) -> None:
    """A route's `model` is one of those that serve it."""
    paths = (await document_of(client))["paths"]
    names = {
        path: item["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        for path, item in paths.items()
        if "requestBody" in item.get("post", {})
    }
    assert names["/api/embed"]["model"] == {"enum": ["dense", "static", "late"]}
    assert names["/api/embed/sparse"]["model"] == {"enum": ["sparse"]}
    assert names["/api/embed/image"]["model"] == {"enum": ["image"]}
    assert names["/v1/rerank"]["model"] == {"enum": ["late", "cross", None]}
    assert paths["/v1/models/{id}"]["get"]["parameters"][0]["schema"]["enum"][0] == "dense"


async def test_keys_are_declared(serve: Serve) -> None:
    """Where a server has keys, the document says which routes want one."""
    async with serve(api_keys=("secret",)) as client:
        document = await document_of(client)
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        for path, _, operation in operations(document):
            assert ("security" in operation) == (not path.startswith(("/health", "/metrics")))
    async with serve() as client:
        assert "security" not in (await document_of(client))["paths"]["/api/embed"]["post"]


async def test_dialects_that_are_off(serve: Serve) -> None:
    """The document has the routes that there are."""
    async with serve(dialects=("native", "tei")) as client:
        paths = (await document_of(client))["paths"]
        assert {"/api/embed", "/embed", "/info"} <= paths.keys()
        assert "/v1/embeddings" not in paths
        assert list(paths["/"]) == ["post"]


async def test_options(client: Client) -> None:
    """OPTIONS and 405 name all methods of a path, whichever handlers they have."""
    assert (await client.options("/")).headers["allow"] == "GET, OPTIONS, POST"
    assert (await client.options("/api/embed")).headers["allow"] == "OPTIONS, POST"
    answer = await client.delete("/")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "OPTIONS", "POST"}
    answer = await client.post("/api/v1/models/dense")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, OPTIONS")


async def test_nothing_in_bits(client: Client) -> None:
    """No texts are no vectors, in every form."""
    forms = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    body = {"model": "dense", "texts": [], "embedding_types": forms}
    answer = await client.post("/v1/embed", json=body)
    assert answer.json()["embeddings"] == {form: [] for form in forms}


async def test_errors_of_the_root(client: Client) -> None:
    """TEI's route without a name fails as its others do."""
    answer = await client.post("/", json={})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "Validation")


@pytest.mark.parametrize("field", [{}, {"timeout_ms": 60_000}])
@pytest.mark.parametrize("header", ["", "soon"])
async def test_wrong_deadline_header(client: Client, field: Any, header: str) -> None:
    """An empty header is no number either, and the field does not hide a wrong one."""
    body = {"model": "dense", "text": "a"} | field
    answer = await client.post("/api/embed", json=body, headers={"X-Request-Timeout-Ms": header})
    assert answer.status_code == 400
