"""`origin.json` beside a graph: which model it was made of, how and when.

Nothing is decided by it: graphs are found by what their model's files hold.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from embedding_server.core import Precision

ORIGIN = "origin.json"


class GraphOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """What a graph was made of; `model` is empty where only a directory was known.

    `converted` is a time in UTC, `version` the converter's.
    """

    directory: str
    version: int
    model: str = ""
    architecture: str = ""
    precision: Precision = Precision.FP32
    converted: datetime = msgspec.field(
        default_factory=lambda: datetime.now(UTC).replace(microsecond=0)
    )

    def write(self, out: Path) -> None:
        """Put it into the graph's directory."""
        (out / ORIGIN).write_bytes(msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def read(cls, directory: Path) -> "GraphOrigin | None":
        """That of the graph in a directory; None where there is none that can be read."""
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((directory / ORIGIN).read_bytes(), type=cls)
        return None


def origins(cache: Path) -> Iterator[GraphOrigin]:
    """Those of all models' graphs in the cache."""
    for path in cache.expanduser().glob(f"graphs/*/{ORIGIN}"):
        if (origin := GraphOrigin.read(path.parent)) and origin.model:
            yield origin
