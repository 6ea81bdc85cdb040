"""One call per task, from a client's model name to vectors or scores.

The order of a request: resolve the model, check sizes, lease the model, wait for a permit,
tokenise, run, finish the vectors. Overload is refused before the first token is made.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
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
    Piece,
    Query,
    Ranking,
    Rows,
    Task,
    Text,
    Tokens,
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
from embedding_server.observability.stages import Call, Stage
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.faults import image_name, text_name, translated
from embedding_server.serving.kinds import finished, relevance, scores
from embedding_server.serving.model import Model
from embedding_server.serving.options import (
    ONE_VECTOR,
    Input,
    Options,
    check_model,
    check_options,
    prompted,
)
from embedding_server.serving.registry import Registry
from embedding_server.serving.schedule import Lane

T = TypeVar("T")

_MOST_READ = 1 << 18
"""Characters or ids of a request that is only tokenised: each gives up to 100 bytes of answer."""
_OPERATIONS = {Task.EMBED: "embeddings", Task.RERANK: "rerank"}
"""What OpenTelemetry calls them; it has no word for the second."""

Prompted = Callable[[Model], Sequence[Text]]
"""The texts of a request, as its model wants them; what it wants its files say."""


class _Raw(msgspec.Struct, frozen=True):
    """What a model made of a request, and the model."""

    vectors: list[Vector]
    model: Model
    usage: Usage


class Engine:
    """What the dialects call.

    Args:
        max_text_chars: longest text; 0 = no limit but the model's.
        defaults: ids of models of requests that name none.
    """

    def __init__(
        self,
        catalog: Catalog,
        registry: Registry,
        queue: AdmissionQueue,
        metrics: Metrics,
        *,
        max_text_chars: int,
        defaults: Sequence[str] = (),
    ) -> None:
        self.catalog = catalog
        self.registry = registry
        self.queue = queue
        self.metrics = metrics
        self._max_text_chars = max_text_chars
        self._defaults = defaults
        self._translated = partial(translated, refusal=queue.refusal)

    async def embed(
        self,
        name: str,
        inputs: Sequence[Input],
        options: Options,
        kinds: Sequence[Kind] = ONE_VECTOR,
    ) -> Embeddings:
        """What a model of one of these kinds makes of each input.

        Raises:
            UnsupportedModel, BadRequest: the request is wrong.
            ServiceUnavailable, ModelLoadError, DeadlineExceeded: it came at a bad time.
            EmbeddingError: the model failed on it.
        """
        with self._observed(Task.EMBED, name, len(inputs)) as (spec, call):
            check_options(options)
            self._check_lengths(inputs, text_name)

            def texts(model: Model) -> list[Text]:
                check_model(model.spec, inputs, options, kinds)
                return prompted(model.spec, model.read(inputs), options)

            if not spec.unidentified:
                check_model(spec, inputs, options, kinds)
            images = any(isinstance(one, bytes) for one in inputs)
            with self._translated(image_name if images else text_name, EmbeddingError):
                raw = await self._run(spec, texts, options, call)
            kind = raw.model.spec.kind
            finish = partial(
                finished,
                kind,
                raw.vectors,
                dimensions=options.dimensions,
                normalize=options.normalize,
            )
            vectors = await _off_loop(kind, finish)
            width = 0 if kind is Kind.SPARSE else options.dimensions or raw.model.spec.dimensions
            calibration = raw.model.calibration
            limit = 0.0
            if calibration:
                limit = calibration.limit(width, normalize=options.normalize)
            return Embeddings(vectors, width, raw.usage, limit)

    async def rerank(
        self, name: str, query: str, documents: Sequence[str], top: int | None, options: Options
    ) -> Ranking:
        """The `top` best documents for `query`, by the score that suits the model's kind.

        Raises:
            RerankError: the model failed; the others as in `embed`.
        """
        with self._observed(Task.RERANK, name, len(documents)) as (spec, call):
            if top is not None and top < 1:
                raise BadRequest(f"top_k and top_n must be at least 1, got {top}")
            found, usage = await self._scored(spec, [query], documents, options, call)
            order = np.argsort(-found, kind="stable")[:top].tolist()
            return Ranking(order, [float(found[index]) for index in order], usage)

    async def score(
        self, name: str, queries: Sequence[str], documents: Sequence[str], options: Options
    ) -> tuple[list[float], Usage]:
        """The score of each document for the only query, or for that at its place.

        Raises as `rerank` does.
        """
        with self._observed(Task.RERANK, name, len(documents)) as (spec, call):
            found, usage = await self._scored(spec, queries, documents, options, call)
            return found.tolist(), usage

    async def _scored(
        self,
        spec: ModelSpec,
        queries: Sequence[str],
        documents: Sequence[str],
        options: Options,
        call: Call,
    ) -> tuple[Rows, Usage]:
        count = len(queries)
        pairs = False

        def name_of(index: int) -> str:
            if pairs:
                return f"the query with document {index}"
            if index < count:
                return f"query {index}" if count > 1 else "the query"
            return f"document {index - count}"

        def texts(model: Model) -> list[Text]:
            nonlocal pairs
            pairs = model.spec.kind is Kind.CROSS
            if pairs:
                asked = queries if count > 1 else itertools.repeat(queries[0])
                return list(zip(asked, documents, strict=False))
            prompts = model.spec.prompts
            asking = [Query(prompts.get("query", "") + text) for text in queries]
            given = [prompts.get("document", "") + text for text in documents]
            return [*asking, *given] if given else []

        self._check_lengths([*queries, *documents], name_of)
        with self._translated(name_of, RerankError):
            raw = await self._run(spec, texts, options, call)
        kind = raw.model.spec.kind
        found = await _off_loop(kind, partial(scores, kind, raw.vectors, count))
        return found if options.raw_scores else relevance(kind, found), raw.usage

    async def pieces(
        self, name: str, texts: Sequence[str], options: Options, *, specials: bool
    ) -> list[list[Piece]]:
        """The tokens of each text, whole, with the special ones around them or not.

        Raises as `embed` does.
        """
        check_options(options)
        self._check_lengths(texts, text_name)

        def read(model: Model) -> list[list[Piece]]:
            whole = [str(one) for one in prompted(model.spec, texts, options)]
            return _tokenizer(model).pieces(whole, specials=specials)

        return await self._read(name, texts, options, read)

    async def detokenize(
        self, name: str, ids: Sequence[Sequence[int]], options: Options, *, skip_specials: bool
    ) -> list[str]:
        """The text of each list of token ids; raises as `embed` does."""

        def read(model: Model) -> list[str]:
            return _tokenizer(model).decode(ids, skip_specials=skip_specials)

        return await self._read(name, [Tokens(row) for row in ids], options, read)

    async def _read(
        self, name: str, texts: Sequence[Text], options: Options, read: Callable[[Model], T]
    ) -> T:
        """What `read` makes of texts with a model's tokenizer, beside the event loop.

        They are admitted as if the model ran them: it is less.
        """
        if (size := sum(map(len, texts))) > _MOST_READ:
            raise BadRequest(f"{size} characters or ids at once, at most {_MOST_READ} are allowed")
        spec = self.described(name)

        async def admitted() -> T:
            with (
                await self.registry.lease(spec) as model,
                self._translated(text_name, EmbeddingError),
            ):
                work, lane = model.estimate(texts), Lane.of(len(texts))
                with await self.queue.permit(work, lane, options.client):
                    return await asyncio.to_thread(read, model)

        return await self._in_time(admitted, options)

    async def load(self, name: str) -> None:
        """Make a model resident; raises `UnsupportedModel` and `ModelLoadError`."""
        spec = self.described(name)
        self.registry.keep(spec)
        with await self.registry.lease(spec):
            pass

    async def unload(self, name: str) -> None:
        """Unload a model; raises `UnsupportedModel` and `ModelLoadError`."""
        await self.registry.unload(self.described(name))

    def described(self, name: str) -> ModelSpec:
        """What is known of a model, whatever its task; raises `UnsupportedModel`."""
        spec = self.catalog.resolve(name, *Task)
        return self.registry.residents[spec.id].spec

    def default(self, task: Task, kinds: Sequence[Kind] = tuple(Kind)) -> str:
        """The model of requests that name none: a default of the settings, or the only one.

        Raises:
            BadRequest: there is none, or there are several.
        """
        allowed = self.catalog.allowed[task]
        for name in self._defaults:
            if name in allowed and self.described(name).kind in kinds:
                return name
        listed = {spec.id for spec in allowed.values()}
        fitting = [name for name in listed if self.described(name).kind in kinds]
        if len(fitting) != 1:
            count = "several models serve" if fitting else "no allowed model serves"
            raise BadRequest(f"{count} this: name one in INFERENCE_DEFAULT_MODEL")
        return fitting[0]

    async def _run(self, spec: ModelSpec, texts: Prompted, options: Options, call: Call) -> _Raw:
        """Raw vectors within the client's deadline."""
        work = partial(self._embed, spec, texts, options, call)
        return await self._in_time(work, options, call)

    async def _in_time(
        self, work: Callable[[], Awaitable[T]], options: Options, call: Call | None = None
    ) -> T:
        """The work's result within the client's deadline; `call` knows where the time went."""
        if self.queue.draining:
            raise self.queue.refusal("draining", "the server is shutting down")
        if options.timeout is None:
            return await work()
        try:
            async with asyncio.timeout(options.timeout):
                return await work()
        except TimeoutError as exc:
            self.metrics.expired.inc()
            spent = f": {call}" if call else ""
            raise DeadlineExceeded(f"not done within {options.timeout:g} s{spent}") from exc

    async def _embed(
        self, spec: ModelSpec, prompted: Prompted, options: Options, call: Call
    ) -> _Raw:
        call.enter(Stage.LOAD)
        call.cold = self.registry.residents[spec.id].model is None
        with await self.registry.lease(spec) as model:
            texts = prompted(model)
            if not texts:
                return _Raw([], model, Usage(fingerprint=model.fingerprint))
            call.enter(Stage.ADMISSION)
            work, lane = model.estimate(texts), Lane.of(len(texts))
            with await self.queue.permit(work, lane, options.client) as permit:
                call.enter(Stage.TOKENIZE)
                tokenizing = time.perf_counter()
                if options.document_tokens:
                    texts = await model.shorten(texts, options.document_tokens)
                encodings = await model.tokenize(
                    texts, truncate=options.truncate, side=options.side
                )
                lengths = [len(one.item) for one in encodings]
                permit.correct(model.batcher.work(lengths))
                if model.batcher.ceiling.holds_back(max(lengths)):
                    message = f"{max(lengths)} tokens do not fit into the GPU's memory now"
                    raise self.queue.refusal("gpu_memory", message)
                call.enter(Stage.RUN)
                call.tokens = sum(lengths)
                running = time.perf_counter()
                items = [one.item for one in encodings]
                vectors = await model.batcher.embed(items, options.client, call)
            if model.spec.uncut:
                vectors = [one[..., : model.spec.dimensions] for one in vectors]
            call.usage = usage = Usage(
                fingerprint=model.fingerprint,
                tokens=call.tokens,
                truncated=sum(one.truncated for one in encodings),
                waited=permit.waited,
                predicted=permit.predicted_wait,
                tokenizing=running - tokenizing,
                running=time.perf_counter() - running,
            )
            if usage.truncated:
                self.metrics.child(self.metrics.truncated, spec.id).inc(usage.truncated)
            return _Raw(vectors, model, usage)

    def _check_lengths(self, texts: Sequence[Input], name: Callable[[int], str]) -> None:
        limit = self._max_text_chars
        for index, text in enumerate(texts if limit else ()):
            if not isinstance(text, bytes) and len(text) > limit:
                what = "characters" if isinstance(text, str) else "token ids"
                raise BadRequest(f"{name(index)} has {len(text)} {what}, the limit is {limit}")

    @contextmanager
    def _observed(self, task: Task, name: str, items: int) -> Iterator[tuple[ModelSpec, Call]]:
        """Resolve the model and count the request under its id and outcome."""
        call, status = Call(_OPERATIONS[task], items), "error"
        try:
            call.model = self.catalog.resolve(name, task).id
            yield self.registry.residents[call.model].spec, call
            status = "success"
        except BaseException as exc:
            call.end(exc)
            raise
        else:
            call.end(None)
        finally:
            seconds, label = call.ended - call.began, call.model or OTHER_MODEL
            self.metrics.record_request(task, label, status, items, seconds)


async def _off_loop(kind: Kind, work: Callable[[], T]) -> T:
    """The work's result; that of vectors per token takes too long for the event loop."""
    return await asyncio.to_thread(work) if kind is Kind.MULTI else work()


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise UnsupportedModel(f"Model {model.spec.id} has no tokenizer")
    return model.tokenizer
