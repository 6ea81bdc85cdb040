"""What goes wrong with a request's inputs, as its client's error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from embedding_server.errors import BadRequest, ServiceError, ServiceUnavailable
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
def translated(
    name: Callable[[int], str],
    failed: type[ServiceError],
    refusal: Callable[[str, str], ServiceUnavailable],
) -> Iterator[None]:
    """What goes wrong inside as a client's error.

    Args:
        name: says what input an index stands for.
        failed: the error where the model fails.
        refusal: makes that for requests which another server may answer, of a reason and a text.
    """
    try:
        yield
    except TextTooLong as exc:
        raise _too_long(name(exc.index), exc.limit) from exc
    except InputError as exc:
        raise BadRequest(f"{name(exc.index)} {exc}") from exc
    except DeviceLostError as exc:
        raise refusal("draining", "a GPU is lost, the server ends") from exc
    except RunError as exc:
        raise failed(str(exc)) from exc


def _too_long(which: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{which} has more than {limit} tokens: shorten it, or allow truncation with truncate: true"
    )
