"""What stands between a request's texts or images and a session: the `Encoder` of a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from embedding_server.core import Encoding, Side, Text

if TYPE_CHECKING:
    from embedding_server.runtime.tokenizer import Tokenizer

NO_IDS = "is token ids, which this model does not take: send text"
"""What an encoder of nothing but texts or images says of `Tokens`."""


class InputError(Exception):
    """An input that cannot be read; `index` says which one, the message what is wrong with it."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class Encoder(Protocol):
    """Inputs -> what the session of their model takes; called from any thread."""

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """What makes token ids of texts; None where words are counted or images taken."""

    @property
    def specials(self) -> int:
        """Tokens that every input has, whatever is in it."""

    @property
    def max_tokens(self) -> int:
        """What no input counts for more than."""

    @property
    def quick_chars(self) -> int:
        """Up to so many characters, encoding costs less than a change of threads."""

    def encode(self, texts: Sequence[Text], *, side: Side = "right") -> list[Encoding]:
        """One encoding per input, in order; what is too long is cut at `side`.

        Raises:
            InputError: one cannot be read.
        """
