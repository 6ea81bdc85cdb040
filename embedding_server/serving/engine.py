"""One call per task, from a client's model name to vectors or scores.

The order of a request: resolve the model, check sizes, lease the model, wait for a permit,
tokenise, run, finish the vectors. Overload is refused before the first token is made.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np

from embedding_server.catalog import Catalog
from embedding_server.core import (
    Embeddings,
    Kind,
    ModelSpec,
    Query,
    Ranking,
    Task,
    Text,
    Usage,
    Vector,
)
from embedding_server.errors import (
    BadRequest,
    DeadlineExceeded,
    EmbeddingError,
    RerankError,
    UnsupportedModel,
)
from embedding_server.observability.metrics import OTHER_MODEL, Metrics
from embedding_server.runtime.encoder import InputError
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.batcher import RunError
from embedding_server.serving.kinds import finished, scores
from embedding_server.serving.model import TextTooLong
from embedding_server.serving.registry import Registry
from embedding_server.serving.schedule import Lane

T = TypeVar("T")

_MAX_PROMPT_CHARS = 10_000

ONE_VECTOR = (Kind.DENSE, Kind.STATIC)
"""Kinds that make one dense vector of a text."""

Prompted = Callable[[ModelSpec], Sequence[Text]]
"""The texts of a request, as its model wants them; what it wants its files say."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say beside its texts.

    `dimensions` cuts vectors before they are normalised; `truncate` False makes a text over the
    model's limit an error; `input_type` picks the model's own prompt, `prompt` replaces it;
    `timeout` is in seconds. `client` is who it is: clients take turns.
    """

    dimensions: int | None = None
    normalize: bool = True
    truncate: bool = True
    input_type: str | None = None
    prompt: str | None = None
    timeout: float | None = None
    client: str = ""


_SERVED_BY = {
    Kind.DENSE: "POST /api/embed serves it",
    Kind.STATIC: "POST /api/embed serves it",
    Kind.MULTI: 'POST /api/embed serves it, with "output": "tokens"',
    Kind.SPARSE: "POST /api/embed/sparse serves it",
    Kind.IMAGE: "POST /api/embed/image serves it",
    Kind.CROSS: "POST /api/rerank serves it",
}
"""What to do instead, for a request to a model of another kind than it asked for."""


class _Raw(msgspec.Struct, frozen=True):
    """What a model made of a request, and the model as its files describe it."""

    vectors: list[Vector]
    spec: ModelSpec
    usage: Usage


class Stages:
    """Where the time of a request went, for whoever asks why it took so long."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self.enter("waiting for the model to load")

    def enter(self, stage: str) -> None:
        """The next stage begins."""
        self._spent[stage] = time.perf_counter()

    def __str__(self) -> str:
        starts = [*self._spent.values(), time.perf_counter()]
        seconds = [end - start for start, end in itertools.pairwise(starts)]
        return ", ".join(
            f"{1000 * spent:.0f} ms {stage}"
            for stage, spent in zip(self._spent, seconds, strict=True)
        )


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

    async def embed(
        self,
        name: str,
        texts: Sequence[str] | Sequence[bytes],
        options: Options,
        kinds: Sequence[Kind] = ONE_VECTOR,
    ) -> Embeddings:
        """What a model of one of these kinds makes of each text or image file.

        Raises:
            UnsupportedModel, BadRequest: the request is wrong.
            ServiceUnavailable, ModelLoadError, DeadlineExceeded: it came at a bad time.
            EmbeddingError: the model failed on it.
        """
        with self._observed(Task.EMBED, name, len(texts)) as spec:
            _check_prompt(options.prompt)
            self._check_lengths(texts, _text_name)

            def prompted(model: ModelSpec) -> list[Text]:
                _check_model(model, texts, options, kinds)
                return _prompted(model, texts, options)

            if not spec.unidentified:
                _check_model(spec, texts, options, kinds)
            try:
                raw = await self._run(spec, prompted, options)
            except TextTooLong as exc:
                raise _too_long(_text_name(exc.index), exc.limit) from exc
            except InputError as exc:
                raise BadRequest(f"image {exc.index} {exc}") from exc
            except RunError as exc:
                raise EmbeddingError(str(exc)) from exc
            kind = raw.spec.kind
            finish = partial(
                finished,
                kind,
                raw.vectors,
                dimensions=options.dimensions,
                normalize=options.normalize,
            )
            vectors = await _off_loop(kind, finish)
            width = 0 if kind is Kind.SPARSE else options.dimensions or raw.spec.dimensions
            return Embeddings(vectors, width, raw.usage)

    async def rerank(
        self, name: str, query: str, documents: Sequence[str], top: int | None, options: Options
    ) -> Ranking:
        """The `top` best documents for `query`, by the score that suits the model's kind.

        Raises:
            RerankError: the model failed; the others as in `embed`.
        """
        with self._observed(Task.RERANK, name, len(documents)) as spec:
            if top is not None and top < 1:
                raise BadRequest(f"top_k and top_n must be at least 1, got {top}")
            self._check_lengths([query, *documents], _rerank_name)
            pairs = False

            def prompted(model: ModelSpec) -> list[Text]:
                nonlocal pairs
                pairs = model.kind is Kind.CROSS
                if pairs:
                    return [(query, text) for text in documents]
                prompts = model.prompts
                given = [prompts.get("document", "") + text for text in documents]
                return [Query(prompts.get("query", "") + query), *given] if given else []

            try:
                raw = await self._run(spec, prompted, options)
            except TextTooLong as exc:
                which = f"the query with document {exc.index}" if pairs else _rerank_name(exc.index)
                raise _too_long(which, exc.limit) from exc
            except RunError as exc:
                raise RerankError(str(exc)) from exc
            kind = raw.spec.kind
            found = await _off_loop(kind, partial(scores, kind, raw.vectors))
            order = np.argsort(-found, kind="stable")[:top].tolist()
            return Ranking(order, [float(found[index]) for index in order], raw.usage)

    async def _run(self, spec: ModelSpec, texts: Prompted, options: Options) -> _Raw:
        """Raw vectors within the client's deadline."""
        if self.queue.draining:
            raise self.queue.refusal("draining", "the server is shutting down")
        stages = Stages()
        if options.timeout is None:
            return await self._embed(spec, texts, options, stages)
        try:
            async with asyncio.timeout(options.timeout):
                return await self._embed(spec, texts, options, stages)
        except TimeoutError as exc:
            self.metrics.expired.inc()
            raise DeadlineExceeded(f"not done within {options.timeout:g} s: {stages}") from exc

    async def _embed(
        self, spec: ModelSpec, prompted: Prompted, options: Options, stages: Stages
    ) -> _Raw:
        with await self.registry.lease(spec) as model:
            texts = prompted(model.spec)
            if not texts:
                return _Raw([], model.spec, Usage(fingerprint=model.fingerprint))
            stages.enter("waiting for admission")
            work, lane = model.estimate(texts), Lane.of(len(texts))
            with await self.queue.permit(work, lane, options.client) as permit:
                stages.enter("tokenising")
                encodings = await model.tokenize(texts, truncate=options.truncate)
                lengths = [len(one.item) for one in encodings]
                permit.correct(model.batcher.work(lengths))
                if model.batcher.ceiling.holds_back(max(lengths)):
                    message = f"{max(lengths)} tokens do not fit into the GPU's memory now"
                    raise self.queue.refusal("gpu_memory", message)
                stages.enter("in the model's queue and runs")
                items = [one.item for one in encodings]
                vectors = await model.batcher.embed(items, options.client)
            if model.spec.uncut:
                vectors = [one[..., : model.spec.dimensions] for one in vectors]
            usage = Usage(
                fingerprint=model.fingerprint,
                tokens=sum(lengths),
                truncated=sum(one.truncated for one in encodings),
                waited=permit.waited,
                predicted=permit.predicted_wait,
            )
            return _Raw(vectors, model.spec, usage)

    def _check_lengths(self, texts: Sequence[str | bytes], name: Callable[[int], str]) -> None:
        limit = self._max_text_chars
        for index, text in enumerate(texts if limit else ()):
            if isinstance(text, str) and len(text) > limit:
                size = f"{len(text)} characters, the limit is {limit}"
                raise BadRequest(f"{name(index)} has {size}")

    @contextmanager
    def _observed(self, task: Task, name: str, items: int) -> Iterator[ModelSpec]:
        """Resolve the model and count the request under its id and outcome."""
        started, label, status = time.perf_counter(), OTHER_MODEL, "error"
        try:
            label = self.catalog.resolve(name, task).id
            spec = self.registry.residents[label].spec
            yield spec
            status = "success"
        finally:
            seconds = time.perf_counter() - started
            self.metrics.record_request(task, label, status, items, seconds)


