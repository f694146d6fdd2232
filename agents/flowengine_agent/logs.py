"""What the agent writes to its log: one event a line, for machines (JSON) or for people."""

from __future__ import annotations

import sys
from typing import Any, Literal

import structlog

__all__ = ["Log", "open_log"]

Log = structlog.typing.FilteringBoundLogger


def open_log(style: Literal["json", "console"], site: str) -> Log:
    """The process's log on stderr; every line names the site."""
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json":
        processors += [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    log: Log = structlog.get_logger(site=site)
    return log
