"""A `FakeRegistry` that serves from a thread, for tests that wait for real processes."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import trio

from p2pgz.testing.fake_registry import FakeRegistry
from p2pgz.testing.registry_faults import Fault

START_SECONDS = 10.0


class RegistryThread:
    """The registry, and what tests do with it: plain attribute and list changes, safe between requests."""

    def __init__(self, fake: FakeRegistry) -> None:
        self.fake = fake
        self.address = fake.address

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[RegistryThread]:
        """Serve until the block ends."""
        made: queue.SimpleQueue[tuple[FakeRegistry, trio.lowlevel.TrioToken, trio.CancelScope]] = (
            queue.SimpleQueue()
        )

        async def serve() -> None:
            async with FakeRegistry.open() as fake:
                with trio.CancelScope() as scope:
                    made.put((fake, trio.lowlevel.current_trio_token(), scope))
                    await trio.sleep_forever()

        thread = threading.Thread(target=trio.run, args=[serve], name="fake registry")
        thread.start()
        fake, token, scope = made.get(timeout=START_SECONDS)
        try:
            yield cls(fake)
        finally:
            token.run_sync_soon(scope.cancel)
            thread.join()

    def spoil(self, *faults: Fault) -> None:
        """From now on these faults, and no others."""
        self.fake.faults[:] = faults

    def blob_requests(self) -> int:
        """How many blobs or parts of blobs were asked for so far."""
        return len(self.fake.seen("GET", "/blobs/"))
