"""Logging: events with fields, JSON lines on standard error, text on a terminal. Never a line per successful read.

Modules make their logger with `structlog.get_logger(component=…)`; processes call `set_up` once.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog

from p2pgz.telemetry.recent import RECENT

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class Output:
    """Where the lines go. A full disk or a closed terminal loses lines, which are counted, and told of in the next one;
    it never becomes the error of the code that had something to say."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.lost = 0

    def write(self, text: str) -> None:
        try:
            self._file.write(text)
        except (OSError, ValueError):  # ValueError: closed
            self.lost += 1
        else:
            self.lost = 0

    def tell_of_lost(
        self, _logger: object, _method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:
        """A processor."""
        if self.lost:
            event["lost_lines"] = self.lost
        return event

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


class _Logger(structlog.BoundLoggerBase):
    """Loggers are made once and kept, and what is below the level must cost nothing: `set_level` changes their class."""


def set_up(level: str, *, text: bool | None = None) -> None:
    """Configure logging for this process; `text` is decided by whether standard error is a terminal when None."""
    if text is None:
        text = sys.stderr.isatty()
    output = Output(sys.stderr)
    renderer: structlog.types.Processor
    renderer = structlog.dev.ConsoleRenderer() if text else structlog.processors.JSONRenderer(sort_keys=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            output.tell_of_lost,
            RECENT,
            renderer,
        ],
        wrapper_class=_Logger,
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", output)),
        cache_logger_on_first_use=True,
    )
    set_level(level)


def set_level(level: str) -> None:
    """Say more or less from now on, by all loggers that there are."""
    for name, method in vars(structlog.make_filtering_bound_logger(LEVELS[level])).items():
        if not name.startswith("__"):
            setattr(_Logger, name, method)
