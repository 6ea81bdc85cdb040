"""Every kind of model: from an allow-list over a hub to HTTP answers, against FastEmbed's own."""

import base64
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from embedding_server.catalog.fastembed import listings
from embedding_server.catalog.published import published_models
from embedding_server.core import ModelSpec
from embedding_server.serving.cost import Work
from embedding_server.serving.schedule import Lane
from tests.conftest import Client, Serve, parts_of
from tests.hub import LocalHub
from tests.zoo import ZOO

TEXTS = ["the of that was", "a, b! the", "he was for you and that is it " * 8, "that"]
QUERIES = ["was that it", "of"]
SPARSE = [
    "prithivida/Splade_PP_en_v1",
    "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte",
    "Qdrant/bm25",
    "Qdrant/bm42-all-minilm-l6-v2-attentions",
    "Qdrant/minicoil-v1",
]
MARCO = "Xenova/ms-marco-MiniLM-L-6-v2"
COLBERT, COLPALI = "colbert-ir/colbertv2.0", "Qdrant/colpali-v1.3-fp16"
PLAIN = [
    "snowflake/snowflake-arctic-embed-xs",
    "jinaai/jina-embeddings-v2-small-en",
    "nomic-ai/nomic-embed-text-v1.5",
    "Qwen/Qwen3-Embedding-0.6B-Q",
    "Qdrant/clip-ViT-B-32-text",
]
DENSE = ["minishlab/potion-base-8M", "jinaai/jina-embeddings-v3", "google/siglip2-base-patch16-224"]
IMAGES = [
    "Qdrant/clip-ViT-B-32-vision",
    "nomic-ai/nomic-embed-vision-v1.5",
    "Qdrant/resnet50-onnx",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The zoo on disk."""
    root = tmp_path_factory.mktemp("zoo")
    for index, write in enumerate(ZOO.values()):
        write(root / str(index))
    return {name: root / str(index) for index, name in enumerate(ZOO)}


@pytest.fixture(scope="module")
def hub(files: dict[str, Path]) -> Iterator[LocalHub]:
    """A hub that has all of it."""
    with LocalHub() as hub:
        for name in ZOO:
            origin = spec_of(name).origin
            assert origin
            paths = [path for path in files[name].rglob("*") if path.is_file()]
            content = {str(path.relative_to(files[name])): path.read_bytes() for path in paths}
            large = tuple(one for one in content if "model.onnx" in one)
            hub.publish(origin.repo, content, lfs=large)
        yield hub


@pytest_asyncio.fixture
async def client(serve: Serve, hub: LocalHub, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a server that may serve all of it and loads what is asked for."""
    async with serve(
        allowed_embedding_models=tuple(name for name in ZOO if name != MARCO),
        allowed_rerank_models=(COLBERT, "minishlab/potion-base-8M", MARCO),
        preload=(),
        hf_endpoint=hub.url,
        hf_home=tmp_path / "hf",
        queue_timeout_ms=60_000,
    ) as client:
        yield client


def spec_of(name: str) -> ModelSpec:
    """What the catalogue says."""
    return next(spec for spec in published_models() if name in spec.names)


def theirs(name: str, files: dict[str, Path]) -> Any:
    """FastEmbed's own object over the same files."""
    kind = spec_of(name).kind
    cls = next(
        one
        for one in listings()
        if any(model.model == name for model in one._list_supported_models())
        and one.__module__.startswith("fastembed.image") == (kind == "image")
    )
    return cls(name, specific_model_path=str(files[name]))


async def post(client: Client, path: str, **body: Any) -> Any:
    """The answer of a request that succeeds."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def unit(rows: Any) -> Any:
    """Rows of length 1."""
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def same_sparse(ours: dict[str, Any], other: Any) -> None:
    """The same words with the same weights, in ascending order."""
    order = np.argsort(other.indices)
    assert ours["indices"] == other.indices[order].tolist()
    assert np.allclose(ours["values"], other.values[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SPARSE)
async def test_sparse(client: Client, files: dict[str, Path], name: str) -> None:
    """Documents and queries get the words and weights that FastEmbed gives them."""
    reference = theirs(name, files)
    answer = await post(client, "/api/embed/sparse", model=name, input=TEXTS)
    assert (answer["model"], answer["count"]) == (name, len(TEXTS))
    for ours, other in zip(answer["embeddings"], reference.embed(TEXTS), strict=True):
        assert ours["indices"]
        same_sparse(ours, other)
    answer = await post(client, "/api/embed/sparse", model=name, input=QUERIES, input_type="query")
    for ours, other in zip(answer["embeddings"], reference.query_embed(QUERIES), strict=True):
        same_sparse(ours, other)
    assert (await post(client, "/api/embed/sparse", model=name, input=[]))["embeddings"] == []


@pytest.mark.parametrize("name", PLAIN)
async def test_dense_graphs(client: Client, files: dict[str, Path], name: str) -> None:
    """Every pooling, and one in the graph, gives FastEmbed's vectors on the same files."""
    expected = unit(list(theirs(name, files).embed(TEXTS)))
    answer = await post(client, "/api/embed", model=name, input=TEXTS)
    assert np.abs(answer["embeddings"] - expected).max() < 1e-5


async def test_cross_encoder(client: Client, files: dict[str, Path]) -> None:
    """Raw scores of pairs are FastEmbed's."""
    documents = TEXTS[:2] + TEXTS[3:]  # it cuts pairs otherwise than transformers does
    expected = list(theirs(MARCO, files).rerank(QUERIES[0], documents))
    answer = await post(client, "/api/rerank", model=MARCO, query=QUERIES[0], documents=documents)
    for one in answer["results"]:
        assert abs(one["score"] - expected[one["index"]]) < 1e-4


@pytest.mark.parametrize("name", DENSE)
async def test_dense_objects(client: Client, files: dict[str, Path], name: str) -> None:
    """What runs through FastEmbed's objects gives their vectors, on the usual routes."""
    reference = theirs(name, files)
    for kind, texts, expected in (
        ("document", TEXTS, unit(list(reference.embed(TEXTS)))),
        ("query", QUERIES, unit(list(reference.query_embed(QUERIES)))),
    ):
        answer = await post(client, "/api/embed", model=name, input=texts, input_type=kind)
        assert answer["dimensions"] == spec_of(name).dimensions
        assert np.abs(answer["embeddings"] - expected).max() < 1e-5
    cut = await post(client, "/v1/embeddings", model=name, input=TEXTS[0], dimensions=32)
    whole = next(iter(reference.embed(TEXTS[:1])))
    assert np.abs(cut["data"][0]["embedding"] - unit(whole[:32])).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        (COLBERT, [32, 32]),
        ("jinaai/jina-colbert-v2", [32, 32]),
        ("lightonai/LateOn", [6, 4]),
        ("lightonai/mLateOn", [6, 4]),
        ("jinaai/jina-embeddings-v2-small-en-tokens", [5, 3]),
    ],
)
async def test_late_interaction(
    client: Client, files: dict[str, Path], name: str, tokens: list[int]
) -> None:
    """A vector per token, punctuation left out of documents, queries filled up with masks."""
    reference = theirs(name, files)
    for kind, texts, expected in (
        ("document", TEXTS, list(reference.embed(TEXTS))),
        ("query", QUERIES, list(reference.query_embed(QUERIES))),
    ):
        answer = await post(
            client, "/api/embed", model=name, input=texts, input_type=kind, output="tokens"
        )
        for ours, other in zip(answer["embeddings"], expected, strict=True):
            assert np.abs(np.array(ours) - unit(other)).max() < 1e-5
    assert [len(one) for one in answer["embeddings"]] == tokens


