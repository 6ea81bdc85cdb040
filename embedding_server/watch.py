"""Files that are read again when they change: keys and certificates, which others renew."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

_SECONDS = 1.0

Read = TypeVar("Read")
_Signature = list[tuple[int, ...] | None]

log = structlog.get_logger()


async def follow(
    name: str,
    paths: Sequence[Path],
    read: Callable[[], Read],
    use: Callable[[Read], None],
    *,
    seconds: float = _SECONDS,
) -> None:
    """For ever: once `paths` have changed and stay so for `seconds`, `use` what `read` makes.

    `read` runs off the event loop, `use` on it. Where `read` fails, what was used before stays in
    use and the log says why. `paths` may be links (Kubernetes mounts secrets so).
    """
    used = last = await asyncio.to_thread(_signature, paths)
    while True:
        await asyncio.sleep(seconds)
        now = await asyncio.to_thread(_signature, paths)
        # One look later: whoever renews two files, or writes one slowly, is done then.
        if now != used and now == last:
            used = now
            try:
                use(await asyncio.to_thread(read))
            except Exception as exc:  # noqa: BLE001 - a file of others must not end the watch
                log.warning("reload.failed", what=name, reason=f"{type(exc).__name__}: {exc}")
            else:
                log.info("reload.done", what=name)
        last = now


def _signature(paths: Sequence[Path]) -> _Signature:
    found: _Signature = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found
