"""Image files -> what vision graphs take, prepared by FastEmbed as `preprocessor_config.json` says.

A file of a few kilobytes may unpack to gigabytes, so its size is looked at before its pixels are.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedding_server.catalog.description import ModelFilesError
from embedding_server.core import Encoding, Item, Picture, Side, Text, Tokens
from embedding_server.runtime.encoder import NO_IDS, InputError

_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_STRETCH = 50
"""The shorter side is brought to the model's size, and the longer one with it."""
_PROBE_SIDE = 32


def open_image(index: int, file: bytes, max_pixels: int) -> Image.Image:
    """The image in `file`, read completely.

    Raises:
        InputError: it is no image of a known format, is damaged, or has more pixels than that.
    """
    with _explained(index):
        image = Image.open(io.BytesIO(file), formats=_FORMATS)
        width, height = image.size
        if max(width, height) > _MOST_STRETCH * min(width, height):
            raise InputError(index, f"is {width} x {height}, more than 1:{_MOST_STRETCH}")
        if width * height > max_pixels:
            allowed = f"at most {max_pixels} are allowed"
            raise InputError(index, f"has {width} x {height} pixels, {allowed}")
        image.load()
        return image


@contextmanager
def _explained(index: int) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as exc:  # the library's parsers raise what they like on damaged files
        known = ", ".join(_FORMATS)
        raise InputError(index, f"is no image that can be read, known are {known}") from exc


class ImageEncoder:
    """An `Encoder` of images.

    Args:
        prepare: makes an item of an image.
        max_pixels: width times height of the largest image.
    """

    tokenizer = None
    quick_chars = 0

    def __init__(self, prepare: Callable[[Image.Image], Item], max_pixels: int) -> None:
        self._prepare = prepare
        self._max_pixels = max_pixels
        self.specials = self.max_tokens = len(prepare(Image.new("RGB", (_PROBE_SIDE, _PROBE_SIDE))))

    def encode(
        self,
        texts: Sequence[Text],
        *,
        side: Side = "right",  # noqa: ARG002 - images are not cut
    ) -> list[Encoding]:
        """See `Encoder`."""
        return [self._encode(index, file) for index, file in enumerate(texts)]

    def _encode(self, index: int, file: Text) -> Encoding:
        if isinstance(file, Tokens):
            raise InputError(index, NO_IDS)
        if not isinstance(file, bytes):
            raise InputError(index, "is a text, and the model takes images")
        image = open_image(index, file, self._max_pixels)
        with _explained(index):
            return Encoding(self._prepare(image))


def preparation(directory: Path) -> Callable[[Image.Image], Picture]:
    """How the vision model in `directory` wants its images.

    Raises:
        ModelFilesError: `preprocessor_config.json` is missing, or says what is not known.
    """
    # Here, because importing FastEmbed takes 0.4 s.
    from fastembed.common.preprocessor_utils import load_preprocessor  # noqa: PLC0415

    try:
        steps: Any = load_preprocessor(directory)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelFilesError(f"{directory}/preprocessor_config.json: {exc}") from exc

    def prepare(image: Image.Image) -> Picture:
        (pixels,) = steps([image])
        return Picture(np.asarray(pixels, np.float32))

    return prepare


def sample_images() -> list[bytes]:
    """A few different PNG files, to prove a model with."""
    return [_png(Image.linear_gradient("L")), _png(Image.radial_gradient("L"))]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()
