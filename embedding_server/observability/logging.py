"""structlog for everything this process says: one event per line on stdout, JSON or pretty.

Events have a name and key=value pairs (`log.info("model.loaded", seconds=1.2)`); request texts
are never among them. The standard library's loggers (uvicorn's, other libraries') and Python's
warnings go through the same pipe, and with `OTEL_LOGS_ENABLED` so does what a collector gets.
"""

import asyncio
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, Processor

from embedding_server.settings import Settings

_TELLING = ("embedding_server", "onnxruntime")
"""Packages whose exceptions say what is wrong and not what was sent."""

log = structlog.get_logger()


def configure(settings: Settings) -> Callable[[], None]:
    """Set up structlog and the standard library's root logger; called once per process.

    Returns:
        What sends the collector the last events.

    Raises:
        SettingsError: the collector's address is wrong.
    """
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]

    def service(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {"service": settings.service_name, **event}

    shared: list[Processor] = [
        service,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _without_values,
    ]
    sink, close = _sink(settings)
    last: Processor = structlog.processors.JSONRenderer(serializer=_json)
    if settings.log_format == "pretty":
        last = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
    structlog.configure(
        processors=[*shared, *sink, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *sink, last],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(capture=True)
    # Per-request noise of an HTTP client and uvicorn's own start-up banner say nothing new.
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))
    return close


def adopt_loguru() -> None:
    """Let loguru's one logger, which FastEmbed speaks through, say it to the root logger alone."""
    from loguru import logger  # noqa: PLC0415 - comes with FastEmbed

    logger.remove()
    # A function: to a text loguru would add the exception and what it says.
    logger.add(_ToRoot(), format=lambda _: "{message}")


class _ToRoot(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


def loop_failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: asyncio's own shows exceptions with what they say."""
    log.error("loop.error", message=context["message"], exc_info=context.get("exception"))


def _sink(settings: Settings) -> tuple[list[Processor], Callable[[], None]]:
    if not (settings.otel_enabled and settings.otel_logs_enabled):
        return [], lambda: None
    # It takes 0.2 s and 20 MB to import.
    from embedding_server.observability.otlp import open_logs  # noqa: PLC0415

    sink, close = open_logs(settings)
    return [sink], close


def _json(event: dict[str, Any], **_: Any) -> str:
    return orjson.dumps(event, default=repr).decode()


def _without_values(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """`exc_info` as text, without what variables and messages of strangers hold: request texts."""
    given = event.pop("exc_info", None)
    if given is True or isinstance(given, tuple):
        given = (given if isinstance(given, tuple) else sys.exc_info())[1]
    if isinstance(given, BaseException):
        event["exception"] = "\n".join(_told(given, set()))
    return event


def _told(error: BaseException, seen: set[int]) -> Iterator[str]:
    """Causes first, then where it was raised and what it is."""
    seen.add(id(error))
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for other in (cause, *getattr(error, "exceptions", ())):
        if isinstance(other, BaseException) and id(other) not in seen:
            yield from _told(other, seen)
            yield ""
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield described(error)


def described(error: BaseException) -> str:
    """The type of an exception, and its message where that cannot hold a request's text."""
    kind = type(error)
    telling = isinstance(error, OSError | ImportError) or kind.__module__.startswith(_TELLING)
    return f"{kind.__name__}: {error}" if telling else kind.__name__
