"""`embedding-server bench tune`: the long measurement of how models run best on this machine."""

from tqdm import tqdm

from embedding_server.catalog import open_catalog
from embedding_server.convert import ConvertError
from embedding_server.core import ModelSpec
from embedding_server.errors import StartupError
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.session import SessionError, Threads
from embedding_server.runtime.tokenizer import TokenizerError
from embedding_server.serving import profile as profiles
from embedding_server.serving.loader import RunPlan, Source
from embedding_server.serving.profile import Profile
from embedding_server.serving.tuning import Point, choose, frontier, steps, sweep
from embedding_server.settings import Settings

_COST_SECONDS = 10.0


def tune(settings: Settings, seconds: float) -> None:
    """Measure every model, print what is worth choosing from, and keep the best for `serve`.

    Args:
        settings: those that `serve` will have; its profile is found by them.
        seconds: for each point of the sweep.

    Raises:
        StartupError: a model is unknown or cannot be loaded.
    """
    for spec in open_catalog(settings).models.values():
        try:
            _tune(spec, settings, seconds)
        except (ConvertError, TokenizerError, SessionError) as exc:
            raise StartupError(f"{spec.id}: {exc}") from exc


def _tune(spec: ModelSpec, settings: Settings, seconds: float) -> None:
    cores = settings.threads or usable_cores()
    source = Source(spec, RunPlan.of(settings), cores)
    points = list(
        tqdm(
            sweep(source.open, cores, spec.max_tokens, seconds),
            desc=spec.id,
            total=steps(cores),
            unit="point",
        )
    )
    speeds: dict[Threads, float] = {}
    for point in points:
        speeds[point.threads] = max(speeds.get(point.threads, 0.0), point.tokens_per_second)
    _show(points)
    session = source.open(choose(speeds))
    measured = source.profile(session)
    cost = profiles.measure(session, spec.max_tokens, _COST_SECONDS)
    path = source.profile_path(session)
    profiles.store(Profile(cost, session.threads, measured.quality), path)
    print(f"kept for `serve`: {_describe(session.threads)}; in {path}")


def _show(points: list[Point]) -> None:
    print(f"{'':32} {'batch':>7} {'tokens/s':>9} {'ms/batch':>9}")
    for point in frontier(points):
        numbers = f"{point.tokens_per_second:9.0f} {point.run_seconds * 1000:9.1f}"
        print(f"{_describe(point.threads):32} {point.batch_tokens:7} {numbers}")


def _describe(threads: Threads) -> str:
    return f"{threads.per_run} per run, spinning {threads.spinning}"
