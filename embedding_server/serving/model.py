"""One resident model: its tokenizer, its session and its line of texts."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from embedding_server.core import Embeddings, Encoding, ModelSpec, Precision
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.cost import Shape
from embedding_server.serving.profile import Quality

_INLINE_CHARS = 2_000
"""Up to here tokenising on the event loop (about 0.3 ms) costs less than a change of threads."""
_SMOOTHING = 0.1


class TextTooLong(Exception):
    """A text has more tokens than the model takes; `index` says which one."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Model:
    """A loaded model.

    Args:
        spec: what it is.
        tokenizer: cuts texts to the spec's limit.
        batcher: runs them.
        executor: one thread for tokenising larger requests off the event loop.
        fingerprint: names weights, tokenizer, pooling, precision, provider and runtime version.
        quality: of a reduced precision, against fp32.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        batcher: Batcher,
        executor: Executor,
        metrics: Metrics,
        *,
        fingerprint: str,
        quality: Quality | None,
    ) -> None:
        self.spec = spec
        self.batcher = batcher
        self.fingerprint = fingerprint
        self.quality = quality
        self._tokenizer = tokenizer
        self._executor = executor
        self._metrics = metrics
        self._tokens_per_char = 0.25

    def __repr__(self) -> str:
        return f"Model({self.spec.id!r}, {self.batcher!r})"

    @property
    def precision(self) -> Precision:
        """What the model computes in."""
        return self.batcher.session.precision

    @property
    def resident_bytes(self) -> int:
        """Size of graphs and weights."""
        return self.batcher.resident_bytes

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self.batcher.session.provider

    def estimate(self, texts: Sequence[str]) -> float:
        """Seconds of one core for these texts, guessed without tokenising them."""
        limit, ratio = self.spec.max_tokens, self._tokens_per_char
        lengths = [min(limit, self._tokenizer.specials + int(len(text) * ratio)) for text in texts]
        return self.batcher.cost.seconds(Shape.of(lengths)) * self.batcher.threads

    @property
    def nothing(self) -> Embeddings:
        """The answer for no texts."""
        rows = np.empty((0, self.spec.dimensions), np.float32)
        return Embeddings(rows=rows, fingerprint=self.fingerprint, tokens=0, truncated=0)

    async def embed(self, texts: Sequence[str], *, truncate: bool) -> Embeddings:
        """Raw vectors, pooled and not normalised.

        Raises:
            TextTooLong: a text is over the limit and `truncate` is off.
            serving.batcher.RunError: the model failed.
        """
        encodings = await self._tokenize(texts)
        cut = [index for index, encoding in enumerate(encodings) if encoding.truncated]
        if cut and not truncate:
            raise TextTooLong(cut[0])
        return Embeddings(
            rows=await self.batcher.embed([encoding.ids for encoding in encodings]),
            fingerprint=self.fingerprint,
            tokens=sum(len(encoding.ids) for encoding in encodings),
            truncated=len(cut),
        )

    async def _tokenize(self, texts: Sequence[str]) -> list[Encoding]:
        started = time.perf_counter()
        chars = sum(map(len, texts))
        if chars <= _INLINE_CHARS:
            encodings = self._tokenizer.encode(texts)
        else:
            loop = asyncio.get_running_loop()
            encodings = await loop.run_in_executor(self._executor, self._tokenizer.encode, texts)
        seconds = time.perf_counter() - started
        self._metrics.child(self._metrics.tokenize_seconds, self.spec.id).observe(seconds)
        self._learn(chars, encodings)
        return encodings

    def _learn(self, chars: int, encodings: Sequence[Encoding]) -> None:
        """Follow the texts' tokens per character; cut texts say nothing about it."""
        if chars and not any(encoding.truncated for encoding in encodings):
            ratio = (
                sum(len(encoding.ids) - self._tokenizer.specials for encoding in encodings) / chars
            )
            self._tokens_per_char += _SMOOTHING * (ratio - self._tokens_per_char)
