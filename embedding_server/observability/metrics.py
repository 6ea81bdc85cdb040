"""Every instrument, declared once. The contract fixes the names of those it lists.

Labels are bounded: `model` takes names of the allow-list (`other` otherwise), `endpoint` takes
route templates, `reason` takes `REASONS`, `key` takes names of the settings' keys.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from embedding_server import __version__
from embedding_server.core import Task
from embedding_server.observability.stages import current_exemplar

SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1, 2.5, 5, 10, 30, 60, 120, 300,
)  # fmt: skip
TEXTS = tuple(2**power for power in range(11))
RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
TOKENS = tuple(2**power for power in range(4, 18))

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)

OTHER_MODEL = "other"
"""Label of models that are not allowed."""

REASONS = (
    "busy", "connections", "draining", "gpu_memory", "load_failed", "loading", "no_room",
    "queue_full", "queue_timeout", "queued_bytes", "request_timeout", "wait_too_long",
)  # fmt: skip
"""Why a request may get a 503."""

_UNITS = ("seconds", "bytes", "ratio", "percent", "tokens", "texts")
"""Last words of names that OpenMetrics is told of as units."""

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The process's instruments, in a registry of their own."""

    def __init__(self, service_name: str) -> None:
        self.registry = CollectorRegistry()
        self._children: dict[tuple[Any, ...], Any] = {}
        self._sets: dict[tuple[Any, ...], list[Any]] = {}
        ProcessCollector(registry=self.registry)
        Info("target", "The service that is scraped", registry=self.registry).info(
            {"service_name": service_name, "service_version": __version__}
        )
        self._declare_requests()
        self._declare_admission()
        self._declare_runs()
        self._declare_models()
        self._declare_gpus()
        self._declare_process()

    def _declare_requests(self) -> None:
        counter, histogram = self._counter, self._histogram
        outcome = ("model", "status")
        self.embed_requests = counter("embed_requests", "Embed requests", *outcome)
        self.embed_items = counter("embed_items", "Texts embedded", "model")
        self.embed_seconds = histogram("embed_duration_seconds", "Embed request, whole", *outcome)
        self.embed_item_seconds = histogram(
            "embed_per_item_duration_seconds", "Embed request, divided by its texts", *outcome
        )
        self.rerank_requests = counter("rerank_requests", "Rerank requests", *outcome)
        self.rerank_documents = counter("rerank_documents", "Documents reranked", "model")
        self.rerank_seconds = histogram(
            "rerank_duration_seconds", "Rerank request, whole", *outcome
        )
        route = ("endpoint", "method", "status")
        self.http_requests = counter("http_requests", "HTTP requests", *route)
        self.http_seconds = histogram(
            "http_requests_duration_seconds", "HTTP request, first byte in to last byte out", *route
        )
        self.key_requests = counter(
            "requests_by_key", "HTTP requests by the name of their API key", "key", "status"
        )
        self.key_tokens = counter(
            "tokens_by_key", "Real tokens of requests by the name of their API key", "key"
        )
        self.truncated = counter("truncated_texts", "Texts that were cut to fit", "model")

    def _declare_admission(self) -> None:
        counter, gauge = self._counter, self._gauge
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "Wait for admission; requests refused at once are not counted"
        )
        self.queue_wait_ratio = self._histogram(
            "queue_wait_ratio", "Wait in line by what was predicted for it", buckets=RATIOS
        )
        self.queue_depth = gauge("queue_depth", "Requests waiting for admission")
        self.queue_capacity = gauge("queue_capacity", "Requests that may wait for admission")
        self.estimated_wait = gauge(
            "queue_estimated_wait_seconds", "Wait that a typical bulk request would have now"
        )
        self.queued_bytes = gauge("queued_bytes", "Bytes of request bodies that are held")
        self.admitted_requests = gauge("admitted_requests", "Requests admitted and not done")
        self.admitted_work = gauge("admitted_work_seconds", "Admitted work, as seconds of one core")
        self.rejections = counter("rejections", "Requests refused with 503", "reason")
        for reason in REASONS:  # a counter that appears with its first event hides that event
            self.rejections.labels(reason)
        self.cancelled = counter(
            "cancelled_requests", "Requests whose client left before the answer"
        )
        self.expired = counter("expired_requests", "Requests that passed their own deadline")

    def _declare_runs(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.tokenize_seconds = histogram(
            "tokenize_seconds", "Tokenising the texts of one request", "model"
        )
        self.run_seconds = histogram("run_seconds", "One model run", "model")
        self.batch_texts = histogram("batch_texts", "Texts per model run", "model", buckets=TEXTS)
        self.batch_tokens = histogram(
            "batch_tokens", "Tokens per model run", "model", buckets=TOKENS
        )
        self.tokens = counter("tokens", "Real tokens run", "model")
        self.padded_tokens = counter(
            "padded_tokens", "Tokens computed, padding and all, where the graph pads", "model"
        )
        self.queued_texts = self._gauge("queued_texts", "Texts that wait for a model run", "model")
        self.running = self._gauge("running_batches", "Model runs in progress")
        self.slots = self._gauge("run_slots", "Threads that model runs may take at once")
        self.slot_restarts = counter("slot_restarts", "Run slots whose thread was replaced")
        self.run_failures = counter("run_failures", "Model runs that failed", "model")
        self.run_retries = counter(
            "run_retries", "Model runs that repeat a failed one, or a part of it", "model"
        )
        self.run_fallbacks = counter(
            "run_fallbacks", "Texts run again in fp32: their vector was not finite", "model"
        )
        self.out_of_memory = counter(
            "run_out_of_memory", "Model runs that memory did not suffice for", "model"
        )

    def _declare_models(self) -> None:
        gauge = self._gauge
        self.model_ready = gauge("model_ready", "1 while the model serves", "model")
        self.model_state = gauge(
            "model_state", "1 for the state that the model is in", "model", "state"
        )
        self.model_pinned = gauge("model_pinned", "1 where the model is to stay loaded", "model")
        self.model_info = gauge(
            "model_info", "1, how a loaded model really runs", "model", "provider", "precision"
        )
        self.load_failures = self._counter("model_load_failures", "Loads that failed", "model")
        self.evictions = self._counter(
            "model_evictions",
            "Models unloaded: for room, or because they were idle",
            "model",
            "reason",
        )
        self.model_load_seconds = gauge("model_load_seconds", "Length of the last load", "model")
        self.model_bytes = gauge("model_resident_bytes", "Graph and weights", "model")

    def _declare_gpus(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"gpu_{name}", text, ("device",), unit=_unit(name), registry=self.registry)

        self.gpu_used = gauge("memory_used_bytes", "GPU memory in use, by whomever")
        self.gpu_total = gauge("memory_total_bytes", "GPU memory")
        self.gpu_percent = gauge("memory_utilization_percent", "GPU memory in use, of all")
        self.gpu_busy = gauge("utilization_percent", "Time in which the GPU computed, lately")
        self.memory_tight = self._gauge(
            "gpu_memory_tight", "1 while GPU memory is so full that no batch may need more"
        )

    def _declare_process(self) -> None:
        gauge = self._gauge
        self.ready = gauge("ready", "1 while readiness answers 200")
        self.draining = gauge("draining", "1 while the server shuts down")
        self.tasks = gauge("event_loop_tasks", "Tasks on the event loop: requests' and our own")
        self.certificate = gauge(
            "certificate_expiry_timestamp_seconds",
            "When the TLS certificate's file expires, since 1970; 0 without TLS",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"inference_{name}", text, labels, unit=_unit(name), registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"inference_{name}", text, labels, unit=_unit(name), registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(
            f"inference_{name}",
            text,
            labels,
            unit=_unit(name),
            registry=self.registry,
            buckets=buckets,
        )

    def child(self, instrument: Instrument, *labels: str) -> Instrument:
        """`instrument.labels(*labels)`, remembered: for what every request or run records."""
        key = (instrument, *labels)
        child: Instrument | None = self._children.get(key)
        if child is None:
            child = self._children[key] = instrument.labels(*labels)
        return child

    def _set(self, labels: tuple[str, ...], *instruments: Any) -> list[Any]:
        """`child` of several instruments at once: one look-up instead of one each."""
        key = (labels, instruments)
        found = self._sets.get(key)
        if found is None:
            found = self._sets[key] = [one.labels(*labels) for one in instruments]
        return found

    def declare_model(self, model: str) -> None:
        """Show what is counted of a model's loads and runs as 0, before any of it happens."""
        for one in (
            self.load_failures,
            self.run_failures,
            self.run_retries,
            self.run_fallbacks,
            self.out_of_memory,
        ):
            one.labels(model)

    def record_request(
        self, task: Task, model: str, status: str, items: int, seconds: float
    ) -> None:
        """Count one embed or rerank request; `items` are texts or documents."""
        outcome = (model, status)
        if task is Task.RERANK:
            requests, took = self._set(outcome, self.rerank_requests, self.rerank_seconds)
            counted = self.rerank_documents
        else:
            requests, took, took_each = self._set(
                outcome, self.embed_requests, self.embed_seconds, self.embed_item_seconds
            )
            counted = self.embed_items
            if items:
                took_each.observe(seconds / items)
        requests.inc()
        took.observe(seconds, current_exemplar())
        self.child(counted, model).inc(items if status == "success" else 0)

    def record_run(
        self,
        model: str,
        *,
        texts: int,
        tokens: int,
        computed: int,
        seconds: float,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """Count one model run of so many real `tokens`, with padding `computed`.

        `exemplar` is that of a request that it served: see `Trace`.
        """
        took, of_texts, of_tokens, real, padded = self._set(
            (model,),
            self.run_seconds,
            self.batch_texts,
            self.batch_tokens,
            self.tokens,
            self.padded_tokens,
        )
        took.observe(seconds, exemplar)
        of_texts.observe(texts)
        of_tokens.observe(tokens)
        real.inc(tokens)
        padded.inc(computed)

    def record_memory(self, device: str, used: int, total: int, busy: float | None) -> None:
        """Show a GPU's memory in bytes, and the percent of time it is busy where that is known."""
        self.gpu_used.labels(device).set(used)
        self.gpu_total.labels(device).set(total)
        self.gpu_percent.labels(device).set(100 * used / total)
        if busy is not None:
            self.gpu_busy.labels(device).set(busy)

    def record_http(
        self,
        endpoint: str,
        method: str,
        status: str,
        seconds: float,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """Count one HTTP request; `exemplar`: see `Trace`."""
        requests, took = self._set(
            (endpoint, method, status), self.http_requests, self.http_seconds
        )
        requests.inc()
        took.observe(seconds, exemplar)

    def record_key(self, key: str, status: str, tokens: int) -> None:
        """Count one HTTP request of an API key, by its name."""
        self.child(self.key_requests, key, status).inc()
        self.child(self.key_tokens, key).inc(tokens)

    def show_state(self, model: str, states: Iterable[str], current: Callable[[], str]) -> None:
        """Show from now on which of these states a model is in."""
        for state in states:
            gauge = self.model_state.labels(model, state)
            gauge.set_function(lambda state=state: float(current() == state))  # type: ignore[misc]

    def show_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Show from now on how many tasks an event loop has."""
        self.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it."""
        encode: Callable[[CollectorRegistry], bytes]
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def total(self, counter: Counter) -> int:
        """The sum of a counter over all its labels."""
        samples: list[Any] = [sample for family in counter.collect() for sample in family.samples]
        return int(sum(sample.value for sample in samples))


def _unit(name: str) -> str:
    last = name.rpartition("_")[2]
    return last if last in _UNITS else ""
