"""The command line: argv -> `Settings` -> one of the verbs.

Whatever keeps a verb from starting is one line on stderr; settings exit with 2, all else with 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from embedding_server import __version__
from embedding_server.errors import StartupError
from embedding_server.runtime.cores import usable_cores
from embedding_server.server import run
from embedding_server.settings import add_flags, load, unknown, with_dotenv


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    parser = argparse.ArgumentParser(prog="embedding-server", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_flags(verbs.add_parser("serve", help="serve HTTP until a signal ends it"))
    flags = vars(parser.parse_args(argv))
    try:
        return _VERBS[flags.pop("verb")](flags)
    except StartupError as exc:
        print(f"embedding-server: {exc}", file=sys.stderr)
        return exc.exit_code


def _serve(flags: dict[str, str | None]) -> int:
    environ = with_dotenv(os.environ)
    settings = load(environ, flags)
    for line in unknown(environ):
        print(f"embedding-server: {line}", file=sys.stderr)
    # The tokenizers' own thread pool is sized when it is first used.
    os.environ.setdefault("RAYON_NUM_THREADS", str(settings.threads or usable_cores()))
    run(settings)
    return 0


_VERBS = {"serve": _serve}
