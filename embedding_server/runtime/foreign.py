"""Token ids of a client's own tokenizer -> texts.

LangChain and others send ids of OpenAI's vocabulary cl100k_base where a text is expected. They are
made texts again before the model's tokenizer reads them. tiktoken knows the vocabulary; it is not
among our dependencies, and fetches the vocabulary when it is first asked for.
"""

from collections.abc import Sequence
from threading import Thread
from typing import Any

from embedding_server.runtime.encoder import InputError
from embedding_server.runtime.tokenizer import TokenizerError

NAME = "cl100k_base"
_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""What tiktoken's cache calls the vocabulary: the SHA-1 of its address."""


class ForeignIds:
    """Reads ids of another vocabulary than the model's.

    Args:
        encoding: tiktoken's.
    """

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def text(self, index: int, ids: Sequence[int]) -> str:
        """The text whose ids they are; bytes that are no UTF-8 become U+FFFD.

        Raises:
            InputError: of the input `index`, an id is not in the vocabulary.
        """
        try:
            return str(self._encoding.decode(ids))
        except (KeyError, OverflowError) as exc:
            wrong = next(token for token in ids if not self._knows(token))
            fault = f"has token id {str(wrong)[:24]}, which is not in {self._encoding.name}"
            raise InputError(index, f"{fault}, as the model is configured") from exc

    def _knows(self, token: int) -> bool:
        try:
            self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return False
        return True


def load(patience: float = 20.0) -> ForeignIds:
    """Read the vocabulary cl100k_base, and fetch it if it is not there, for so many seconds.

    Raises:
        TokenizerError: tiktoken is not installed, or the vocabulary cannot be had.
    """
    try:
        import tiktoken  # noqa: PLC0415 - optional
    except ImportError as exc:
        raise TokenizerError(
            f"token ids of {NAME} need tiktoken, which is not installed: pip install tiktoken"
        ) from exc
    outcome: list[Any] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding(NAME))
        except Exception as exc:  # noqa: BLE001 - whatever requests raises; it is raised below
            outcome.append(exc)

    # It sets no timeout of its own. A daemon, so that a fetch that hangs does not keep the process.
    thread = Thread(target=fetch, name="tiktoken", daemon=True)
    thread.start()
    thread.join(patience)
    found = outcome[0] if outcome else TimeoutError(f"no answer in {patience:g} s")
    if isinstance(found, Exception):
        raise TokenizerError(
            f"tiktoken could not load {NAME} ({type(found).__name__}): without a network, put "
            f"{NAME}.tiktoken as {_FILE} into the directory that TIKTOKEN_CACHE_DIR names"
        ) from found
    return ForeignIds(found)
