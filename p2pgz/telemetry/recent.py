"""The last events of the log, for the status page. A bounded ring in memory; what is below the log's level is not in it.

`log.set_up` puts `Recent` among the processors. Values become short texts, and a traceback stays in the log alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping
from itertools import count
from typing import Any, Final

EVENTS_MAX: Final = 200
VALUE_MAX_CHARACTERS: Final = 300
_OWN: Final = frozenset({"event", "level", "timestamp", "component", "exception", "stack"})


class Recent:
    """A processor of structlog that remembers."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._numbers = count(1)

    def __call__(
        self, _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Remember an event and pass it on."""
        self._events.append(
            {
                "n": next(self._numbers),
                "time": str(event.get("timestamp", "")),
                "level": str(event.get("level", "")),
                "component": str(event.get("component", "")),
                "event": str(event.get("event", ""))[:VALUE_MAX_CHARACTERS],
                "fields": {
                    str(name): str(value)[:VALUE_MAX_CHARACTERS]
                    for name, value in event.items()
                    if name not in _OWN
                },
            }
        )
        return event

    def after(self, n: int) -> list[dict[str, Any]]:
        """Those that came after number `n`, as far as they are remembered."""
        return [event for event in self._events if event["n"] > n]


RECENT: Final = Recent()
"""of this process, as its log is"""