async def _off_loop(kind: Kind, work: Callable[[], T]) -> T:
    """The work's result; that of vectors per token takes too long for the event loop."""
    return await asyncio.to_thread(work) if kind is Kind.MULTI else work()


def _text_name(index: int) -> str:
    return f"text {index}"


def _rerank_name(index: int) -> str:
    """The query is the first of the texts that go through the model."""
    return f"document {index - 1}" if index else "the query"


def _too_long(which: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{which} has more than {limit} tokens: shorten it, or allow truncation with truncate: true"
    )


def _check_model(
    spec: ModelSpec,
    texts: Sequence[str] | Sequence[bytes],
    options: Options,
    kinds: Sequence[Kind],
) -> None:
    if spec.kind not in kinds:
        raise UnsupportedModel(f"Model {spec.id} is {spec.kind}: {_SERVED_BY[spec.kind]}")
    if texts and isinstance(texts[0], bytes) and not spec.takes_images:
        raise UnsupportedModel(f"Model {spec.id} takes texts, no images")
    dimensions = options.dimensions
    if dimensions is not None and not 1 <= dimensions <= spec.dimensions:
        raise BadRequest(f"dimensions must be from 1 to {spec.dimensions}, got {dimensions}")


def _check_prompt(prompt: str | None) -> None:
    if prompt is not None and len(prompt) > _MAX_PROMPT_CHARS:
        raise BadRequest(f"prompt has more than {_MAX_PROMPT_CHARS} characters")


def _prompted(
    spec: ModelSpec, texts: Sequence[str] | Sequence[bytes], options: Options
) -> list[Text]:
    prompt = options.prompt
    if prompt is None:
        prompt = spec.prompts.get(options.input_type or "", "")
    form = Query if options.input_type == "query" else str
    return [form(prompt + text) if isinstance(text, str) else text for text in texts]
