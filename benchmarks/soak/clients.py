"""Clients of all sorts at once: whatever they are answered is judged, and counted."""

import asyncio
import gzip
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import httpx
import msgspec

from benchmarks.soak.asks import KINDS, PROBES, WRONG, Ask, Draw
from benchmarks.soak.known import TOLERANCE, Known
from benchmarks.soak.models import MODELS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CLIENTS = 8
_TRIES, _LONGEST_WAIT = 8, 5.0
_AT_ONCE, _TURN_SECONDS = 3, 4.0
"""So many models are asked at a time, and after so long one of them is another."""
_STRAY = 0.03
"""Share of requests to any model, which mostly has to be loaded."""
_WRONG, _PROBE = 0.08, 0.08
_MOST_FAILURES = 40
_JSON = {"content-type": "application/json"}

Parts = bytes | AsyncIterator[bytes]
Sent = Callable[[httpx.AsyncClient, Ask, random.Random], Awaitable[httpx.Response | None]]
"""Sends a request in a manner of its own; None: the client left before the answer."""


async def _plain(http: httpx.AsyncClient, ask: Ask, _: random.Random) -> httpx.Response:
    return await _post(http, ask, msgspec.json.encode(ask.body))


async def _gzip(http: httpx.AsyncClient, ask: Ask, _: random.Random) -> httpx.Response:
    body = gzip.compress(msgspec.json.encode(ask.body))
    return await _post(http, ask, body, {"content-encoding": "gzip"})


async def _zstd(http: httpx.AsyncClient, ask: Ask, _: random.Random) -> httpx.Response:
    body = zstd.compress(msgspec.json.encode(ask.body))
    return await _post(http, ask, body, {"content-encoding": "zstd"})


async def _slowly(http: httpx.AsyncClient, ask: Ask, chance: random.Random) -> httpx.Response:
    body = msgspec.json.encode(ask.body)

    async def parts() -> AsyncIterator[bytes]:
        size = 1 + len(body) // 4
        for start in range(0, len(body), size):
            yield body[start : start + size]
            await asyncio.sleep(chance.uniform(0, 0.3))

    return await _post(http, ask, parts())


async def _hasty(http: httpx.AsyncClient, ask: Ask, chance: random.Random) -> httpx.Response | None:
    try:
        async with asyncio.timeout(chance.uniform(0, 0.3)):
            return (
                await _slowly(http, ask, chance)
                if chance.random() < 0.2
                else await _plain(http, ask, chance)
            )
    except TimeoutError:
        return None


async def _in_time(http: httpx.AsyncClient, ask: Ask, chance: random.Random) -> httpx.Response:
    milliseconds = str(chance.randint(1, 200))
    return await _post(
        http, ask, msgspec.json.encode(ask.body), {"x-request-timeout-ms": milliseconds}
    )


MANNERS: Mapping[str, tuple[int, Sent]] = {
    "plainly": (50, _plain),
    "in gzip": (10, _gzip),
    "in zstd": (10, _zstd),
    "slowly": (5, _slowly),
    "hastily": (15, _hasty),
    "with a deadline": (10, _in_time),
}
"""Name -> how often, and how requests are sent."""


