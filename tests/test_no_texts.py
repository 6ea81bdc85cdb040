"""No request text leaves but in its own answer: not in logs, spans, metrics or errors."""

import base64
import copy
import gzip
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from PIL import Image

from embedding_server.api import Face
from embedding_server.observability.logging import adopt_loguru, configure, described
from embedding_server.runtime.errors import SessionError
from embedding_server.settings import Settings
from tests.api.test_own_kinds import write_all
from tests.collector import collector
from tests.test_collectors import Traced, traced
from tests.tiny import write_model

TEXT = "xyzzytext"
"""A client's text; must be nowhere but in answers that give documents back."""
NAME = "xyzzyname"
"""A client's wrong name for a model or a prompt; an error may say it back to the client."""
WORD = f"the {TEXT} of"


def png() -> str:
    """A picture in base64."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


EMBED = {"model": "tiny", "input": [WORD, "a"], "truncate": True, "prompt": None}
EMBED |= {"dimensions": 8, "input_type": "query", "encoding_format": "float", "prompt_name": None}
RERANK = {"model": "tiny", "query": WORD, "documents": [WORD, "a"], "top_n": 1}
TEI: dict[str, Any] = {"inputs": [WORD], "truncate": True, "truncation_direction": "Left"}
UNIFIED = {"model": "tiny", "input": [WORD], "options": {"prompt": TEXT, "precision": "float32"}}
COHERE = {"model": "tiny", "texts": [WORD], "input_type": "search_query", "truncate": "END"}
COHERE |= {"embedding_types": ["float"]}
SENTENCES = {"source_sentence": WORD, "sentences": [WORD]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/embed": EMBED | {"output": "vector", "truncation_direction": "right"},
    "/api/embed/batch": {"model": "tiny", "texts": [WORD], "timeout_ms": 60_000},
    "/api/embed/sparse": {"model": "sparse", "input": [WORD], "input_type": "query"},
    "/api/embed/image": {"model": "image", "image": png(), "images": None},
    "/api/rerank": RERANK | {"documents": [{"text": WORD, "id": TEXT}, TEXT], "top_k": 1},
    "/v1/embeddings": EMBED,
    "/api/v1/embeddings": EMBED,
    "/embeddings": EMBED,
    "/v1/score": {"model": "tiny", "text_1": WORD, "text_2": [WORD, TEXT]},
    "/v1/embed": COHERE,
    "/v2/embed": COHERE
    | {"texts": None, "inputs": [{"content": [{"type": "text", "text": WORD}]}]},
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK | {"max_tokens_per_doc": 5},
    "/v1/tokenize": {"model": "tiny", "text": WORD},
    "/v1/detokenize": {"model": "tiny", "tokens": [5, 6]},
    "/embed": TEI | {"prompt_name": "query"},
    "/embed_all": TEI | {"prompt_name": None},
    "/embed_sparse": TEI | {"normalize": True},
    "/rerank": {"query": WORD, "texts": [WORD], "truncation_direction": "Left"},
    "/similarity": {"inputs": SENTENCES, "parameters": {"prompt_name": "query"}},
    "/tokenize": {"inputs": [WORD], "prompt_name": "query"},
    "/decode": {"ids": [5, 6], "skip_special_tokens": True},
    "/": {"inputs": SENTENCES, "parameters": {"truncation_direction": "Left"}},
    "/embed/batch": {"model_name": "tiny", "texts": [WORD]},
    "/api/v1/embed": UNIFIED,
    "/api/v1/embed_sparse": UNIFIED | {"model": "sparse"},
    "/api/v1/rerank": RERANK | {"top_k": 1},
    "/api/v1/models/{id:path}": {},
}
"""A right body for every POST route."""


def test_every_route_is_here() -> None:
    """A route that takes POST has a body above."""
    posts = [one for one in Face.of().handlers if "POST" in getattr(one, "http_methods", ())]
    assert {path for one in posts for path in one.paths} == set(BODIES)


def wrong(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bodies with the text, or the name, where it is not expected: every field, at any depth."""
    yield body | {TEXT: TEXT}
    for key, value in body.items():
        for other in ({TEXT: TEXT}, [{TEXT: TEXT}], [[TEXT]], TEXT, [TEXT], -1, 1e999, [WORD, 7]):
            changed = copy.deepcopy(body)
            named = key in ("model", "model_name", "prompt_name") and isinstance(other, str)
            changed[key] = NAME if named else other
            yield changed
        if isinstance(value, dict):
            yield from (body | {key: one} for one in wrong(value))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from (body | {key: [one]} for one in wrong(value[0]))
    yield body | {"prompt": TEXT * 2000}
    yield body | {"prompt_name": NAME}
    long = {"input": [TEXT * 200], "texts": [TEXT * 200], "inputs": [TEXT * 200]}
    yield body | {"truncate": False} | {key: long[key] for key in long if key in body}
    yield body | {key: [TEXT] * 3000 for key in ("input", "texts", "documents") if key in body}


