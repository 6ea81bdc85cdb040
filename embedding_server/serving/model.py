"""One resident model: its encoder, its session and its line of texts."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

from embedding_server.core import Encoding, ModelSpec, Precision, Query, Side, Text, Tokens
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.encoder import Encoder, InputError
from embedding_server.runtime.foreign import ForeignIds
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.calibration import Calibration
from embedding_server.serving.cost import Work
from embedding_server.serving.options import Input
from embedding_server.serving.profile import Quality

_SMOOTHING = 0.1
_CHARS_PER_ID = 4
"""What a text sent as token ids is taken to have had."""


class TextTooLong(Exception):
    """A text has more tokens than the model takes; `index` says which one, `limit` how many."""

    def __init__(self, index: int, limit: int) -> None:
        super().__init__(index, limit)
        self.index, self.limit = index, limit


class Model:
    """A loaded model.

    Args:
        spec: what it is.
        encoder: what its session takes of a request's texts.
        batcher: runs them.
        executor: one thread for tokenising larger requests off the event loop.
        fingerprint: see `Source.fingerprint`.
        quality: of a reduced precision, against fp32.
        foreign: reads token ids of clients, where these are not the model's.
        calibration: how large its vectors' numbers get; None for kinds it is not known of.
    """

    def __init__(
        self,
        spec: ModelSpec,
        encoder: Encoder,
        batcher: Batcher,
        executor: Executor,
        metrics: Metrics,
        *,
        fingerprint: str,
        quality: Quality | None,
        foreign: ForeignIds | None = None,
        calibration: Calibration | None,
    ) -> None:
        self.spec = spec
        self.batcher = batcher
        self.fingerprint = fingerprint
        self.quality = quality
        self.calibration = calibration
        self._encoder = encoder
        self._executor = executor
        self._foreign = foreign
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

    @property
    def tokenizer(self) -> Tokenizer | None:
        """See `Encoder`."""
        return self._encoder.tokenizer

    def read(self, inputs: Sequence[Input]) -> Sequence[Input]:
        """The inputs, where the model takes token ids of a foreign vocabulary as texts.

        Raises:
            InputError: an id is not in it.
        """
        if not self._foreign:
            return inputs
        return [
            self._foreign.text(index, one) if isinstance(one, Tokens) else one
            for index, one in enumerate(inputs)
        ]

    async def shorten(self, texts: Sequence[Text], tokens: int) -> list[Text]:
        """The texts, documents cut to so many tokens each; queries stay whole."""
        if self.tokenizer is None:
            return list(texts)
        documents = [text[1] if isinstance(text, tuple) else text for text in texts]
        cut = asyncio.get_running_loop().run_in_executor(
            self._executor, self.tokenizer.shortened, [str(one) for one in documents], tokens
        )
        return [_with_document(text, short) for text, short in zip(texts, await cut, strict=True)]

    def estimate(self, texts: Sequence[Text]) -> Work:
        """What these texts cost, guessed without tokenising them."""
        limit, ratio = self._encoder.max_tokens, self._tokens_per_char
        specials = self._encoder.specials
        return self.batcher.work(
            min(limit, specials + int(chars * ratio)) for chars in _chars(texts)
        )

    async def tokenize(
        self, texts: Sequence[Text], *, truncate: bool, side: Side = "right"
    ) -> list[Encoding]:
        """One encoding per text, in order; what is too long is cut at `side`.

        Raises:
            InputError: one cannot be read.
            TextTooLong: a text is over the limit and `truncate` is off.
        """
        started = time.perf_counter()
        chars = sum(_chars(texts))
        if chars <= self._encoder.quick_chars:
            encodings = self._encoder.encode(texts, side=side)
        else:
            encodings = await self._encode_elsewhere(texts, side)
        seconds = time.perf_counter() - started
        self._metrics.child(self._metrics.tokenize_seconds, self.spec.id).observe(seconds)
        if not any(isinstance(text, Tokens) for text in texts):
            self._learn(chars, encodings)
        if not truncate:
            for index, encoding in enumerate(encodings):
                if encoding.truncated:
                    raise TextTooLong(index, self._encoder.max_tokens)
        return encodings

    async def _encode_elsewhere(self, texts: Sequence[Text], side: Side) -> list[Encoding]:
        """On another thread; images one by one, so that nobody waits for all of them."""
        run = asyncio.get_running_loop().run_in_executor
        encode = partial(self._encoder.encode, side=side)
        if not any(isinstance(text, bytes) for text in texts):
            return await run(self._executor, encode, texts)
        encodings = []
        for index, text in enumerate(texts):
            try:
                encodings += await run(self._executor, encode, [text])
            except InputError as exc:
                raise InputError(index, str(exc)) from exc
        return encodings

    def _learn(self, chars: int, encodings: Sequence[Encoding]) -> None:
        """Follow the texts' tokens per character; cut texts say nothing about it."""
        if chars and not any(encoding.truncated for encoding in encodings):
            specials = self._encoder.specials
            ratio = sum(len(encoding.item) - specials for encoding in encodings) / chars
            self._tokens_per_char += _SMOOTHING * (ratio - self._tokens_per_char)


def _with_document(text: Text, document: str) -> Text:
    if isinstance(text, Query):
        return text
    if isinstance(text, tuple) and not isinstance(text, Tokens):
        return text[0], document
    return document


def _chars(texts: Sequence[Text]) -> list[int]:
    return [_tuple_chars(text) if isinstance(text, tuple) else len(text) for text in texts]


def _tuple_chars(text: tuple[str, str] | Tokens) -> int:
    return _CHARS_PER_ID * len(text) if isinstance(text, Tokens) else sum(map(len, text))