async def test_vectors_of_tokens_in_base64(client: Client) -> None:
    """Each is a string, bit by bit the same."""
    coded = await post(
        client, "/api/embed", model=COLBERT, text="of", output="tokens", encoding_format="base64"
    )
    (rows,) = coded["embeddings"]
    plain = await post(client, "/api/embed", model=COLBERT, text="of", output="tokens")
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert np.array_equal(decoded, np.array(plain["embeddings"][0], np.float32))


async def test_late_interaction_reranks(client: Client, files: dict[str, Path]) -> None:
    """The score is the sum of each query token's best cosine."""
    reference = theirs(COLBERT, files)
    query = unit(next(iter(reference.query_embed(QUERIES[0]))))
    expected = [(query @ unit(one).T).max(axis=1).sum() for one in reference.embed(TEXTS)]
    answer = await post(client, "/api/rerank", model=COLBERT, query=QUERIES[0], documents=TEXTS)
    scores = {one["index"]: one["score"] for one in answer["results"]}
    assert np.abs([scores[index] for index in range(len(TEXTS))] - np.array(expected)).max() < 1e-4
    assert [one["index"] for one in answer["results"]] == np.argsort(-np.array(expected)).tolist()
    nothing = await post(client, "/api/rerank", model=COLBERT, query="of", documents=[])
    assert nothing["results"] == []


