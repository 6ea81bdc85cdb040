"""A load generator that costs little: wrk with a Lua script, or httpx where wrk is missing."""

import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec

_LUA = """
local bodies = {}
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local next_one = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
  next_one = next_one %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[next_one])
end
"""


class Driven(msgspec.Struct, frozen=True):
    """Requests that were answered, and the seconds it took."""

    requests: int
    seconds: float


def bodies(model: str, texts: Sequence[str], per_request: int) -> list[str]:
    """Request bodies for `/api/embed` with so many texts each."""
    groups = [texts[at : at + per_request] for at in range(0, len(texts), per_request)]
    return [json.dumps({"model": model, "input": list(group)}) for group in groups]


def drive(url: str, requests: Sequence[str], connections: int, seconds: float) -> Driven:
    """Keep `connections` requests in flight for a while.

    Raises:
        RuntimeError: an answer was not 200.
    """
    if shutil.which("wrk"):
        return _wrk(url, requests, connections, seconds)
    return asyncio.run(_httpx(url, requests, connections, seconds))


def _wrk(url: str, requests: Sequence[str], connections: int, seconds: float) -> Driven:
    with tempfile.TemporaryDirectory() as scratch:
        lines, script = Path(scratch, "bodies"), Path(scratch, "load.lua")
        lines.write_text("\n".join(requests) + "\n")
        script.write_text(_LUA % lines)
        command = ["wrk", "-t1", "--timeout", "60s", "-s", str(script)]
        command += [f"-c{connections}", f"-d{seconds:.0f}s", url]
        started = time.perf_counter()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        elapsed = time.perf_counter() - started
    answered = re.search(r"([1-9]\d*) requests in", output)
    if "Non-2xx" in output or "Socket errors" in output or not answered:
        raise RuntimeError(output)
    return Driven(int(answered[1]), elapsed)


async def _httpx(url: str, requests: Sequence[str], connections: int, seconds: float) -> Driven:
    started, answered = time.perf_counter(), 0
    async with httpx.AsyncClient(timeout=120) as client:

        async def work(number: int) -> None:
            nonlocal answered
            at = number
            while time.perf_counter() - started < seconds:
                answer = await client.post(
                    url,
                    content=requests[at % len(requests)],
                    headers={"Content-Type": "application/json"},
                )
                if answer.status_code != httpx.codes.OK:
                    raise RuntimeError(answer.text)
                at += connections
                answered += 1

        await asyncio.gather(*map(work, range(connections)))
    return Driven(answered, time.perf_counter() - started)
