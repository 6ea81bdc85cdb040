"""Every instrument, declared once. The contract fixes the names of those it lists.

Labels are bounded: `model` takes names of the allow-list (`other` otherwise), `endpoint` takes
route templates, `reason` takes the words of `ServiceUnavailable`.
"""

from collections.abc import Callable
from typing import Any

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
TOKENS = tuple(2**power for power in range(4, 18))

OTHER_MODEL = "other"
"""Label of models that are not allowed."""

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The process's instruments, in a registry of their own."""

    def __init__(self, service_name: str) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("target", "The service that is scraped", registry=registry).info(
            {"service_name": service_name, "service_version": __version__}
        )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self.embed_requests = counter(
            "inference_embed_requests_total", "Embed requests", "model", "status"
        )
        self.embed_items = counter("inference_embed_items_total", "Texts embedded", "model")
        self.embed_seconds = histogram(
            "inference_embed_duration_seconds", "Embed request, whole", "model", "status"
        )
        self.embed_item_seconds = histogram(
            "inference_embed_per_item_duration_seconds",
            "Embed request, divided by its texts",
            "model",
            "status",
        )
        self.rerank_requests = counter(
            "inference_rerank_requests_total", "Rerank requests", "model", "status"
        )
        self.rerank_documents = counter(
            "inference_rerank_documents_total", "Documents reranked", "model"
        )
        self.rerank_seconds = histogram(
            "inference_rerank_duration_seconds", "Rerank request, whole", "model", "status"
        )
        self.http_requests = counter(
            "inference_http_requests_total", "HTTP requests", "endpoint", "method", "status"
        )
        self.http_seconds = histogram(
            "inference_http_requests_duration_seconds",
            "HTTP request, first byte in to last byte out",
            "endpoint",
            "method",
            "status",
        )

        self.queue_wait = histogram(
            "inference_queue_wait_seconds", "Wait for admission, refused requests included"
        )
        self.queue_depth = gauge("inference_queue_depth", "Requests waiting for admission")
        self.queue_inside = gauge("inference_admitted_requests", "Requests admitted and not done")
        self.work_inside = gauge(
            "inference_admitted_work_tokens", "Admitted work in token equivalents"
        )
        self.rejections = counter(
            "inference_rejections_total", "Requests refused with 503", "reason"
        )
        self.cancelled = counter(
            "inference_cancelled_requests_total", "Requests whose client left before the answer"
        )
        self.expired = counter(
            "inference_expired_requests_total", "Requests that passed their deadline"
        )

        self.tokenize_seconds = histogram(
            "inference_tokenize_seconds", "Tokenising the texts of one request", "model"
        )
        self.run_seconds = histogram("inference_run_seconds", "One model run", "model")
        self.batch_texts = histogram(
            "inference_batch_texts", "Texts per model run", "model", buckets=TEXTS
        )
        self.batch_tokens = histogram(
            "inference_batch_tokens", "Tokens per model run", "model", buckets=TOKENS
        )
        self.tokens = counter("inference_tokens_total", "Real tokens run", "model")
        self.padded_tokens = counter(
            "inference_padded_tokens_total",
            "Tokens run if every text were padded to the longest of its batch",
            "model",
        )
        self.run_failures = counter(
            "inference_run_failures_total", "Model runs that failed", "model"
        )

        self.model_ready = gauge("inference_model_ready", "1 while the model serves", "model")
        self.model_load_seconds = gauge(
            "inference_model_load_seconds", "How long the last load took", "model"
        )
        self.model_bytes = gauge(
            "inference_model_resident_bytes", "Size of the model's graph and weights", "model"
        )

    def record_request(
        self, task: Task, model: str, status: str, items: int, seconds: float
    ) -> None:
        """Count one embed or rerank request; `items` are texts or documents."""
        if task is Task.RERANK:
            self.rerank_requests.labels(model, status).inc()
            self.rerank_seconds.labels(model, status).observe(seconds)
            self.rerank_documents.labels(model).inc(items if status == "success" else 0)
            return
        self.embed_requests.labels(model, status).inc()
        self.embed_seconds.labels(model, status).observe(seconds)
        self.embed_items.labels(model).inc(items if status == "success" else 0)
        if items:
            self.embed_item_seconds.labels(model, status).observe(seconds / items)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it."""
        encode: Callable[[CollectorRegistry], bytes]
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def total(self, counter: Counter) -> int:
        """The sum of a counter over all its labels."""
        samples: list[Any] = [sample for family in counter.collect() for sample in family.samples]
        return int(sum(sample.value for sample in samples))