async def test_static_model_reranks(client: Client, files: dict[str, Path]) -> None:
    """By cosine."""
    name = "minishlab/potion-base-8M"
    rows = unit(list(theirs(name, files).embed([QUERIES[0], *TEXTS])))
    answer = await post(client, "/api/rerank", model=name, query=QUERIES[0], documents=TEXTS)
    for one in answer["results"]:
        assert abs(one["score"] - rows[1 + one["index"]] @ rows[0]) < 1e-5


def picture(width: int, height: int, form: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file with a different colour everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


PICTURES = [
    picture(300, 224),
    picture(64, 300, "JPEG"),
    picture(320, 240, "WEBP"),
    picture(50, 50, mode="L"),
    picture(100, 120, mode="P"),
]


def coded(file: bytes) -> str:
    """In base64."""
    return base64.b64encode(file).decode()


@pytest.mark.parametrize("name", IMAGES)
async def test_images(client: Client, files: dict[str, Path], name: str) -> None:
    """PNG, JPEG and WebP get the vectors that FastEmbed gives them, together and alone."""
    opened = [Image.open(io.BytesIO(one)) for one in PICTURES]
    expected = unit(list(theirs(name, files).embed(opened)))
    together = await post(
        client, "/api/embed/image", model=name, images=[coded(one) for one in PICTURES]
    )
    assert together["dimensions"] == spec_of(name).dimensions
    assert np.abs(together["embeddings"] - expected).max() < 1e-5
    address = f"data:image/png;base64,{coded(PICTURES[0])}"
    alone = await post(client, "/api/embed/image", model=name, image=address)
    assert np.abs(alone["embeddings"] - expected[:1]).max() < 1e-5


async def test_texts_and_images_of_one_model(client: Client, files: dict[str, Path]) -> None:
    """ColPali makes a vector per token of a text and per patch of an image."""
    reference = theirs(COLPALI, files)
    answer = await post(client, "/api/embed", model=COLPALI, input=QUERIES, output="tokens")
    for ours, text in zip(answer["embeddings"], QUERIES, strict=True):
        (other,) = reference.embed_text([text])
        assert np.abs(np.array(ours) - unit(other)).max() < 1e-5
    answer = await post(client, "/api/embed/image", model=COLPALI, images=[coded(PICTURES[0])])
    (other,) = reference.embed_image([Image.open(io.BytesIO(PICTURES[0]))])
    assert np.array(answer["embeddings"][0]).shape == (1030, 128)
    assert np.abs(np.array(answer["embeddings"][0]) - unit(other)).max() < 1e-5


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("https://example.org/cat.png", "images are not fetched, send base64"),
        ("data:image/png,abc", "no base64"),
        ("!!!", "no base64"),
        (coded(b"GIF89a no image"), "image 1 is no image that can be read"),
        (coded(PICTURES[0][:-300]), "image 1 is no image that can be read"),
        (coded(picture(2000, 1000)), "image 1 has 2000 x 1000 pixels, at most 1000000"),
        (coded(picture(4, 4000)), "image 1 is 4 x 4000, more than 1:50"),
    ],
)
async def test_bad_images(
    serve: Serve, hub: LocalHub, tmp_path: Path, image: str, said: str
) -> None:
    """What is no image, damaged, too large or elsewhere is refused, and says which one it is."""
    name = IMAGES[0]
    async with serve(
        allowed_embedding_models=(name,),
        allowed_rerank_models=(),
        hf_endpoint=hub.url,
        hf_home=tmp_path,
        max_image_pixels=1_000_000,
    ) as client:
        answer = await client.post(
            "/api/embed/image", json={"model": name, "images": [coded(PICTURES[0]), image]}
        )
        assert answer.status_code == 400
        assert said in answer.json()["error"]
        both = {"model": name, "image": "", "images": []}
        assert (await client.post("/api/embed/image", json=both)).status_code == 400
        many = {"model": name, "images": [coded(PICTURES[3])] * 129}
        answer = await client.post("/api/embed/image", json=many)
        assert "Batch size 129 exceeds maximum 128" in answer.json()["error"]


