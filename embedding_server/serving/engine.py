"""One call per task, from a client's model name to vectors or scores.

The order of a request: resolve the model, check sizes, lease the model, wait for a permit,
tokenise, run, finish the vectors. Overload is refused before the first token is made.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from embedding_server.catalog import Catalog
from embedding_server.core import Embeddings, ModelSpec, Ranking, Task, normalized
from embedding_server.errors import BadRequest, DeadlineExceeded, EmbeddingError, RerankError
from embedding_server.observability.metrics import OTHER_MODEL, Metrics
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.batcher import RunError
from embedding_server.serving.model import TextTooLong
from embedding_server.serving.registry import Registry
from embedding_server.serving.schedule import Lane

_MAX_PROMPT_CHARS = 10_000


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say beside its texts.

    `dimensions` cuts vectors before they are normalised; `truncate` False makes a text over the
    model's limit an error; `input_type` picks the model's own prompt, `prompt` replaces it;
    `timeout` is in seconds.
    """

    dimensions: int | None = None
    normalize: bool = True
    truncate: bool = True
    input_type: str | None = None
    prompt: str | None = None
    timeout: float | None = None


class Engine:
    """What the dialects call.

    Args:
        max_text_chars: longest text; 0 = no limit but the model's.
    """

    def __init__(
        self,
        catalog: Catalog,
        registry: Registry,
        queue: AdmissionQueue,
        metrics: Metrics,
        *,
        max_text_chars: int,
    ) -> None:
        self.catalog = catalog
        self.registry = registry
        self.queue = queue
        self.metrics = metrics
        self._max_text_chars = max_text_chars

    async def embed(self, name: str, texts: Sequence[str], options: Options) -> Embeddings:
        """One vector per text.

        Raises:
            UnsupportedModel, BadRequest: the request is wrong.
            ServiceUnavailable, ModelLoadError, DeadlineExceeded: it came at a bad time.
            EmbeddingError: the model failed on it.
        """
        with self._observed(Task.EMBED, name, len(texts)) as spec:
            _check_dimensions(options.dimensions, spec)
            self._check_lengths(texts, _text_name)
            prompt = _prompt(spec, options)
            try:
                raw = await self._run(spec, [prompt + text for text in texts], options)
            except TextTooLong as exc:
                raise _too_long(_text_name(exc.index), spec) from exc
            except RunError as exc:
                raise EmbeddingError(str(exc)) from exc
            rows = raw.rows[:, : options.dimensions]
            rows = normalized(rows) if options.normalize else np.ascontiguousarray(rows)
            return msgspec.structs.replace(raw, rows=rows)

    async def rerank(
        self, name: str, query: str, documents: Sequence[str], top: int | None, options: Options
    ) -> Ranking:
        """The `top` best documents for `query`, by cosine of the model's vectors.

        Raises:
            RerankError: the model failed; the others as in `embed`.
        """
        with self._observed(Task.RERANK, name, len(documents)) as spec:
            if top is not None and top < 1:
                raise BadRequest(f"top_k and top_n must be at least 1, got {top}")
            self._check_lengths([query, *documents], _rerank_name)
            texts = [spec.prompts.get("query", "") + query]
            texts += [spec.prompts.get("document", "") + text for text in documents]
            try:
                raw = await self._run(spec, texts if documents else [], options)
            except TextTooLong as exc:
                raise _too_long(_rerank_name(exc.index), spec) from exc
            except RunError as exc:
                raise RerankError(str(exc)) from exc
            rows = normalized(raw.rows)
            scores = rows[1:] @ rows[0] if documents else np.empty(0, np.float32)
            order = np.argsort(-scores, kind="stable")[:top].tolist()
            return Ranking(
                order=order,
                scores=[float(scores[index]) for index in order],
                fingerprint=raw.fingerprint,
                tokens=raw.tokens,
                truncated=raw.truncated,
            )

    async def _run(self, spec: ModelSpec, texts: Sequence[str], options: Options) -> Embeddings:
        """Raw vectors within the client's deadline."""
        if self.queue.draining:
            raise self.queue.refusal("draining", "the server is shutting down")
        if options.timeout is None:
            return await self._embed(spec, texts, truncate=options.truncate)
        try:
            async with asyncio.timeout(options.timeout):
                return await self._embed(spec, texts, truncate=options.truncate)
        except TimeoutError as exc:
            self.metrics.expired.inc()
            raise DeadlineExceeded(f"not done within {options.timeout:g} s") from exc

    async def _embed(self, spec: ModelSpec, texts: Sequence[str], *, truncate: bool) -> Embeddings:
        with await self.registry.lease(spec) as model:
            if not texts:
                return model.nothing
            with await self.queue.permit(model.estimate(texts), Lane.of(len(texts))):
                return await model.embed(texts, truncate=truncate)

    def _check_lengths(self, texts: Sequence[str], name: Callable[[int], str]) -> None:
        limit = self._max_text_chars
        for index, text in enumerate(texts if limit else ()):
            if len(text) > limit:
                size = f"{len(text)} characters, the limit is {limit}"
                raise BadRequest(f"{name(index)} has {size}")

    @contextmanager
    def _observed(self, task: Task, name: str, items: int) -> Iterator[ModelSpec]:
        """Resolve the model and count the request under its id and outcome."""
        started, label, status = time.perf_counter(), OTHER_MODEL, "error"
        try:
            spec = self.catalog.resolve(name, task)
            label = spec.id
            yield spec
            status = "success"
        finally:
            seconds = time.perf_counter() - started
            self.metrics.record_request(task, label, status, items, seconds)


def _text_name(index: int) -> str:
    return f"text {index}"


def _rerank_name(index: int) -> str:
    """The query is the first of the texts that go through the model."""
    return f"document {index - 1}" if index else "the query"


def _too_long(which: str, spec: ModelSpec) -> BadRequest:
    return BadRequest(
        f"{which} has more than {spec.max_tokens} tokens: shorten it, or allow truncation with"
        " truncate: true"
    )


def _check_dimensions(dimensions: int | None, spec: ModelSpec) -> None:
    if dimensions is not None and not 1 <= dimensions <= spec.dimensions:
        raise BadRequest(f"dimensions must be from 1 to {spec.dimensions}, got {dimensions}")


def _prompt(spec: ModelSpec, options: Options) -> str:
    if options.prompt is not None:
        if len(options.prompt) > _MAX_PROMPT_CHARS:
            raise BadRequest(f"prompt has more than {_MAX_PROMPT_CHARS} characters")
        return options.prompt
    return spec.prompts.get(options.input_type or "", "")
