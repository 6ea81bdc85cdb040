"""What all of Cohere's answers have: what was used, and the shape of failures."""

import msgspec

from embedding_server.core import Usage
from embedding_server.errors import ServiceError, UnsupportedModel


class Failure(msgspec.Struct):
    """The body of every failure; `id` is the request's."""

    id: str
    message: str


def cohere_error(error: ServiceError, request_id: str) -> tuple[int, Failure]:
    """A failure in Cohere's `Shape`; an unknown model is a 404 there."""
    status = 404 if isinstance(error, UnsupportedModel) else error.status
    return status, Failure(id=request_id, message=error.text)


class ApiVersion(msgspec.Struct):
    """Of Cohere's API."""

    version: str


class Billed(msgspec.Struct, omit_defaults=True):
    """What Cohere would bill."""

    input_tokens: int = 0
    search_units: int = 0


class Consumed(msgspec.Struct):
    """Real tokens, special ones included."""

    input_tokens: int


class AnswerMeta(msgspec.Struct):
    """What an answer says beside its result."""

    api_version: ApiVersion
    billed_units: Billed
    tokens: Consumed


def meta(version: str, usage: Usage, billed: Billed) -> AnswerMeta:
    """That of an answer of this version of the API."""
    return AnswerMeta(ApiVersion(version), billed, Consumed(usage.tokens))
