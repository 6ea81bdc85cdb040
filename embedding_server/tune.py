"""`embedding-server bench tune`: the long measurement of how models run best on this machine."""

import sys
from functools import partial

from tqdm import tqdm

from embedding_server.catalog import FilesError, Locator, ModelFilesError, open_catalog
from embedding_server.convert import ConvertError
from embedding_server.core import ModelSpec
from embedding_server.errors import StartupError
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.machine import look
from embedding_server.runtime.session import Threads
from embedding_server.runtime.tokenizer import TokenizerError
from embedding_server.server import SWITCH_SECONDS
from embedding_server.serving import profile as profiles
from embedding_server.serving.compute import compute_of
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.profile import Profile
from embedding_server.serving.source import Source
from embedding_server.serving.tuning import all_ways, frontier, settle, sweep
from embedding_server.settings import Settings

_COST_SECONDS = 10.0
_KNOWN = (FilesError, ModelFilesError, ConvertError, TokenizerError, SessionError)


def tune(settings: Settings, seconds: float) -> None:
    """Measure every model, print what is worth choosing from, and keep the best for `serve`.

    Args:
        settings: those that `serve` will have; its profile is found by them.
        seconds: for each point of the sweep.

    Raises:
        StartupError: a model is unknown or cannot be loaded.
    """
    sys.setswitchinterval(SWITCH_SECONDS)  # as in `serve`
    locate, models = Locator(settings), open_catalog(settings).models
    machine = look(settings.cuda_visible_devices)
    compute = compute_of(settings, machine, models.values())
    plan, cores = RunPlan.of(settings, compute), settings.threads or usable_cores()
    for spec in models.values():
        try:
            _tune(locate(spec), plan, compute.slots(cores), seconds)
        except _KNOWN as exc:
            raise StartupError(f"{spec.id}: {exc}") from exc


def _tune(spec: ModelSpec, plan: RunPlan, cores: int, seconds: float) -> None:
    source = Source(spec, plan, cores)
    open_session = partial(source.open, wide=False)
    tried = all_ways(cores, source.fixed_threads, on_cpu=source.on_cpu)
    points = sweep(open_session, tried, cores, spec.max_tokens, seconds)
    measured = list(tqdm(points, desc=spec.id, total=len(tried), unit="point"))
    print(f"{'':32} {'batch':>7} {'tokens/s':>9} {'ms/batch':>9}")
    for point in frontier(measured):
        numbers = f"{point.tokens_per_second:9.0f} {point.run_seconds * 1000:9.1f}"
        print(f"{_describe(point.way.threads):32} {point.way.batch_tokens:7} {numbers}")
    way = settle(open_session, measured, cores, spec.max_tokens, seconds)
    cost = profiles.measure(open_session(way.threads), spec.max_tokens, _COST_SECONDS, cores)
    quality = source.quality() if source.judged else None
    profile = Profile(cost, way, _COST_SECONDS + seconds * len(tried), quality, spec.id)
    profiles.store(profile, source.profile_path)
    kept = f"{_describe(way.threads)}, {way.batch_tokens} tokens per batch"
    print(f"kept for `serve`: {kept}; in {source.profile_path}")


def _describe(threads: Threads) -> str:
    return f"{threads.per_run} per run, spinning {threads.spinning}"
