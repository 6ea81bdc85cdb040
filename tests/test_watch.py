"""Files that are read again when they change."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from embedding_server.watch import follow


@asynccontextmanager
async def followed(*paths: Path) -> AsyncIterator[list[str]]:
    """What was read of these files, as it is."""
    seen: list[str] = []

    def read() -> str:
        text = "".join(path.read_text() for path in paths)
        if "broken" in text:
            raise ValueError("this is broken")
        return text

    task = asyncio.create_task(follow("files", paths, read, seen.append, seconds=0.02))
    await asyncio.sleep(0.05)
    try:
        yield seen
    finally:
        task.cancel()


async def until(seen: list[str], wanted: list[str]) -> None:
    """Wait for it."""
    async with asyncio.timeout(10):
        while seen != wanted:
            await asyncio.sleep(0.01)


async def test_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new content is used, a broken one and a file that is gone are not, whatever comes next."""
    path = tmp_path / "file"
    path.write_text("one")
    async with followed(path) as seen:
        path.write_text("two")
        await until(seen, ["two"])
        path.write_text("broken")
        await asyncio.sleep(0.2)
        path.unlink()
        await asyncio.sleep(0.2)
        assert seen == ["two"]
        path.write_text("three")
        await until(seen, ["two", "three"])
    said = capsys.readouterr().out
    assert said.count("reload.done") == 2
    assert said.count("reload.failed") == 2
    assert "this is broken" in said
    assert "FileNotFoundError" in said


async def test_links(tmp_path: Path) -> None:
    """Kubernetes swaps a link to a directory: both files change at once."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for file in "ab":
            (tmp_path / name / file).write_text(f"{name} {file} ")
    link = tmp_path / "now"
    link.symlink_to("old")
    async with followed(link / "a", link / "b") as seen:
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(link)
        await until(seen, ["new a new b "])
