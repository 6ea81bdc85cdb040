"""The command line: argv -> `Settings` -> one of the verbs.

Whatever keeps a verb from starting is one line on stderr; settings exit with 2, all else with 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from embedding_server import __version__
from embedding_server.errors import StartupError
from embedding_server.runtime.cores import usable_cores
from embedding_server.server import run
from embedding_server.settings import Settings, add_flags, load, unknown, with_dotenv
from embedding_server.tune import tune


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    parser = argparse.ArgumentParser(prog="embedding-server", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_flags(verbs.add_parser("serve", help="serve HTTP until a signal ends it"))
    bench = verbs.add_parser("bench", help="measure on this machine")
    benches = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    tuning = benches.add_parser("tune", help="how models run best; `serve` uses what it finds")
    tuning.add_argument("--seconds", type=float, default=2.0, help="per point [2]")
    add_flags(tuning)
    flags = vars(parser.parse_args(argv))
    try:
        return _VERBS[flags.pop("verb")](flags)
    except StartupError as exc:
        print(f"embedding-server: {exc}", file=sys.stderr)
        return exc.exit_code


def _serve(flags: dict[str, str | None]) -> int:
    run(_settings(flags))
    return 0


def _bench(flags: dict[str, Any]) -> int:
    tune(_settings(flags), flags["seconds"])
    return 0


def _settings(flags: dict[str, str | None]) -> Settings:
    environ = with_dotenv(os.environ)
    settings = load(environ, flags)
    for line in unknown(environ):
        print(f"embedding-server: {line}", file=sys.stderr)
    # The tokenizers' own thread pool is sized when it is first used.
    os.environ.setdefault("RAYON_NUM_THREADS", str(settings.threads or usable_cores()))
    return settings


_VERBS = {"serve": _serve, "bench": _bench}
