"""structlog for everything this process says: one event per line on stdout, JSON or pretty.

Events have a name and key=value pairs (`log.info("model.loaded", seconds=1.2)`); request texts
are never among them. The standard library's loggers (uvicorn's, other libraries') go through the
same pipe.
"""

import logging
import sys
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, Processor

from embedding_server.settings import Settings

_SHARED: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]


def configure(settings: Settings) -> None:
    """Set up structlog and the standard library's root logger; called once per process."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    if settings.log_format == "json":
        tail: list[Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_json),
        ]
    else:
        tail = [structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]

    def service(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {"service": settings.service_name, **event}

    structlog.configure(
        processors=[service, *_SHARED, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
            foreign_pre_chain=[service, *_SHARED],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # Per-request noise of an HTTP client and uvicorn's own start-up banner say nothing new.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _json(event: dict[str, Any], **_: Any) -> str:
    return orjson.dumps(event, default=repr).decode()
