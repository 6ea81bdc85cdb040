"""An open-loop load generator: requests leave on time, whether or not earlier ones were answered.

It is a process of its own, so that its share of the processor can be told from the server's:
`python -m benchmarks.openloop` reads an `Order` on stdin and writes an `Outcome` to stdout. Clients
that are closed loops (wait for an answer, then ask again) hide an overload; these do not.
"""

import asyncio
import itertools
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast
from urllib.parse import urlsplit

import msgspec
import uvloop

_PATIENCE_SECONDS = 30.0
_HEAD_END = b"\r\n\r\n"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to send: `rate` requests a second for so many seconds.

    `tries` above 1 makes clients obey `retry-after-ms`; `source` is the address to send from.
    """

    url: str
    bodies: Sequence[str]
    rate: float
    seconds: float
    tries: int = 1
    source: str = "127.0.0.1"


class Answer(msgspec.Struct, frozen=True):
    """One request; status 0 = the connection broke before an answer, -1 = it was refused."""

    at: float
    """When it was to be sent, seconds since the start."""
    status: int
    seconds: float
    """From then to the answer, or from the last try where there are several."""
    retry_after: float | None
    tries: int
    body: int


class Outcome(msgspec.Struct, frozen=True):
    """All answers, and the requests per second and the share of a core while they were sent."""

    answers: list[Answer]
    rate: float
    cpu: float

    def count(self, status: int) -> int:
        """Answers of a status."""
        return sum(answer.status == status for answer in self.answers)


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request on it at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.transport = cast("asyncio.Transport", transport)
        self.answer: asyncio.Future[tuple[int, float | None]] | None = None
        self._received = b""

    def ask(self, request: bytes) -> "asyncio.Future[tuple[int, float | None]]":
        """Send a request; its status and retry-after in seconds."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._received += data
        end = self._received.find(_HEAD_END)
        if end < 0 or not self.answer:
            return
        head = self._received[:end].lower()
        size = int(_field(head, b"content-length") or 0)
        if len(self._received) < end + len(_HEAD_END) + size:
            return
        self._received = b""
        after = _field(head, b"retry-after-ms")
        if not self.answer.done():
            self.answer.set_result((int(head[9:12]), int(after) / 1000 if after else None))
        if _field(head, b"connection") == b"close":
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - its signature
        """Called by the event loop."""
        if self.answer and not self.answer.done():
            self.answer.set_result((0, None))


def _field(head: bytes, name: bytes) -> bytes | None:
    at = head.find(b"\r\n" + name + b": ")
    if at < 0:
        return None
    start = at + len(name) + 4
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else None]


class _Clients:
    """Sends requests over as many connections as are needed."""

    def __init__(self, order: Order) -> None:
        self._order = order
        address = urlsplit(order.url)
        self._host, self._port = str(address.hostname), int(address.port or 80)
        head = f"POST {address.path} HTTP/1.1\r\nhost: {address.netloc}\r\n"
        head += "content-type: application/json\r\ncontent-length: "
        encoded = [body.encode() for body in order.bodies]
        self._requests = [head.encode() + b"%d\r\n\r\n" % len(one) + one for one in encoded]
        self._idle: list[_Connection] = []
        self._started = time.perf_counter()
        self._answers: list[Answer] = []

    async def run(self) -> Outcome:
        """Send everything on time, then wait for the answers."""
        tasks: set[asyncio.Task[None]] = set()
        used = _cpu_seconds()
        for number in itertools.count():
            due = number / self._order.rate
            if due >= self._order.seconds:
                break
            wait = self._started + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self._serve(due, number % len(self._requests)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        sent, used = time.perf_counter() - self._started, _cpu_seconds() - used
        await asyncio.gather(*tasks)
        return Outcome(self._answers, number / sent, used / sent)

    async def _serve(self, due: float, body: int) -> None:
        asked = self._started + due
        for tries in range(1, self._order.tries + 1):
            status, after = await self._ask(self._requests[body])
            if status != 503 or tries == self._order.tries:
                break
            await asyncio.sleep(after or random.uniform(1, 2))
            asked = time.perf_counter()
        seconds = time.perf_counter() - asked
        self._answers.append(Answer(due, status, seconds, after, tries, body))

    async def _ask(self, request: bytes) -> tuple[int, float | None]:
        connection = self._idle.pop() if self._idle else None
        if connection is None or connection.transport.is_closing():
            try:
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, self._host, self._port, local_addr=(self._order.source, 0)
                )
            except OSError:
                return -1, None
        try:
            answer = await asyncio.wait_for(connection.ask(request), _PATIENCE_SECONDS)
        except TimeoutError:
            connection.transport.close()
            return 0, None
        if not connection.transport.is_closing():
            self._idle.append(connection)
        return answer


@contextmanager
def running(order: Order) -> "Iterator[subprocess.Popen[bytes]]":
    """A generator at work; `outcome` waits for it."""
    command = [sys.executable, "-m", "benchmarks.openloop"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(msgspec.json.encode(order))
    process.stdin.close()
    with process:
        try:
            yield process
        finally:
            process.kill()


def outcome(process: "subprocess.Popen[bytes]") -> Outcome:
    """What came of it, once it has ended.

    Raises:
        RuntimeError: it did not end by itself, or what it wrote is not whole.
    """
    assert process.stdout
    written = process.stdout.read()
    if process.wait():
        raise RuntimeError(f"the load generator ended with status {process.returncode}")
    try:
        return msgspec.json.decode(written, type=Outcome)
    except msgspec.DecodeError as exc:
        end = written[-60:]
        message = f"the load generator wrote {len(written)} bytes, at last {end!r}"
        raise RuntimeError(message) from exc


def send(order: Order) -> Outcome:
    """Carry out an order."""
    with running(order) as process:
        return outcome(process)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _carry_out(order: Order) -> Outcome:
    return await _Clients(order).run()


def main() -> None:
    """The process."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(_carry_out(order))))


if __name__ == "__main__":
    main()
