"""`make bench-memory`: does memory creep over 100,000 texts of random lengths?"""

import json
import random

from benchmarks.corpus import corpus
from benchmarks.load import drive
from benchmarks.server import Server, demo_server
from embedding_server.catalog.demo import demo_model

_TEXTS, _PER_REQUEST, _CONNECTIONS = 100_000, 16, 4
_MOST_WORDS, _LONG_WORDS, _LONG_EVERY = 60, 200, 20
"""One text in so many may be as long as the model takes."""
_WARM_UP_SECONDS, _STEP_SECONDS = 10.0, 20.0


def main() -> None:
    """Print resident memory after warm-up and while texts go by, and the growth at the end."""
    words = " ".join(corpus()).split()
    generator = random.Random(0)

    def text() -> str:
        most = _MOST_WORDS if generator.randrange(_LONG_EVERY) else _LONG_WORDS
        return " ".join(generator.choices(words, k=generator.randint(1, most)))

    requests = [
        json.dumps({"model": demo_model().id, "input": [text() for _ in range(_PER_REQUEST)]})
        for _ in range(2000)
    ]
    with demo_server() as server:
        url = f"{server.url}/api/embed"
        print(f"when ready    {server.resident_mb:8.0f} MiB", flush=True)
        drive(url, requests, _CONNECTIONS, _WARM_UP_SECONDS)
        first, start = server.resident_mb, server.texts
        print(f"after warm-up {first:8.0f} MiB", flush=True)
        while (done := server.texts - start) < _TEXTS:
            drive(url, requests, _CONNECTIONS, _STEP_SECONDS)
            _show(server, server.texts - start, first)
        print(f"{done:.0f} texts: {server.resident_mb / first - 1:+.1%}")


def _show(server: Server, texts: float, first: float) -> None:
    now = server.resident_mb
    print(f"{texts:7.0f} texts {now:8.0f} MiB {now / first - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
