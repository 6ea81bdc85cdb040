"""Ids of OpenAI's vocabulary: read with tiktoken where that is installed, explained where not."""

import socket
import sys
import time
from pathlib import Path

import pytest

from embedding_server.runtime.encoder import InputError
from embedding_server.runtime.foreign import ForeignIds, load
from embedding_server.runtime.tokenizer import TokenizerError


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tiktoken the error says what to install."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match="pip install tiktoken"):
        load()


def test_ids_become_text() -> None:
    """Ids are decoded; broken characters are replaced, and ids out of range refused."""
    tiktoken = pytest.importorskip("tiktoken")
    single = {bytes([byte]): byte for byte in range(256)}
    foreign = ForeignIds(
        tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=single, special_tokens={"<e>": 300})
    )
    assert foreign.text(0, "\u6f22!".encode()) == "\u6f22!"
    assert foreign.text(0, [104, 0xE6]) == "h\ufffd"
    for wrong in (256, 301, -1, 1 << 70):
        with pytest.raises(
            InputError, match=f"has token id {wrong}, which is not in bytes"
        ) as caught:
            foreign.text(7, [104, wrong])
        assert caught.value.index == 7


def test_vocabulary_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the vocabulary cannot be fetched, an error soon says where to put it."""
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(TokenizerError, match=r"TimeoutError.*TIKTOKEN_CACHE_DIR"):
            load(patience=0.5)
        assert time.monotonic() - started < 5