def contents(body: dict[str, Any]) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Requests that begin right and go wrong, on the way to the decoder or in it."""
    whole = json.dumps(body).encode()
    yield whole, {}
    yield gzip.compress(whole), {"content-encoding": "gzip"}
    yield whole, {"content-encoding": "gzip"}
    yield whole, {"content-type": "text/plain"}
    yield whole[:-1], {}
    yield whole + TEXT.encode(), {}
    yield TEXT.encode(), {}
    yield json.dumps(TEXT).encode(), {}
    yield whole.replace(b"{", b'{"' + TEXT.encode() + b'":\xff,', 1), {}
    yield json.dumps([[TEXT]] * 3).encode(), {}
    yield b"[" * 5000 + TEXT.encode(), {}
    for one in wrong(body):
        yield json.dumps(one).encode(), {}


@pytest.fixture(scope="module")
def own_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several kinds."""
    root = tmp_path_factory.mktemp("own")
    write_all(root)
    write_model(root / "tiny")
    return root


def send_all(client: Traced) -> int:
    """Send all of it; no answer that failed says the text back. How many requests there were."""
    count, fine = 0, set()
    for path, body in BODIES.items():
        url = path.replace("{id:path}", f"{NAME}/load")
        for content, headers in contents(body):
            said = {"content-type": "application/json"} | headers
            answer: httpx.Response = client.post(url, content=content, headers=said)
            count += 1
            if answer.is_success:
                fine.add(path)
            else:
                assert answer.status_code < 500, (path, content[:300], answer.text)
                assert TEXT not in answer.text, (path, content[:300], answer.text)
                assert TEXT not in str(answer.headers)
    # Nothing of late interaction is loaded, and there is no such model to load.
    assert set(BODIES) - fine == {"/embed_all", "/api/v1/models/{id:path}"}
    return count


def test_no_text_anywhere(own_models: Path) -> None:
    """Through every POST route, right and wrong in every way, at the most talkative level."""
    env = {
        "INFERENCE_MODEL_PATH": str(own_models),
        "INFERENCE_ALLOWED_EMBEDDING_MODELS": "tiny,sparse,image",
        "INFERENCE_ALLOWED_RERANK_MODELS": "tiny",
        "INFERENCE_DEFAULT_MODEL": "tiny,sparse",
        "LOG_LEVEL": "debug",
    }
    with collector() as sink, traced(sink.endpoint, demo="", **env) as client:
        count = send_all(client)
        metrics = [
            client.get("/metrics", headers={"accept": kind}).text
            for kind in ("text/plain", "application/openmetrics-text", "application/json")
        ]
        events, _ = client.ended()
    assert count > 1500
    assert sum(event["event"] == "request" for event in events) == count
    assert len([span for span in sink.spans if span.kind == 2]) == count
    assert len(sink.records) == len(events)
    said = {"log": str(events), "spans": str(sink.spans), "records": str(sink.records)}
    said |= {"metrics": str(metrics)}
    assert {place for place, text in said.items() if TEXT in text} == set()
    assert {place for place, text in said.items() if NAME in text} == set()


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Logging as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    root.handlers, root.level = handlers, level


def fail() -> None:
    """An exception of a stranger, with a text in it, in a variable and in a cause's message."""
    text = f"{TEXT}!"
    try:
        int(text)
    except ValueError as exc:
        raise KeyError(text) from exc


@pytest.mark.parametrize("form", ["json", "pretty"])
@pytest.mark.usefixtures("logged")
def test_exceptions(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback says where and what kind, of every cause, and nothing that was sent."""
    configure(Settings(allowed_embedding_models=(), log_format=form))
    try:
        fail()
    except KeyError:
        structlog.get_logger().exception("failed")
        logging.getLogger("somebody").exception("failed, too")
        adopt_loguru()
        from loguru import logger  # noqa: PLC0415

        logger.exception("failed, three")
    output = capsys.readouterr().out
    assert output.count("ValueError") == 3
    assert output.count("in fail") == 3 + 3
    assert TEXT not in output


def test_what_exceptions_say() -> None:
    """Ours and the file system's say their message, those of strangers their type."""
    assert described(SessionError("no memory")) == "SessionError: no memory"
    assert (
        described(FileNotFoundError(2, "gone", "/x")) == "FileNotFoundError: [Errno 2] gone: '/x'"
    )
    assert described(ValueError(TEXT)) == "ValueError"
