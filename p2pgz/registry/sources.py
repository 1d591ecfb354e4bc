"""The registry clients of a node. Called by `node` with what a request says about the way to its registry."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import trio

from p2pgz.config import RegistryConfig
from p2pgz.core.reference import Reference
from p2pgz.registry.layout import LayoutSource
from p2pgz.registry.opening import open_source
from p2pgz.registry.options import RegistryOptions
from p2pgz.registry.source import Pace, RegistrySource


class Access(Protocol):
    """How a request wants its registry to be reached; what it leaves empty the configuration says."""

    @property
    def plain_http(self) -> bool: ...

    @property
    def ca_file(self) -> str: ...

    @property
    def hosts_dir(self) -> str: ...

    @property
    def user(self) -> str: ...


class Sources:
    """The open registry clients: one for each way to a repository, kept for its connections and tokens."""

    def __init__(self, config: RegistryConfig, stack: AsyncExitStack, pace: Pace | None = None) -> None:
        self.config = config
        """may be replaced: what is opened from then on goes by it"""
        self._pace = pace
        self._stack = stack
        self._open: dict[tuple[object, ...], RegistrySource | LayoutSource] = {}
        self._opening = trio.Lock()

    async def get(self, reference: Reference, request: Access) -> RegistrySource | LayoutSource:
        """A source for the reference as the request wants to reach it."""
        registry = self.config
        options = RegistryOptions(
            plain_http=request.plain_http or reference.host in registry.plain_http,
            ca_file=request.ca_file or registry.ca_file,
            hosts_dir=request.hosts_dir or registry.hosts_dir,
            docker_config=registry.docker_config,
            user=request.user or None,
        )
        # an archive that was replaced is another one; images of the old one keep reading from the old file
        version = Path(reference.path).stat().st_mtime_ns if Path(reference.path).is_file() else 0
        key = (reference.transport, reference.host, reference.repository, reference.path, version, options)
        if (source := self._open.get(key)) is not None:
            await trio.lowlevel.checkpoint()
            return source
        async with self._opening:  # one client for all who come at once: they share its token
            source = self._open.get(key)
            if source is None:
                source = await self._stack.enter_async_context(
                    open_source(reference, options, pace=self._pace)
                )
                self._open[key] = source
        return source

    def answers(self) -> Counter[int]:
        """How often registries answered with each status code; 0: not at all."""
        found: Counter[int] = Counter()
        for source in self._open.values():
            if isinstance(source, RegistrySource):
                found.update(source.stats.answers)
        return found

    def totals(self) -> dict[str, int]:
        """Requests and received bytes of all registries."""
        stats = [source.stats for source in self._open.values() if isinstance(source, RegistrySource)]
        return {
            "requests": sum(s.requests for s in stats),
            "wire_bytes": sum(s.received_bytes for s in stats),
        }