async def test_the_same_gate(serve: Serve, hub: LocalHub, tmp_path: Path) -> None:
    """Sparse, image, late-interaction and rerank requests are admitted and refused like others."""
    names = (SPARSE[0], IMAGES[0], COLBERT)
    async with serve(
        allowed_embedding_models=names,
        allowed_rerank_models=(COLBERT,),
        hf_endpoint=hub.url,
        hf_home=tmp_path,
        max_concurrent_requests=1,
        max_queue_depth=0,
    ) as client:
        bodies: dict[str, Any] = {
            "/api/embed/sparse": {"model": SPARSE[0], "text": "of"},
            "/api/embed/image": {"model": IMAGES[0], "image": coded(PICTURES[0])},
            "/api/embed": {"model": COLBERT, "text": "of", "output": "tokens"},
            "/api/rerank": {"model": COLBERT, "query": "of", "documents": ["that"]},
        }
        for path, body in bodies.items():
            answer = await client.post(path, json=body)
            assert answer.status_code == 200
            assert int(answer.headers["x-queue-capacity"]) == 0
        queue = parts_of(client).engine.queue
        with await queue.permit(Work(1.0, 1.0), Lane.BULK, "somebody"):
            for path, body in bodies.items():
                answer = await client.post(path, json=body)
                assert answer.status_code == 503
                assert answer.json()["code"] == "SERVICE_UNAVAILABLE"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        for path, body in bodies.items():
            assert (await client.post(path, json=body)).status_code == 200
        assert "interactive=0, bulk=0" in repr(parts_of(client).device)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/embed", {"model": SPARSE[0], "text": "a"}, "is sparse: POST /api/embed/sparse"),
        ("/v1/embeddings", {"model": SPARSE[0], "input": "a"}, "is sparse"),
        ("/api/embed", {"model": COLBERT, "text": "a"}, 'with "output": "tokens"'),
        ("/api/embed", {"model": IMAGES[0], "text": "a"}, "is image: POST /api/embed/image"),
        ("/api/embed/sparse", {"model": DENSE[0], "text": "a"}, "is static: POST /api/embed "),
        ("/api/embed/sparse", {"model": SPARSE[0]}, "give either text or input"),
        ("/api/embed", {"model": DENSE[0], "text": "a", "output": "tokens"}, "is static"),
        ("/api/embed/image", {"model": DENSE[0], "image": ""}, "is static: POST /api/embed "),
        ("/api/embed/image", {"model": COLBERT, "image": ""}, "takes texts, no images"),
        ("/api/rerank", {"model": SPARSE[0], "query": "a", "documents": []}, "another task"),
    ],
)
async def test_the_wrong_route(client: Client, path: str, body: Any, said: str) -> None:
    """A model of another kind is refused with the route that serves it."""
    answer = await client.post(path, json=body)
    assert answer.status_code in {400, 404}
    error = answer.json()["error"]
    assert said in (error if isinstance(error, str) else error["message"])


async def test_long_texts_are_said(client: Client) -> None:
    """Texts that are cut are counted, and refused where the client says so."""
    for name in (SPARSE[0], SPARSE[3]):
        body = {"model": name, "input": ["the " * 100, "of"]}
        answer = await client.post("/api/embed/sparse", json=body)
        assert answer.headers["x-truncated-inputs"] == "1"
        refused = await client.post("/api/embed/sparse", json=body | {"truncate": False})
        assert "text 0 has more than 32 tokens" in refused.json()["error"]


async def test_lists_say_what_a_model_makes(client: Client) -> None:
    """The list of embedders names each model's kind."""
    rows = {one["name"]: one["kind"] for one in (await client.get("/api/embedders")).json()}
    assert rows[SPARSE[0]] == "sparse"
    assert rows[COLBERT] == "late-interaction"
    assert rows[IMAGES[0]] == "image"
    assert rows[DENSE[0]] == "static"
    assert rows[DENSE[1]] == "dense"
