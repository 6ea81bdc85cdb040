"""What it costs to be seen: `python -m benchmarks.telemetry`, three minutes.

Short single texts at 32 connections, asked in turn of servers that tell nobody, that send every
trace, and that send every trace and every log event and count requests and tokens for limits.
The collector, which does not read what it gets, shares their cores.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from benchmarks.corpus import corpus
from benchmarks.load import bodies, drive
from benchmarks.server import demo_server
from embedding_server.catalog.demo import demo_model

_ROUNDS, _SECONDS, _CONNECTIONS = 8, 6.0, 32
_WORDS = 12
_LEFT_SECONDS = 1.5
"""Until what a round has to tell is sent."""
_COLLECTOR = "--collector"
_TRACES = ("--otel-enabled", "--otel-sample-ratio", "1")
_COUNTED = ("--rate-limit", "100000000", "--rate-limit-tokens", "1000000000")
_TOLD = {"nothing": (), "traces": _TRACES, "all": (*_TRACES, "--otel-logs-enabled", *_COUNTED)}


def main() -> None:
    """Print requests a second, and what each costs the server."""
    model = demo_model().id
    requests = bodies(model, [" ".join(text.split()[:_WORDS]) for text in corpus()], 1)
    rates, costs = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    with contextlib.ExitStack() as stack:
        endpoint = ("--otel-endpoint", stack.enter_context(_collector()))
        servers = {
            name: stack.enter_context(demo_server(*flags, *endpoint))
            for name, flags in _TOLD.items()
        }
        for _ in range(_ROUNDS):
            for name, server in servers.items():
                before = _cpu_seconds(server.pid)
                driven = drive(f"{server.url}/api/embed", requests, _CONNECTIONS, _SECONDS)
                time.sleep(_LEFT_SECONDS)
                rates[name].append(driven.requests / driven.seconds)
                costs[name].append((_cpu_seconds(server.pid) - before) / driven.requests)
    for name, seen in rates.items():
        print(
            f"{name:8} {statistics.median(seen):6.1f} requests/s"
            f" ({min(seen):.0f} to {max(seen):.0f}),"
            f" {1e3 * statistics.median(costs[name]):.2f} ms of a core each"
        )


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _collector() -> Iterator[str]:
    """A process that takes whatever comes; its address."""
    command = [sys.executable, "-m", "benchmarks.telemetry", _COLLECTOR]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.communicate()


def _collect() -> None:
    """Be that process, until standard input ends."""
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((_Anything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()


class _Anything(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, _: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


if __name__ == "__main__":
    _collect() if _COLLECTOR in sys.argv else main()
