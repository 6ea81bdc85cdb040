"""Every failure a client or an operator can see, as one tree.

StartupError                  the process cannot start: one line on stderr, then exit
├── SettingsError             a setting is wrong (exit 2)
└── ProviderError             a provider that was asked for by name is missing (exit 2)
ServiceError                  answered to a client as {"error", "code", "request_id"}
├── BadRequest                400  wrong shape, or a limit exceeded
├── UnsupportedModel          400  model not allowed, or of another task
├── Unauthorized              401  no key, or a wrong one
├── NotFound                  404  no such route
├── MethodNotAllowed          405
├── RequestTimeout            408  the request did not arrive in time
├── PayloadTooLarge           413  body over the limit, decompressed size counted
├── UriTooLong                414
├── UnsupportedMediaType      415  neither JSON nor a known content encoding
├── RateLimited               429  the client is over its own limit
├── HeadersTooLarge           431  too many, or too long
├── Unavailable               (reason, retry_after)
│   ├── ServiceUnavailable    503  admission refused the request
│   └── ModelLoadError        503  the model is loading, or failed to
├── EmbeddingError            500
├── RerankError               500
├── InternalError             500  a defect of ours
└── DeadlineExceeded          504  the client's own deadline passed
"""

from typing import ClassVar

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0


class StartupError(Exception):
    """The process cannot start; the message is the one line the operator sees."""

    exit_code: ClassVar[int] = 1


class SettingsError(StartupError):
    """A setting is missing or out of bounds."""

    exit_code = 2


class ProviderError(StartupError):
    """A provider that was asked for by name cannot be used; the message says what is missing."""

    exit_code = 2


class ServiceError(Exception):
    """A failure with an answer of its own; the message says what is wrong and what to do."""

    code: ClassVar[str]
    status: ClassVar[int]
    prefix: ClassVar[str]
    retry_after: float | None = None
    """Seconds after which another try makes sense; None where it does not."""

    @property
    def text(self) -> str:
        """The client's text: the code's fixed prefix and the message."""
        return f"{self.prefix}: {self}"


class BadRequest(ServiceError):
    """The request has the wrong shape or exceeds a limit."""

    code, status, prefix = "BAD_REQUEST", 400, "Bad request"


class UnsupportedModel(ServiceError):
    """The model is not allowed here, or cannot do what is asked of it."""

    code, status, prefix = "UNSUPPORTED_MODEL", 400, "Unsupported model"


class Unauthorized(ServiceError):
    """The server wants a key, and the request has none that it accepts."""

    code, status, prefix = "UNAUTHORIZED", 401, "Unauthorized"


class NotFound(ServiceError):
    """No route has this path."""

    code, status, prefix = "NOT_FOUND", 404, "Not found"


class MethodNotAllowed(ServiceError):
    """The path exists, the method does not; `allow` names those that do."""

    code, status, prefix = "METHOD_NOT_ALLOWED", 405, "Method not allowed"

    def __init__(self, message: str = "", *, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeout(ServiceError):
    """The request, or a part of it, did not arrive in time."""

    code, status, prefix = "REQUEST_TIMEOUT", 408, "Request timeout"


class PayloadTooLarge(ServiceError):
    """The body is over `INFERENCE_MAX_BODY_BYTES`, before or after decompression."""

    code, status, prefix = "PAYLOAD_TOO_LARGE", 413, "Payload too large"


class UriTooLong(ServiceError):
    """The address is longer than any that means something here."""

    code, status, prefix = "URI_TOO_LONG", 414, "URI too long"


class UnsupportedMediaType(ServiceError):
    """The body is neither JSON nor in a known content encoding."""

    code, status, prefix = "UNSUPPORTED_MEDIA_TYPE", 415, "Unsupported media type"


class RateLimited(ServiceError):
    """A client is over its own limit; `retry_after` is in seconds, 1 to 60."""

    code, status, prefix = "RATE_LIMITED", 429, "Rate limited"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, retry_after))


class HeadersTooLarge(ServiceError):
    """There are more headers, or longer ones, than the server reads."""

    code, status, prefix = "HEADERS_TOO_LARGE", 431, "Request headers too large"


class Unavailable(ServiceError):
    """Nothing is wrong with the request; another try later may succeed.

    Args:
        message: what is wrong and what to do.
        reason: the metric label, a short fixed word.
        retry_after: seconds until another try makes sense; brought to between 1 and 60.
    """

    retry_after: float

    def __init__(self, message: str, *, reason: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, retry_after))


class ServiceUnavailable(Unavailable):
    """Admission refused: the line is full, the wait too long, or the server is draining."""

    code, status, prefix = "SERVICE_UNAVAILABLE", 503, "Service unavailable"


class ModelLoadError(Unavailable):
    """The model is still loading, or its last load failed."""

    code, status, prefix = "MODEL_LOAD_ERROR", 503, "Failed to load model"


class EmbeddingError(ServiceError):
    """The model failed on this input."""

    code, status, prefix = "EMBEDDING_ERROR", 500, "Embedding generation failed"


class RerankError(ServiceError):
    """The model failed on this query and its documents."""

    code, status, prefix = "RERANK_ERROR", 500, "Reranking failed"


class InternalError(ServiceError):
    """A defect of ours; the log has the details, the client does not."""

    code, status, prefix = "INTERNAL_ERROR", 500, "Internal error"


class DeadlineExceeded(ServiceError):
    """The deadline that the client set for itself passed."""

    code, status, prefix = "DEADLINE_EXCEEDED", 504, "Deadline exceeded"
