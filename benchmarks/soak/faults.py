"""Faults that come from outside the process, one after the other, while clients are at work.

Each breaks something, sees that only what depends on it fails, mends it, and sees it heal.
"""

import asyncio
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import msgspec

from benchmarks.server import Server
from benchmarks.soak.clients import Crowd
from benchmarks.soak.models import CONVERTED, CROSS, DEMO, SPARSE

_ASKED = {CONVERTED: "native", CROSS: "native, rerank", SPARSE: "native, sparse"}
"""Models with weights of their own -> a kind of request to ask them."""
_PATIENCE_SECONDS = 60.0
_FLOOD = 40
_FEW_FILES_SECONDS = 4.0


class Site(msgspec.Struct, frozen=True):
    """A running server, its clients, and the files it depends on."""

    server: Server
    crowd: Crowd
    models: Path
    cache: Path
    keys: Path


async def _damaged_weights(site: Site, model: str) -> None:
    """Weights end too early, as after a copy that broke off."""
    path = site.models / model / "model.safetensors"
    await _damaged(site, model, path, lambda whole: whole[: len(whole) // 2])


async def _damaged_tokenizer(site: Site, model: str) -> None:
    """A tokenizer that is no JSON."""
    await _damaged(site, model, site.models / model / "tokenizer.json", lambda _: b"<html>")


async def _damaged(site: Site, model: str, path: Path, damage: Callable[[bytes], bytes]) -> None:
    async with _cold(site, model):
        whole = path.read_bytes()  # noqa: ASYNC240 - small
        with _broken(site, model):
            _replace(path, damage(whole))
            try:
                await _must_not_load(site, model)
            finally:
                _replace(path, whole)
        await _must_heal(site, model)


async def _no_directory(site: Site, model: str) -> None:
    """The model's directory is away."""
    async with _cold(site, model):
        away = site.models.parent / "away"
        with _broken(site, model):
            (site.models / model).rename(away)
            try:
                await _must_not_load(site, model)
            finally:
                away.rename(site.models / model)
        await _must_heal(site, model)


async def _no_graph(site: Site, model: str) -> None:
    """What is cached of the model is removed, by the command for that."""
    async with _cold(site, model):
        await _forget(site, model)
        await _must_heal(site, model)


async def _full_disk(site: Site, model: str) -> None:
    """Nothing can be written: what is cached loads, what is to be converted does not."""
    async with _cold(site, model):
        await _forget(site, model)
        with _broken(site, model), _limited(site, resource.RLIMIT_FSIZE, 0):
            await _must_not_load(site, model)
        await _must_heal(site, model)


async def _few_files(site: Site, model: str) -> None:
    """No further descriptor is to be had, by connections or by models."""
    async with _cold(site, model):
        site.crowd.judge.lenient = True
        try:
            opened = max(map(int, os.listdir(f"/proc/{site.server.pid}/fd"))) + 1
            with _limited(site, resource.RLIMIT_NOFILE, opened):
                await asyncio.sleep(_FEW_FILES_SECONDS)
            await _must_heal(site, model)
            for kind, other in (*((kind, one) for one, kind in _ASKED.items()), ("native", DEMO)):
                await _until_right(site, kind, other)
        finally:
            site.crowd.judge.lenient = False


async def _new_key(site: Site, _: str) -> None:
    """The file of keys gets another key, loses the old one, is broken for a while, is mended."""
    old, new = site.crowd.headers["authorization"].split()[1], f"key-{time.monotonic_ns()}"
    _replace(site.keys, f"clients={old}\nclients={new}\n".encode())
    await _until_status(site, new, httpx.codes.OK)
    site.crowd.headers = _with_key(new)
    _replace(site.keys, f"clients={new}\n".encode())
    await _until_status(site, old, httpx.codes.UNAUTHORIZED)
    _replace(site.keys, b"")
    await asyncio.sleep(3.0)
    await _until_status(site, new, httpx.codes.OK)
    _replace(site.keys, f"clients={new}\n".encode())


async def _flood(site: Site, _: str) -> None:
    """More at once than can be done in time; whoever is refused obeys and comes back."""
    kinds = ("native", "openai, base64", "cohere", "native, rerank")
    asks = (site.crowd.right(kinds[at % len(kinds)], DEMO) for at in range(_FLOOD))
    await asyncio.gather(*asks)


FAULTS: Mapping[str, Callable[[Site, str], Awaitable[None]]] = {
    "weights that end early": _damaged_weights,
    "a tokenizer that is no JSON": _damaged_tokenizer,
    "a model's directory away": _no_directory,
    "a model's graph removed": _no_graph,
    "a full disk": _full_disk,
    "no more descriptors": _few_files,
    "keys replaced": _new_key,
    "a flood of requests": _flood,
}
"""Name -> what breaks something about a model, and mends it."""


async def inject(site: Site, cycle: int) -> None:
    """All faults, each with another model than the cycle before."""
    models = list(_ASKED)
    for at, (name, fault) in enumerate(FAULTS.items()):
        began = time.monotonic()
        await fault(site, models[(at + cycle) % len(models)])
        site.crowd.judge.counts[name, "injected"] += 1
        print(f"  {name}: {time.monotonic() - began:.1f} s", flush=True)


@asynccontextmanager
async def _cold(site: Site, model: str) -> AsyncIterator[None]:
    """Nobody but the fault asks the model, which is not loaded at first."""
    crowd = site.crowd
    crowd.held.add(model)
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while crowd.asking[model] or await _state(site, model) not in ("unloaded", "failed"):
            if time.monotonic() > deadline:
                crowd.judge.fail(f"{model} is still loaded after {_PATIENCE_SECONDS:.0f} s")
                break
            await asyncio.sleep(0.2)
        yield
    finally:
        crowd.held.discard(model)


@contextmanager
def _broken(site: Site, model: str) -> Iterator[None]:
    site.crowd.judge.broken.add(model)
    try:
        yield
    finally:
        site.crowd.judge.broken.discard(model)


async def _must_not_load(site: Site, model: str) -> None:
    """The model, and it alone, is refused with the reason."""
    answer = await site.crowd.once(_ASKED[model], model)
    code = None if answer is None else answer.json().get("code")
    if code != "MODEL_LOAD_ERROR":
        site.crowd.judge.fail(f"{model} is broken, and a request for it got {code}")


async def _must_heal(site: Site, model: str) -> None:
    site.crowd.judge.broken.add(model)  # it says so until its next try
    try:
        await _until_right(site, _ASKED[model], model)
    finally:
        site.crowd.judge.broken.discard(model)


async def _until_right(site: Site, kind: str, model: str) -> None:
    deadline = time.monotonic() + 2 * _PATIENCE_SECONDS
    while not await site.crowd.right(kind, model):
        if time.monotonic() > deadline:
            site.crowd.judge.fail(f"{model} does not serve again")
            return


async def _state(site: Site, model: str) -> str:
    answer = await site.crowd.http.get("/health/status")
    return str(answer.json()["models"][model]["state"])


async def _until_status(site: Site, key: str, status: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        answer = await site.crowd.http.get("/api/embedders", headers=_with_key(key))
        if answer.status_code == status:
            return
        await asyncio.sleep(0.2)
    site.crowd.judge.fail(f"a key's status did not become {status} within 10 s")


async def _forget(site: Site, model: str) -> None:
    command = ["-m", "embedding_server", "cache", "rm", model, "--cache-dir", str(site.cache)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=subprocess.DEVNULL
    )
    if status := await process.wait():
        site.crowd.judge.fail(f"cache rm {model} ended with status {status}")


@contextmanager
def _limited(site: Site, what: int, limit: int) -> Iterator[None]:
    """Limit a resource of the running server, from outside."""
    soft, hard = resource.prlimit(site.server.pid, what)
    resource.prlimit(site.server.pid, what, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(site.server.pid, what, (soft, hard))


def _replace(path: Path, content: bytes) -> None:
    """Another file under the same name, at once: nobody sees half of it."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content)
    scratch.replace(path)


def _with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
