"""The JSON files that describe a model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ESSENTIAL = ("config.json", "tokenizer.json")
"""What no text model does without."""

CONFIGURATION = (
    *ESSENTIAL,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "preprocessor_config.json",
)
"""What is read, and fetched beside a model's own files, as far as it is there."""


class ModelFilesError(Exception):
    """A model's files are missing or say something that cannot be served."""


@contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turn what odd JSON leads to into a `ModelFilesError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as exc:
        raise ModelFilesError(f"{directory}: its JSON files lack {exc}") from exc
    except ValueError as exc:
        raise ModelFilesError(f"{directory}: its JSON files are odd: {exc}") from exc


def read(path: Path, *, required: bool = False) -> Any:
    """The parsed file; {} where it may be and is missing, or empty.

    Raises:
        ModelFilesError: it is missing and must be there, or is no JSON.
    """
    try:
        content = path.read_bytes()
        return json.loads(content) if content or required else {}
    except FileNotFoundError as exc:
        if required:
            raise ModelFilesError(f"{path} is missing") from exc
        return {}
    except OSError as exc:
        raise ModelFilesError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ModelFilesError(f"{path}: {exc}") from exc
