"""What goes wrong with a request's inputs, as its client's error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from embedding_server.errors import (
    MIN_RETRY_SECONDS,
    BadRequest,
    ServiceError,
    ServiceUnavailable,
)
from embedding_server.runtime.encoder import InputError
from embedding_server.runtime.errors import DeviceLostError
from embedding_server.serving.batcher import RunError
from embedding_server.serving.model import TextTooLong


def text_name(index: int) -> str:
    """What a text is called."""
    return f"text {index}"


def image_name(index: int) -> str:
    """What an image is called."""
    return f"image {index}"


@contextmanager
def translated(name: Callable[[int], str], failed: type[ServiceError]) -> Iterator[None]:
    """What goes wrong inside as a client's error; `name` says what input an index stands for."""
    try:
        yield
    except TextTooLong as exc:
        raise _too_long(name(exc.index), exc.limit) from exc
    except InputError as exc:
        raise BadRequest(f"{name(exc.index)} {exc}") from exc
    except DeviceLostError as exc:
        text = "a GPU is lost, the server ends"
        raise ServiceUnavailable(text, reason="draining", retry_after=MIN_RETRY_SECONDS) from exc
    except RunError as exc:
        raise failed(str(exc)) from exc


def _too_long(which: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{which} has more than {limit} tokens: shorten it, or allow truncation with truncate: true"
    )
