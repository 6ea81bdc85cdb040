"""Pairs of models that are asked in words: a template around the query and the document."""

from collections.abc import Sequence
from pathlib import Path

from embedding_server.core import Encoding, Template, Text
from embedding_server.runtime.tokenizer import Tokenizer


class TemplateTokenizer(Tokenizer):
    """A `Tokenizer` that puts pairs into a template; of a pair too long the end is cut.

    Args:
        path: tokenizer.json.
        max_tokens: longest result, the template included.
        template: see there.

    Raises:
        TokenizerError: the file cannot be read, or the template alone is too long.
    """

    def __init__(self, path: Path, max_tokens: int, template: Template) -> None:
        self._template = template
        super().__init__(path, max_tokens)

    def encode(self, texts: Sequence[Text]) -> list[Encoding]:
        """See `Encoder`."""
        return super().encode([self._filled(text) for text in texts])

    def _filled(self, text: Text) -> str:
        assert isinstance(text, tuple)
        before, between = self._template.body
        return f"{before}{text[0]}{between}{text[1]}"

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        parts = (self._template.prefix, self._template.suffix)
        prefix, suffix = (
            self._backend.encode(part, add_special_tokens=False).ids for part in parts
        )
        return prefix, suffix
