"""The command line: argv -> `Settings` -> one of the verbs.

Whatever keeps a verb from starting is one line on stderr; settings exit with 2, all else with 1.
A verb imports what it needs: a health check takes a seventh of the time that the server's parts do.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedding_server import __version__
from embedding_server.errors import StartupError
from embedding_server.settings import Settings, add_flags, load, unknown, with_dotenv

# Before numpy is imported: its products here are small, and threads of its own would fight with
# those that run models. 32 x 128 by 512 x 128 took 16 ms with them and 0.4 ms without.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


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
    models = verbs.add_parser("models", help="list every model that is known")
    models.add_argument("--json", action="store_true", help="as JSON")
    add_flags(models)
    fetch = verbs.add_parser("fetch", help="download models before they are served")
    fetch.add_argument("names", nargs="*", metavar="ID", help="ids or aliases")
    fetch.add_argument("--allowed", action="store_true", help="all that the allow-lists name")
    fetch.add_argument("--verify", action="store_true", help="hash again what was downloaded")
    add_flags(fetch)
    convert = verbs.add_parser("convert", help="make a model's graph before it is served")
    convert.add_argument("wanted", metavar="DIR|ID", help="a model's directory, id or alias")
    convert.add_argument("--out", type=Path, help="a new directory for it, that stands alone")
    compared = "an npz file of ids and layer_<i>, to compare every layer with"
    convert.add_argument("--compare", type=Path, metavar="FILE", help=compared)
    add_flags(convert)
    cache = verbs.add_parser("cache", help="what is kept in INFERENCE_CACHE_DIR")
    actions = cache.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_flags(actions.add_parser("ls", help="list it"))
    remove = actions.add_parser("rm", help="remove some of it; it is made again when it is wanted")
    remove.add_argument("names", nargs="*", metavar="NAME", help="as `ls` shows it, or a model")
    remove.add_argument("--all", action="store_true", help="everything")
    remove.add_argument("--older-than", type=float, metavar="DAYS", help="what was made before")
    add_flags(remove)
    add_flags(verbs.add_parser("healthcheck", help="whether the server on this machine is ready"))
    doctor = verbs.add_parser("doctor", help="what there is to compute with, and what would be")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    add_flags(doctor)
    flags = vars(parser.parse_args(argv))
    try:
        return _VERBS[flags.pop("verb")](flags)
    except StartupError as exc:
        print(f"embedding-server: {exc}", file=sys.stderr)
        return exc.exit_code


def _serve(flags: dict[str, Any]) -> int:
    from embedding_server.server import run

    run(_prepared(flags))
    return 0


def _bench(flags: dict[str, Any]) -> int:
    from embedding_server.tune import tune

    tune(_prepared(flags), flags["seconds"])
    return 0


def _models(flags: dict[str, Any]) -> int:
    from embedding_server.listing import show_models

    show_models(_prepared(flags, allowed="*"), as_json=flags["json"])
    return 0


def _fetch(flags: dict[str, Any]) -> int:
    from embedding_server.listing import fetch_models

    settings = _prepared(flags, allowed="" if flags["allowed"] else "*")
    fetch_models(settings, flags["names"], allowed=flags["allowed"], verify=flags["verify"])
    return 0


def _convert(flags: dict[str, Any]) -> int:
    from embedding_server.conversion import convert_model

    settings = _prepared(flags, allowed="*")
    agree = convert_model(settings, flags["wanted"], flags["out"], flags["compare"])
    return 0 if agree else 1


def _cache(flags: dict[str, Any]) -> int:
    from embedding_server.cache import prune, show_cache

    settings = _prepared(flags, allowed="*")
    if flags["what"] == "ls":
        show_cache(settings)
    else:
        prune(settings, flags["names"], all_=flags["all"], days=flags["older_than"])
    return 0


def _healthcheck(flags: dict[str, Any]) -> int:
    from embedding_server.health import check_health

    check_health(_settings(flags, allowed="*"))
    return 0


def _prepared(flags: dict[str, Any], allowed: str = "") -> Settings:
    """The settings, and what libraries need to know before they are used."""
    import structlog

    from embedding_server.runtime.cores import usable_cores

    # What a verb prints is on stdout; `serve` sets up a log of its own.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    settings = _settings(flags, allowed)
    # The tokenizers' own thread pool is sized when it is first used.
    os.environ.setdefault("RAYON_NUM_THREADS", str(settings.threads or usable_cores()))
    # CUDA reads these itself, once: a flag and `.env` have to reach it, and its numbers have to be
    # NVML's.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if settings.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(settings.cuda_visible_devices)
    return settings


def _doctor(flags: dict[str, Any]) -> int:
    from embedding_server.doctor import show_doctor
    from embedding_server.runtime.machine import look

    settings = _prepared(flags, allowed="*")
    well = show_doctor(settings, look(settings.cuda_visible_devices), as_json=flags["json"])
    return 0 if well else 1


def _settings(flags: dict[str, Any], allowed: str = "") -> Settings:
    """The settings; `allowed` stands in for an allow-list that is not set."""
    environ = with_dotenv(os.environ)
    config = flags.get("model_config") or environ.get("INFERENCE_MODEL_CONFIG")
    if allowed and not config and not flags.get("demo"):
        environ.setdefault("INFERENCE_ALLOWED_EMBEDDING_MODELS", allowed)
    settings = load(environ, flags)
    for line in unknown(environ):
        print(f"embedding-server: {line}", file=sys.stderr)
    return settings


_VERBS: Mapping[str, Callable[[dict[str, Any]], int]] = {
    "serve": _serve,
    "bench": _bench,
    "models": _models,
    "fetch": _fetch,
    "convert": _convert,
    "cache": _cache,
    "doctor": _doctor,
    "healthcheck": _healthcheck,
}
