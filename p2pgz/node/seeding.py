"""Seeds: images that this node keeps whole, pinned, and gives to its peers. What to do next is decided in `core.seeding`.

Made by `node.run`; the methods are `web.seeds.Seeds`. Each seed is a task of the node's: a command that asked for it only
watches, and may go away. What is fetched comes from wherever `fetch` gets it first; being provided needs nothing more than
being here (`fetch.discovery`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable
from typing import Any, Final, Protocol

import msgspec
import structlog
import trio

from p2pgz.config import SeedConfig
from p2pgz.core.digest import Digest
from p2pgz.core.platform import Platform
from p2pgz.core.reference import Reference, parse_reference
from p2pgz.core.schedule import Priority
from p2pgz.core.seeding import (
    FROM_COMMAND,
    FROM_CONFIG,
    Rate,
    SeedKey,
    at_start,
    retry_seconds,
    spread,
    unneeded,
)
from p2pgz.errors import ConfigError, ImageNotFound, P2pgzError, PoolFull, SourceUnavailable, UsageError
from p2pgz.fetch.background import batches
from p2pgz.fetch.limiter import Throttle
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.image.opening import first_error
from p2pgz.node.seeds import (
    COMPLETE,
    FETCHING,
    LOOKING,
    WAITING,
    LayerProgress,
    Seed,
    is_whole,
    measured,
    progress_event,
    whole_segments,
)
from p2pgz.node.upkeep import Upkeep
from p2pgz.pool.catalog import Catalog, SeedRecord
from p2pgz.web.api import MountRequest
from p2pgz.web.seeds import SeedRequest, UnseedRequest
from p2pgz.web.streaming import Progress

log = structlog.get_logger(component="seed")

SEEDS_AT_ONCE: Final = 2
LAYERS_AT_ONCE: Final = 3
# Small enough to show progress, large enough that the pause between two does not count
BATCH_BYTES: Final = 4 << 20
# At a low rate a batch takes a second, so that what is shown moves
BATCH_MIN_BYTES: Final = 128 << 10
REPORT_SECONDS: Final = 0.5
# What is freed may go to chunks that others have read and that wait in memory for room; those can be evicted in their turn
ROOM_TRIES: Final = 3
# A follower has time: a slow registry must not look like one that is away
TAG_SECONDS: Final = 30.0


class OpenImages(Protocol):
    """How the node opens an image by reference."""

    def __call__(
        self, request: MountRequest, progress: Progress, *, tag_seconds: float
    ) -> Awaitable[OpenImage]: ...


class Seeder:
    """The seeds of a node. `open_image` is the node's."""

    def __init__(
        self,
        config: SeedConfig,
        catalog: Catalog,
        fetcher: ChunkFetcher,
        upkeep: Upkeep,
        open_image: OpenImages,
        platform: Platform,
        *,
        has_peers: bool,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._fetcher = fetcher
        self._upkeep = upkeep
        self._open_image = open_image
        self._platform = platform
        self._persistent = False
        self._has_peers = has_peers
        self._limiter = Throttle(config.bytes_per_second)
        self._at_once = trio.CapacityLimiter(SEEDS_AT_ONCE)
        self._seeds: dict[SeedKey, Seed] = {}
        self._nursery: trio.Nursery | None = None

    def status(self) -> list[dict[str, Any]]:
        """All seeds."""
        return [seed.status() for seed in self._seeds.values()]

    async def start(self, nursery: trio.Nursery, *, persistent: bool) -> None:
        """Take up what earlier runs seeded, and what the configuration names. Asks nobody before it returns.

        A node that is not persistent ends with its last mount: it seeds nothing, and lets nothing go.
        """
        self._nursery = nursery
        self._persistent = persistent
        if persistent:
            await self._compare()
        elif self._config.images or self._catalog.seeds():
            log.info("seeds.not_now", effect="this node ends after its last mount: `p2pgz node` seeds")

    async def adopt(self, config: SeedConfig) -> None:
        """Go on with a changed configuration."""
        self._config = config
        self._limiter.bytes_per_second = config.bytes_per_second
        if self._persistent:
            await self._compare()

    async def _compare(self) -> None:
        """Begin what the configuration and the record name, and end what only the configuration of before has named."""
        configured = [self._key(reference, "") for reference in configured_seeds(self._config)]
        recorded = {SeedKey(seed.reference, seed.platform): seed for seed in self._catalog.seeds()}
        start = at_start({key: seed.origin for key, seed in recorded.items()}, configured)
        for key in start.dropped:
            del recorded[key]
            await self._end(key)
        for key, record in recorded.items():
            running = self._seeds.get(key)
            request = _recorded(record) if running is None else running.request
            follows = request.watch or key in configured
            if running is None or running.follows != (follows and running.reference.digest is None):
                self._begin(key, request, record.origin, follows=follows)
        for key in start.new:
            request = SeedRequest(reference=key.reference)
            await self._remember(key, request, FROM_CONFIG)
            self._begin(key, request, FROM_CONFIG, follows=True)

    async def add(self, request: SeedRequest, progress: Progress) -> dict[str, Any]:
        """Seed an image, or do so again: the tag is looked up anew. Returns when it is complete.

        An image that cannot be opened is no seed; one that is open is fetched until it is here, whoever still watches.
        """
        if not self._persistent or self._nursery is None:
            raise UsageError(
                "this node ends after its last mount and cannot seed",
                hint="end it (unmount, wait some seconds), start `p2pgz node`, and seed again",
            )
        reference = parse_reference(request.reference)
        key = self._key(reference, request.platform)
        before = self._seeds.get(key)
        await progress({"event": "progress", "text": f"looking {reference} up"})
        opened = await self._open(request, reference)
        origin = FROM_COMMAND if before is None else before.origin
        follows = request.watch or (before is not None and before.origin == FROM_CONFIG)
        await self._remember(key, request, origin)
        seed = self._begin(key, request, origin, follows=follows, opened=opened)
        return await self._watch(seed, progress)

    async def remove(self, request: UnseedRequest, progress: Progress) -> dict[str, Any]:
        """Keep an image no longer; its chunks go when their room is needed."""
        reference = str(parse_reference(request.reference))
        platform = str(Platform.parse(request.platform)) if request.platform else ""
        found = [key for key in self._seeds if key.reference == reference and platform in ("", key.platform)]
        if not found:
            raise ImageNotFound(f"{reference}: not seeded", hint="`p2pgz seed --list` shows the seeds")
        configured = {self._key(reference, "") for reference in configured_seeds(self._config)}
        if kept := configured.intersection(found):
            raise UsageError(
                f"{next(iter(kept)).reference}: is seeded because the configuration says so",
                hint="take it out of seed.images, then send the node SIGHUP",
            )
        for key in found:
            await self._end(key)
        return {"removed": [key._asdict() for key in found]}

    # --- records

    def _key(self, reference: Reference, platform: str) -> SeedKey:
        return SeedKey(str(reference), str(Platform.parse(platform) if platform else self._platform))

    async def _remember(self, key: SeedKey, request: SeedRequest, origin: str) -> None:
        kept = msgspec.structs.replace(request, user="")  # credentials are never written down
        document = msgspec.json.encode(kept).decode()
        await self._catalog.put_seed(
            SeedRecord(
                reference=key.reference,
                platform=key.platform,
                origin=origin,
                request=document,
                since=time.time(),
            )
        )

    async def _end(self, key: SeedKey) -> None:
        seed = self._seeds.pop(key, None)
        if seed is not None:
            seed.scope.cancel()
            seed.tell()
            await seed.ended.wait()  # what it may just be pinning is pinned by then
        for pin in self._catalog.pins(key.owner):
            await self._catalog.unpin(pin.manifest, owner=key.owner)
        await self._catalog.remove_seed(key.reference, key.platform)
        log.info("seed.removed", reference=key.reference)

    # --- the tasks

    def _begin(
        self,
        key: SeedKey,
        request: SeedRequest,
        origin: str,
        *,
        follows: bool,
        opened: OpenImage | None = None,
    ) -> Seed:
        """Start a seed's task, in place of the one that it may have."""
        assert self._nursery is not None
        if (before := self._seeds.get(key)) is not None:
            before.scope.cancel()
            before.tell()
        reference = parse_reference(key.reference)
        seed = Seed(key, reference, request, origin, follows and reference.digest is None)
        self._seeds[key] = seed
        self._nursery.start_soon(self._live, seed, opened)
        return seed

    async def _live(self, seed: Seed, opened: OpenImage | None) -> None:
        """Fetch, then follow the tag, for ever or until removed."""
        failures = 0
        with seed.scope:
            while True:
                wait_seconds = 0.0
                try:
                    async with self._at_once:
                        await self._round(seed, opened)
                    failures = 0
                    wait_seconds = self._next_look_seconds(seed)
                except P2pgzError as error:
                    seed.error = error
                except Exception as error:  # a bug in here must not end the node
                    log.exception("seed.bug", reference=seed.key.reference)
                    seed.error = P2pgzError(f"internal error: {error!r}")
                opened = None
                if seed.error is not None:
                    failures += 1
                    wait_seconds = seed.again_seconds = retry_seconds(failures, random.random())  # noqa: S311
                    log.warning(
                        "seed.waits",
                        reference=seed.key.reference,
                        reason=str(seed.error),
                        again_seconds=round(wait_seconds, 1),
                    )
                    seed.becomes(WAITING)
                await trio.sleep(wait_seconds)
                seed.error = None
        seed.ended.set()

    def _next_look_seconds(self, seed: Seed) -> float:
        if not seed.follows or not self._config.watch_seconds:
            return float("inf")
        return spread(self._config.watch_seconds, random.random())  # noqa: S311  # guards nothing

    async def _round(self, seed: Seed, opened: OpenImage | None) -> None:
        """Make sure that all of what the reference means now is here; only then let go of what it meant before."""
        known = None if seed.follows else seed.digest or self._pinned(seed)
        reference = seed.reference if known is None else seed.reference.with_digest(known)
        image = opened or await self._open(seed.request, reference)
        if image.digest != seed.digest:
            log.info("seed.begins", reference=seed.key.reference, digest=str(image.digest))
        seed.digest, seed.stale_since, seed.warnings = image.digest, image.stale_since, image.warnings
        await self._upkeep.pin(image, owner=seed.key.owner)
        await self._fetch(seed, image)
        for digest in unneeded((pin.manifest for pin in self._catalog.pins(seed.key.owner)), image.digest):
            await self._catalog.unpin(digest, owner=seed.key.owner)
            log.info("seed.replaced", reference=seed.key.reference, old=str(digest), new=str(image.digest))
        if seed.state != COMPLETE:
            log.info("seed.complete", reference=seed.key.reference, digest=str(image.digest))
        seed.becomes(COMPLETE)

    def _pinned(self, seed: Seed) -> Digest | None:
        """What an earlier run has settled on, for a seed that does not follow its tag."""
        pins = self._catalog.pins(seed.key.owner)
        return pins[-1].manifest if pins else None

    async def _open(self, request: SeedRequest, reference: Reference) -> OpenImage:
        fields = msgspec.structs.asdict(request)
        del fields["watch"]
        fields["reference"] = str(reference)
        return await self._open_image(MountRequest(**fields), _silent, tag_seconds=TAG_SECONDS)

    async def _fetch(self, seed: Seed, image: OpenImage) -> None:
        segments = list(dict.fromkeys(whole_segments(image)))
        if segments == [layer.segment for layer in seed.layers] and all(map(is_whole, segments)):
            await trio.lowlevel.checkpoint()
            return
        for last in (*[False] * ROOM_TRIES, True):
            seed.layers = await trio.to_thread.run_sync(measured, segments)
            seed.becomes(FETCHING)
            try:
                await self._fetch_layers(seed)
                return
            except PoolFull as error:
                full = error
            seed.layers = await trio.to_thread.run_sync(measured, segments)
            missing = seed.total_bytes - seed.done_bytes
            if last:
                raise PoolFull(
                    f"{seed.key.reference}: {missing} bytes of it have no room",
                    hint="raise pool.quota_bytes, free some space, or let go of other seeds and pins",
                ) from full
            await self._upkeep.make_room(missing)

    async def _fetch_layers(self, seed: Seed) -> None:
        limit = trio.CapacityLimiter(LAYERS_AT_ONCE)
        try:
            async with trio.open_nursery() as nursery:
                for layer in seed.layers:
                    nursery.start_soon(self._fetch_layer, seed, layer, limit)
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _fetch_layer(self, seed: Seed, layer: LayerProgress, limit: trio.CapacityLimiter) -> None:
        segment = layer.segment
        size = segment.table.size
        origin = self._fetcher.origin(segment)
        order = origin.order.chunk_at if origin is not None else range(segment.table.chunk_count)
        rate = self._limiter.bytes_per_second
        most = min(BATCH_BYTES, max(BATCH_MIN_BYTES, rate)) if rate else BATCH_BYTES
        async with limit:
            for batch in batches(segment, order, None, batch_bytes=most):
                batch_bytes = sum(size[n] for n in batch)
                await self._limiter.take(batch_bytes)
                await self._fetcher.ensure_chunks(segment, batch, Priority.START_UP)
                await self._fetcher.keep(segment, batch)
                layer.done_bytes += batch_bytes
                seed.tell()
        if not is_whole(segment):  # what has no room goes through memory
            raise PoolFull(f"{seed.key.reference}: chunks of layer {segment.id} were not kept")

    # --- those who watch

    async def _watch(self, seed: Seed, progress: Progress) -> dict[str, Any]:
        """Report until the seed is complete; raises what waiting does not help against."""
        begun = trio.current_time()
        rate = Rate()
        done_layers: set[Digest] = set()
        while True:
            if seed.state != LOOKING:  # it is open, and begins in a moment
                await progress(progress_event(seed, rate, done_layers))
            if seed.state == COMPLETE:
                break
            if (
                seed.state == WAITING
                and seed.error is not None
                and not isinstance(seed.error, SourceUnavailable)
            ):
                raise type(seed.error)(seed.error.what, hint=seed.error.hint)
            if self._seeds.get(seed.key) is not seed:
                raise ImageNotFound(f"{seed.key.reference}: was taken back, or asked for again, meanwhile")
            state = seed.state
            with trio.move_on_after(REPORT_SECONDS):
                while seed.state == state:
                    await seed.changed.wait()
        warnings = list(seed.warnings)
        if not self._has_peers:
            warnings.append("this node has no peers: nobody is given anything (peers.enabled)")
        return {**seed.status(), "seconds": trio.current_time() - begun, "warnings": warnings}


def configured_seeds(config: SeedConfig) -> list[Reference]:
    """`seed.images`; raises ConfigError for what is no reference."""
    try:
        return [parse_reference(text) for text in config.images]
    except UsageError as error:
        raise ConfigError(f"seed.images: {error.what}", hint=error.hint) from error


def _recorded(seed: SeedRecord) -> SeedRequest:
    try:
        return msgspec.json.decode(seed.request, type=SeedRequest)
    except msgspec.MsgspecError:  # another version's: what matters is the reference
        return SeedRequest(reference=seed.reference, platform=seed.platform)


async def _silent(_: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()