class Judge:
    """Counts answers by what was asked and what came of it, and remembers what was not right."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.worst: dict[str, float] = {}
        self.failures: list[str] = []
        self.failed = 0
        self.lenient = False
        """Whether connections and loads may break, because a fault breaks them."""
        self.broken: set[str] = set()
        """Models that cannot be loaded now."""

    def fail(self, what: str) -> None:
        """Remember what must not have been."""
        self.failed += 1
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(what)
            print(f"FAILED {what}", flush=True)

    def vector(self, name: str, ask: Ask, answer: httpx.Response) -> None:
        """Of an answer that ought to be right."""
        off = ask.off(msgspec.json.decode(answer.content))
        self.worst[name] = max(self.worst.get(name, 0.0), off)
        self.counts[name, "right" if off <= TOLERANCE else "wrong"] += 1
        if not off <= TOLERANCE:
            self.fail(f"{name} of {ask.body['model']}: an answer is off by {off}")

    def refusal(self, name: str, ask: Ask, answer: httpx.Response) -> float | None:
        """Seconds until another try; None where it was no honest refusal."""
        self.counts[name, "refused"] += 1
        after = answer.headers.get("retry-after-ms")
        model, unloadable = ask.body["model"], "could not be loaded" in answer.text
        if not after or not answer.headers.get("retry-after", "").isdigit():
            self.fail(f"{name}: {answer.status_code} without Retry-After: {answer.text}")
            return None
        if unloadable and model not in self.broken and not self.lenient:
            self.fail(f"{name} of {model}: {answer.text}")
        return int(after) / 1000


class Crowd:
    """Clients of one server."""

    def __init__(self, url: str, key: str, known: Known, seed: int) -> None:
        self.url, self.known = url, known
        self.judge = Judge()
        self.chance = random.Random(seed)
        self.headers = {"authorization": f"Bearer {key}"}
        self.held: set[str] = set()
        """Models that only a fault asks."""
        self.asking: Counter[str] = Counter()
        self.http: httpx.AsyncClient
        self._done = asyncio.Event()

    async def run(self, work: Awaitable[None]) -> None:
        """Clients at work until `work` is done; no connection is left."""
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits) as self.http:
            self._done.clear()
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(self._client())
                try:
                    await work
                finally:
                    self._done.set()

    async def right(self, name: str, model: str, manner: str = "plainly") -> bool:
        """Ask until it is answered, obeying Retry-After; whether it was, and right."""
        ask = KINDS[name].make(Draw(self.known, self.chance, model))
        for _ in range(_TRIES):
            answer = await self._ask(name, ask, manner)
            if answer is None:
                return False
            if answer.status_code == 200:
                self.judge.vector(name, ask, answer)
                return True
            if answer.status_code == 504 and manner == "with a deadline":
                self.judge.counts[name, "expired"] += 1
                return False
            if answer.status_code not in (429, 503):
                self.judge.fail(f"{name} {manner}: {answer.status_code} {answer.text[:200]}")
                return False
            after = self.judge.refusal(name, ask, answer)
            if after is None or self._done.is_set():
                return False
            await asyncio.sleep(min(after, _LONGEST_WAIT))
        self.judge.counts[name, "gave up"] += 1
        return False

    async def once(self, name: str, model: str) -> httpx.Response | None:
        """An answer, whatever it is; a right one is judged."""
        ask = KINDS[name].make(Draw(self.known, self.chance, model))
        answer = await self._ask(name, ask, "plainly")
        if answer is not None and answer.status_code == 200:
            self.judge.vector(name, ask, answer)
        return answer

    async def _ask(self, name: str, ask: Ask, manner: str) -> httpx.Response | None:
        """An answer; None: the client left, or the connection broke when it might."""
        model = ask.body["model"]
        self.asking[model] += 1
        self.http.headers.update(self.headers)
        _, send = MANNERS[manner]
        try:
            return await self._received(name, send(self.http, ask, self.chance))
        finally:
            self.asking[model] -= 1

    async def _received(
        self, name: str, sent: Awaitable[httpx.Response | None]
    ) -> httpx.Response | None:
        """An answer; None where there is none, which not every time may be so."""
        try:
            answer = await sent
        except httpx.TransportError as exc:
            if not self.judge.lenient:
                self.judge.fail(f"{name}: {exc!r}")
            self.judge.counts[name, "broken"] += 1
            return None
        if answer is None:
            self.judge.counts[name, "left"] += 1
        return answer

    async def _client(self) -> None:
        while not self._done.is_set():
            chance = self.chance.random()
            if chance < _WRONG:
                await self._wrong(self.chance.choice(list(WRONG)))
            elif chance < _WRONG + _PROBE:
                await self._probe(self.chance.choice(PROBES))
            else:
                name, model = self._choose()
                weights = [often for often, _ in MANNERS.values()]
                (manner,) = self.chance.choices(list(MANNERS), weights)
                await self.right(name, model, manner)

    def _choose(self) -> tuple[str, str]:
        """A kind of request, and one of the models whose turn it is."""
        turn = int(time.monotonic() / _TURN_SECONDS)
        models = {MODELS[(turn + at) % len(MODELS)] for at in range(_AT_ONCE)}
        if self.chance.random() < _STRAY:
            models = set(MODELS)
        models -= self.held
        fitting = [
            (name, model)
            for name, kind in KINDS.items()
            for model in kind.models
            if model in models
        ]
        return self.chance.choice(fitting)

    async def _wrong(self, name: str) -> None:
        wrong = WRONG[name]
        headers = {**_JSON, **self.headers, **wrong.headers}
        sent = self.http.post(wrong.path, content=wrong.body, headers=headers)
        answer = await self._received("wrong requests", sent)
        if answer is not None:
            self.judge.counts["wrong requests", str(answer.status_code)] += 1
            if answer.status_code not in (wrong.status, 429, 503):
                self.judge.fail(f"{name}: {answer.status_code} instead of {wrong.status}")

    async def _probe(self, path: str) -> None:
        sent = self.http.get(path, headers=self.headers)
        answer = await self._received("probes", sent)
        if answer is not None:
            self.judge.counts["probes", str(answer.status_code)] += 1
            if answer.status_code != 200:
                self.judge.fail(f"{path}: {answer.status_code} {answer.text[:200]}")


async def _post(
    http: httpx.AsyncClient, ask: Ask, content: Parts, headers: Mapping[str, str] = _JSON
) -> httpx.Response:
    return await http.post(ask.path, content=content, headers={**_JSON, **headers})
