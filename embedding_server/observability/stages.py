"""Where the time of a request goes: noted on its way, told as spans once it is answered.

A `Trace` is a request, a `Call` what it asked of the engine, a `Batch` a model run that has texts
of traced requests. Nothing here knows OpenTelemetry, and what is not sampled has no ids and makes
no batches. Times are those of `time.perf_counter`.
"""

import asyncio
import itertools
import random
import re
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from enum import StrEnum
from typing import NamedTuple

from embedding_server.core import Precision, Usage
from embedding_server.errors import ServiceError, Unavailable

CANCELLED = "cancelled"
"""What is said of a request, or a part of one, whose client left."""


class Stage(StrEnum):
    """What a call of the engine consists of, in this order."""

    LOAD = "waiting for the model to load"
    ADMISSION = "waiting for admission"
    TOKENIZE = "tokenising"
    RUN = "in the model's queue and runs"


class Batch:
    """One model run.

    `texts` of so many `requests` are in it, `tokens` in all, `longest` in the longest. `members`
    are the traced calls among them, each with the id of the run's span in that call's trace.
    """

    def __init__(
        self,
        calls: Sequence["Call"],
        *,
        model: str,
        provider: str,
        precision: Precision,
        exact: bool,
        requests: int,
        texts: int,
        longest: int,
        tokens: int,
    ) -> None:
        self.model, self.provider, self.precision, self.exact = model, provider, precision, exact
        self.requests, self.texts = requests, texts
        self.longest, self.tokens = longest, tokens
        self.trace_id, self.span_id = random.getrandbits(128), span_id()
        self.began, self.ended = time.perf_counter(), 0.0
        self.error = ""
        self.members = [(call, span_id()) for call in calls]
        for call, own in self.members:
            call.runs.append((self, own))

    def end(self, began: float, seconds: float, error: str) -> None:
        """The run is over; `error` is empty where it did not fail."""
        self.began, self.ended, self.error = began, began + seconds, error
        trace = self.members[0][0].trace
        assert trace
        trace.tell(self)
        self.members = []  # or they would be a cycle


class Call:
    """One call of the engine, as far as it got.

    `cold`: it had to wait for its model to load. `error` is a code or the name of a type, `reason`
    a fixed word; both are empty where nothing went wrong. `tokens`: those that went to be run.
    """

    __slots__ = (
        "began", "cold", "ended", "error", "model", "operation", "reason", "runs", "starts",
        "texts", "tokens", "trace", "usage",
    )  # fmt: skip

    def __init__(self, operation: str, texts: int) -> None:
        self.operation, self.texts = operation, texts
        self.model = self.error = self.reason = ""
        self.began, self.ended = time.perf_counter(), 0.0
        self.starts: dict[Stage, float] = {}
        self.cold = False
        self.tokens = 0
        self.usage: Usage | None = None
        self.runs: list[tuple[Batch, int]] = []
        trace = CURRENT.get()
        self.trace = trace if trace and trace.sampled else None
        if trace:
            trace.calls.append(self)

    def enter(self, stage: Stage) -> None:
        """The next stage begins."""
        self.starts[stage] = time.perf_counter()

    def end(self, error: BaseException | None) -> None:
        """The call is over, as a result of `error` if there is one."""
        self.ended = time.perf_counter()
        if isinstance(error, ServiceError):
            self.error = error.code
            self.reason = error.reason if isinstance(error, Unavailable) else ""
        elif error:
            left = isinstance(error, asyncio.CancelledError)
            self.error = CANCELLED if left else type(error).__name__

    def __str__(self) -> str:
        starts = [*self.starts.values(), time.perf_counter()]
        seconds = [end - start for start, end in itertools.pairwise(starts)]
        return ", ".join(
            f"{1000 * spent:.0f} ms {stage}"
            for stage, spent in zip(self.starts, seconds, strict=True)
        )


def _nobody(_: Batch) -> None:
    raise AssertionError("nothing of this request is told")


class Trace:
    """A request: what it asked of the engine and, where it is sampled, the ids of its span.

    Args:
        began: when it came.
        trace_id: 0: not sampled.
        parent_id: the client's span; 0: there is none.
        tell: is given the batches that end, once each.
    """

    __slots__ = (
        "began", "calls", "encoded", "exemplar", "parent_id", "span_id", "tell", "trace_id",
    )  # fmt: skip

    def __init__(
        self,
        began: float,
        *,
        trace_id: int = 0,
        parent_id: int = 0,
        tell: Callable[[Batch], None] = _nobody,
    ) -> None:
        self.began = began
        self.trace_id, self.parent_id, self.tell = trace_id, parent_id, tell
        self.span_id = span_id() if trace_id else 0
        self.calls: list[Call] = []
        self.encoded = 0.0
        """When the answer was written; 0: not yet, or there is nothing of a model in it."""
        self.exemplar: dict[str, str] | None = None
        """What histograms keep of it: the id of a trace that somebody has, ours or not."""

    @property
    def sampled(self) -> bool:
        """Whether anybody will be told."""
        return self.trace_id != 0


CURRENT: ContextVar[Trace | None] = ContextVar("CURRENT", default=None)
"""The request that is being handled."""


def current_exemplar() -> dict[str, str] | None:
    """That of the request that is being handled."""
    trace = CURRENT.get()
    return trace.exemplar if trace else None


class Parent(NamedTuple):
    """The client's span, ids in lower-case hex."""

    trace_id: str
    span_id: str
    sampled: bool


_TRACEPARENT = re.compile(
    r"(?!ff|00.{53}.)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-"
    r"[0-9a-f]([0-9a-f])(?:-.*)?"
)
"""https://www.w3.org/TR/trace-context/: later versions may go on behind a hyphen."""


def parent_of(traceparent: str) -> Parent | None:
    """What a `traceparent` header says; None where it is empty or wrong."""
    if not (given := _TRACEPARENT.fullmatch(traceparent)):
        return None
    trace_id, span, flags = given.groups()
    return Parent(trace_id, span, bool(int(flags, 16) & 1))


def span_id() -> int:
    """A new one."""
    return random.getrandbits(64) or 1
