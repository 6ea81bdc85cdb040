"""Pairs of models that are asked in words: a template around the query and the document."""

from collections.abc import Sequence
from pathlib import Path

from embedding_server.core import Encoding, Side, Template, Text, Tokens
from embedding_server.runtime.encoder import NO_IDS, InputError
from embedding_server.runtime.tokenizer import Tokenizer


class TemplateTokenizer(Tokenizer):
    """A `Tokenizer` that puts pairs into a template; a pair too long is cut within it.

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

    def encode(self, texts: Sequence[Text], *, side: Side = "right") -> list[Encoding]:
        """See `Encoder`."""
        filled = [self._filled(index, text) for index, text in enumerate(texts)]
        return super().encode(filled, side=side)

    def _filled(self, index: int, text: Text) -> str:
        if isinstance(text, Tokens):
            raise InputError(index, NO_IDS)
        assert isinstance(text, tuple)
        before, between = self._template.body
        return f"{before}{text[0]}{between}{text[1]}"

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        parts = (self._template.prefix, self._template.suffix)
        prefix, suffix = (
            self._backend.encode(part, add_special_tokens=False).ids for part in parts
        )
        return prefix, suffix
