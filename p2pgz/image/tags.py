"""What a tag means: asked of the registry, or, when that cannot be reached, as this host knows it from the last time.

Called by `image.open`. The registry is asked once however many wait for the same tag. What comes from memory is said to be
stale, and is used only when nobody answers: a registry that refuses, or does not know the tag, is believed.
Design, section 6.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import SIZE_UNKNOWN, Descriptor
from p2pgz.core.platform import Platform
from p2pgz.core.ports import ImageSource
from p2pgz.core.reference import Reference
from p2pgz.errors import P2pgzError, PoolFull, SourceUnreachable
from p2pgz.fetch.together import Together
from p2pgz.pool.catalog import Catalog, TagRecord
from p2pgz.registry.source import RegistrySource

log = structlog.get_logger(component="image")

# With something to fall back on: a registry that is well answers a HEAD in a tenth of this, one that swallows packets must
# not hold a mount for the two minutes of all time-outs together
LOOK_UP_SECONDS: Final = 3.0
# After that, further look-ups soon get only this: twenty commands of a script must not wait a minute. One round trip
AWAY_SECONDS: Final = 10.0
AWAY_LOOK_UP_SECONDS: Final = 0.5
# A tag that means what it meant is written down again this much later: each time would be a commit for each `cat`
NOTE_AGAIN_SECONDS: Final = 60.0
UNKNOWN_HINT: Final = "this host has not resolved the tag before; by digest it can be had while peers have it"


class Resolved(NamedTuple):
    """What a reference names, and since when it may mean something else, if its registry could not be asked."""

    descriptor: Descriptor
    stale_since: float | None = None


class Tags:
    """The tags of a node. Records are kept for each platform: a tag may mean another image there."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._look_ups: Together[Descriptor] = Together()
        self._away_until: dict[str, float] = {}  # by the source's name

    async def resolve(
        self,
        reference: Reference,
        source: ImageSource,
        platform: Platform,
        *,
        seconds: float = LOOK_UP_SECONDS,
    ) -> Resolved:
        """Ask the source, for at most `seconds` when there is an older answer; raises what it raises."""
        if reference.digest is not None:
            return Resolved(await source.resolve(reference))
        last = self.last(reference, platform)
        if seconds <= LOOK_UP_SECONDS and trio.current_time() < self._away_until.get(source.name, 0.0):
            seconds = min(seconds, AWAY_LOOK_UP_SECONDS)

        async def look_up() -> Descriptor:
            return await source.resolve(reference)

        try:
            if last is None:
                return Resolved(await self._look_ups.run((source, reference), look_up))
            descriptor = await _within(
                seconds, source, lambda: self._look_ups.run((source, reference), look_up)
            )
            if descriptor is not None:
                self._away_until.pop(source.name, None)
                return Resolved(descriptor)
            reason = f"no answer within {seconds:g} s"
        except SourceUnreachable as error:
            if last is None:
                raise SourceUnreachable(
                    error.what, hint="; ".join(filter(None, (error.hint, UNKNOWN_HINT)))
                ) from error
            reason = error.what
        self._away_until[source.name] = trio.current_time() + AWAY_SECONDS
        log.warning("tag.stale", reference=str(reference), digest=str(last.descriptor.digest), reason=reason)
        return last

    def last(self, reference: Reference, platform: Platform) -> Resolved | None:
        """What a tag in a registry meant when it was last asked for."""
        record = self._catalog.tag(str(reference), str(platform))
        if record is None or reference.digest is not None or reference.transport != "registry":
            return None
        return Resolved(Descriptor(media_type="", digest=record.digest, size=SIZE_UNKNOWN), record.resolved)

    async def note(self, reference: Reference, platform: Platform, manifest: Digest) -> None:
        """The source has said just now that the reference names this manifest."""
        now = time.time()
        record = self._catalog.tag(str(reference), str(platform))
        if (
            record is not None
            and record.digest == manifest
            and abs(now - record.resolved) < NOTE_AGAIN_SECONDS
        ):
            return
        tag = TagRecord(reference=str(reference), platform=str(platform), digest=manifest, resolved=now)
        try:
            await self._catalog.set_tag(tag)
        except PoolFull as error:
            log.warning("tag.not_noted", reference=tag.reference, reason=error.what)


async def _within(
    seconds: float, source: ImageSource, ask: Callable[[], Awaitable[Descriptor]]
) -> Descriptor | None:
    """The answer; None when nobody has said anything by then. A registry that wants us to wait (429) is waited for."""
    begun = trio.current_time()
    found: list[Descriptor] = []
    failures: list[P2pgzError] = []
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            try:
                found.append(await ask())
            except P2pgzError as error:
                failures.append(error)
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        await trio.sleep(seconds)
        if not (isinstance(source, RegistrySource) and source.stats.refused_at >= begun):
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    return found[0] if found else None


def stale_warning(reference: Reference, source_name: str, since: float) -> str:
    """What people are told."""
    return f"{reference}: {source_name} cannot be reached; this is what the tag meant {age(time.time() - since)} ago"


def age(seconds: float) -> str:
    """`7200` → `2 h`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
