"""GPUs to test on, and a server on them."""

import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.card.libraries import build
from tests.card.models import write_embedder, write_scorer
from tests.process import Server, server

_INSTALLED = Path(__file__).parents[2] / ".venv-card"
_CARD_BYTES = 8 << 30
CARD = "QQQ"
"""`struct card`: bytes, those in use, and kernels that were launched."""
INJECTED = Path(__file__).with_name("injected")
"""What every Python process on a card imports."""


class Serve(Protocol):
    """A server on the cards, waited for until it is ready."""

    def __call__(self, *flags: str, ready: bool = True) -> AbstractContextManager[Server]: ...


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CUDA's libraries for cards that compute nothing."""
    if not _INSTALLED.exists():
        pytest.skip("`make test-card` installs onnxruntime-gpu")
    return build(_INSTALLED, tmp_path_factory.mktemp("libraries"))


@pytest.fixture
def cards(request: pytest.FixtureRequest) -> int:
    """How many cards that compute nothing there are."""
    return int(getattr(request, "param", 1))


@pytest.fixture(
    params=[
        pytest.param("nothing", marks=pytest.mark.full),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def card(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cards: int
) -> str:
    """What processes see from now on: real cards, `cuda`, or so many that compute nothing."""
    monkeypatch.setenv("PYTHONPATH", str(INJECTED))
    if request.param == "cuda":
        if cards > 1:
            pytest.skip("there may be one only")
        return "cuda"
    state = tmp_path / "cards"
    state.write_bytes(struct.pack(CARD, _CARD_BYTES, 0, 0) * cards)
    monkeypatch.setenv("CARDS", str(state))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(request.getfixturevalue("libraries")))
    monkeypatch.setenv("PYTHONPATH", str(_INSTALLED), prepend=os.pathsep)
    return "nothing"


@pytest.fixture(scope="session")
def card_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`embedder` and `scorer`."""
    root = tmp_path_factory.mktemp("models")
    write_embedder(root / "embedder")
    write_scorer(root / "scorer")
    return root


@pytest.fixture
def serve(card: str, card_models: Path, cache: Path) -> Serve:
    """A server with these models, which measures nothing at its start."""
    flags = ["--model-path", str(card_models), "--cache-dir", str(cache), "--providers", "cuda"]
    flags += ["--allowed-embedding-models", "embedder", "--allowed-rerank-models", "scorer"]
    flags += ["--drain-grace-ms", "0", "--warmup-ms", "0"]

    @contextmanager
    def start(*more: str, ready: bool = True) -> Iterator[Server]:
        with server(*flags, *more) as client:
            client.until("/health/ready" if ready else "/health/live", 60)
            yield client

    return start
