"""Every instrument, declared once. The contract fixes the names of those it lists.

Labels are bounded: `model` takes names of the allow-list (`other` otherwise), `endpoint` takes
route templates, `reason` takes the words of `ServiceUnavailable`.
"""

from collections.abc import Callable
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

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The process's instruments, in a registry of their own."""

    def __init__(self, service_name: str) -> None:
        self.registry = CollectorRegistry()
        self._children: dict[tuple[Any, ...], Any] = {}
        ProcessCollector(registry=self.registry)
        Info("target", "The service that is scraped", registry=self.registry).info(
            {"service_name": service_name, "service_version": __version__}
        )
        self._declare_requests()
        self._declare_admission()
        self._declare_runs()
        self._declare_models()
        self._declare_gpus()

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

    def _declare_admission(self) -> None:
        counter, gauge = self._counter, self._gauge
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "Wait for admission; requests refused at once are not counted"
        )
        self.queue_wait_ratio = self._histogram(
            "queue_wait_ratio", "Wait in line by what was predicted for it", buckets=RATIOS
        )
        self.queue_depth = gauge("queue_depth", "Requests waiting for admission")
        self.queued_bytes = gauge("queued_bytes", "Bytes of request bodies that are held")
        self.admitted_requests = gauge("admitted_requests", "Requests admitted and not done")
        self.admitted_work = gauge("admitted_work_seconds", "Admitted work, as seconds of one core")
        self.rejections = counter("rejections", "Requests refused with 503", "reason")
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
            "padded_tokens", "Tokens run, each text counted as long as its batch's longest", "model"
        )
        self.slot_restarts = counter("slot_restarts", "Run slots whose thread was replaced")
        self.run_failures = counter("run_failures", "Model runs that failed", "model")
        self.run_fallbacks = counter(
            "run_fallbacks", "Texts run again in fp32: their vector was not finite", "model"
        )

        self.out_of_memory = counter(
            "run_out_of_memory", "Model runs that memory did not suffice for", "model"
        )

    def _declare_models(self) -> None:
        gauge = self._gauge
        self.model_ready = gauge("model_ready", "1 while the model serves", "model")
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
            return Gauge(f"gpu_{name}", text, ("device",), registry=self.registry)

        self.gpu_used = gauge("memory_used_bytes", "GPU memory in use, by whomever")
        self.gpu_total = gauge("memory_total_bytes", "GPU memory")
        self.gpu_percent = gauge("memory_utilization_percent", "GPU memory in use, of all")
        self.gpu_busy = gauge("utilization_percent", "Time in which the GPU computed, lately")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"inference_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"inference_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(f"inference_{name}", text, labels, registry=self.registry, buckets=buckets)

    def child(self, instrument: Instrument, *labels: str) -> Instrument:
        """`instrument.labels(*labels)`, remembered: for what every request or run records."""
        key = (instrument, *labels)
        child: Instrument | None = self._children.get(key)
        if child is None:
            child = self._children[key] = instrument.labels(*labels)
        return child

    def record_request(
        self, task: Task, model: str, status: str, items: int, seconds: float
    ) -> None:
        """Count one embed or rerank request; `items` are texts or documents."""
        if task is Task.RERANK:
            self.child(self.rerank_requests, model, status).inc()
            self.child(self.rerank_seconds, model, status).observe(seconds)
            self.child(self.rerank_documents, model).inc(items if status == "success" else 0)
            return
        self.child(self.embed_requests, model, status).inc()
        self.child(self.embed_seconds, model, status).observe(seconds)
        self.child(self.embed_items, model).inc(items if status == "success" else 0)
        if items:
            self.child(self.embed_item_seconds, model, status).observe(seconds / items)

    def record_run(self, model: str, texts: int, longest: int, tokens: int, seconds: float) -> None:
        """Count one model run; `longest` is tokens of its longest text, `tokens` of all."""
        self.child(self.run_seconds, model).observe(seconds)
        self.child(self.batch_texts, model).observe(texts)
        self.child(self.batch_tokens, model).observe(tokens)
        self.child(self.tokens, model).inc(tokens)
        self.child(self.padded_tokens, model).inc(texts * longest)

    def record_memory(self, device: str, used: int, total: int, busy: float | None) -> None:
        """Show a GPU's memory in bytes, and the percent of time it is busy where that is known."""
        self.gpu_used.labels(device).set(used)
        self.gpu_total.labels(device).set(total)
        self.gpu_percent.labels(device).set(100 * used / total)
        if busy is not None:
            self.gpu_busy.labels(device).set(busy)

    def record_http(self, endpoint: str, method: str, status: str, seconds: float) -> None:
        """Count one HTTP request."""
        self.child(self.http_requests, endpoint, method, status).inc()
        self.child(self.http_seconds, endpoint, method, status).observe(seconds)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it."""
        encode: Callable[[CollectorRegistry], bytes]
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def total(self, counter: Counter) -> int:
        """The sum of a counter over all its labels."""
        samples: list[Any] = [sample for family in counter.collect() for sample in family.samples]
        return int(sum(sample.value for sample in samples))
