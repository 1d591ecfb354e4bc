"""What the node tells the service manager that started it: ready, reloading, stopping, alive. sd_notify(3).

Called by `node.run` for `p2pgz node` and by `p2pgz snapshotter`, never for a node that a command started for itself: that
one lives in somebody else's service. The sign of life comes from the event loop, so a node whose loop hangs is started
anew. Does nothing where nobody asks.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Final

import trio

# sd_watchdog_enabled(3) wants half; a loop that was busy for a moment gets another chance
PINGS_IN_TIME: Final = 3


class Supervisor:
    """The service manager, as the environment tells of it."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_seconds = _watchdog_seconds(environment) if self._address else 0.0
        """how long it waits for a sign of life; 0: it does not"""

    def say(self, *lines: str) -> None:
        """Tell something. Best effort: a manager that does not listen costs nothing."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto("\n".join(lines).encode(), address)

    def ready(self) -> None:
        """It answers, or has read its configuration again."""
        self.say("READY=1", "STATUS=Answers.")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It takes its leave."""
        self.say("STOPPING=1", "STATUS=Ends; mounts live on.")

    async def keep_alive(self) -> None:
        """Give a sign of life as often as is asked for; for ever, or not at all."""
        while self.watchdog_seconds:
            self.say("WATCHDOG=1")
            await trio.sleep(self.watchdog_seconds / PINGS_IN_TIME)
        await trio.lowlevel.checkpoint()


def _watchdog_seconds(environment: MutableMapping[str, str]) -> float:
    """The time between two signs of life, if this process is to give them."""
    if environment.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return 0.0
    with suppress(ValueError):
        return max(0, int(environment.get("WATCHDOG_USEC", "0"))) / 1e6
    return 0.0
