"""The node on its HTTP port: joins `Node` to `web.site`. Called by `node.run`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
import trio

from p2pgz import __version__
from p2pgz.config import Config
from p2pgz.core.standing import Fault
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.node.node import Node
from p2pgz.node.peering import Peering
from p2pgz.registry.sources import Sources
from p2pgz.telemetry.histogram import Histogram
from p2pgz.telemetry.recent import RECENT
from p2pgz.web.http import AUTO, NONE, HttpServer, addresses, listening
from p2pgz.web.metrics import Measures
from p2pgz.web.site import create_site, own_names

log = structlog.get_logger(component="http")


class Site:
    """What the port shows of a node. `web.site.Watched`."""

    def __init__(self, node: Node, fetcher: ChunkFetcher, sources: Sources, peering: Peering | None) -> None:
        self._node = node
        self._fetcher = fetcher
        self._sources = sources
        self._peering = peering
        self.is_started = False
        """whether the mounts of before have been taken over and commands are answered"""

    def status(self) -> dict[str, Any]:
        """The status document."""
        return self._node.status()

    def problems(self) -> list[str]:
        """Why the node should not be relied on now; empty: it may."""
        found = [] if self.is_started else ["starting"]
        state = self._node.pool_state
        return [*found, f"the disk refuses writes: {state[1]}"] if state[0] == "failing" else found

    def events(self, after: int) -> list[dict[str, Any]]:
        """The last events of the log."""
        return RECENT.after(after)

    def measures(self, status: dict[str, Any]) -> Measures:
        """What the packages count."""
        counters, exchange = (
            self._fetcher.counters,
            self._peering.exchange if self._peering is not None else None,
        )
        corrupt = {"registry": counters.corrupt_chunks}
        uploads = {"chunks": 0, "raw_bytes": 0, "wire_bytes": 0}
        if exchange is not None:
            corrupt["peer"] = exchange.standing.counts[Fault.CORRUPT]
            sent = exchange.uploads
            uploads = {"chunks": sent.chunks, "raw_bytes": sent.raw_bytes, "wire_bytes": sent.wire_bytes}
        return Measures(
            status=status,
            waits={priority.name.lower(): waits for priority, waits in counters.waits.items()},
            chunk_seconds={str(kind): seconds for kind, seconds in self._fetcher.trace.seconds.items()},
            lookup_seconds=self._peering.discovery.lookup_seconds
            if self._peering is not None
            else Histogram(),
            flights_shared=counters.flights_shared,
            corrupt_chunks=corrupt,
            answers=self._sources.answers(),
            uploads=uploads,
            version=__version__,
        )


@asynccontextmanager
async def open_port(config: Config, *, ephemeral: bool) -> AsyncIterator[list[trio.SocketListener]]:
    """The port's listeners, none if there is to be no port. Raises StateError when the address cannot be had."""
    text = config.http.listen
    # a node that a command started for itself: nobody would find its page
    if text == NONE or (text == AUTO and ephemeral):
        yield []
        return
    async with listening(text) as listeners:
        yield listeners


def start_site(
    config: Config, site: Site, listeners: list[trio.SocketListener], nursery: trio.Nursery
) -> list[str]:
    """Serve it as long as the nursery lives; its URLs."""
    if not listeners:
        return []
    server = HttpServer(create_site(site, own_names(config.http.hosts)))
    nursery.start_soon(server.run, listeners)
    urls = addresses(listeners)
    log.info("http.ready", urls=urls)
    return urls
