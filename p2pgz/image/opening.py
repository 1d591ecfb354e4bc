"""One image while it is being opened: what was asked for, whence, and what the opener needs beside itself.

Called by `image.open` only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import Descriptor, ImageConfig, Manifest, parse_config
from p2pgz.core.ports import ImageSource
from p2pgz.core.reference import Reference
from p2pgz.core.tail import shared_document
from p2pgz.errors import IntegrityError, StateError
from p2pgz.fetch.shares import Place
from p2pgz.pool.segment import SHARED_DOMAIN

BROKEN_HINT: Final = "this copy is damaged or was built wrongly: get another one, or tell its publisher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An image whose manifest is known."""

    reference: Reference
    source: ImageSource
    manifest: Manifest
    place: Place
    allow_unverified_toc: bool
    lowest: int = 0
    """only so many of its layers; 0: all"""

    @property
    def is_part(self) -> bool:
        """Whether it is less than the image."""
        return 0 < self.lowest < len(self.manifest.layers)

    @property
    def tree_name(self) -> str:
        """The file that its tree is kept in."""
        domain = self.place.domain
        suffix = "" if domain == SHARED_DOMAIN else "-" + Digest.of(domain.encode()).hex[:16]
        part = f"-{len(self.layers)}" if self.is_part else ""
        return f"{self.place.manifest.hex}{part}{suffix}.tree"

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The layers that are wanted."""
        return self.manifest.layers[: self.lowest] if self.is_part else self.manifest.layers


def documents_of(manifest: Manifest) -> list[Digest]:
    """Config and TOCs, as peers ask for them."""
    tocs = [shared_document(layer.annotations) for layer in manifest.layers]
    return [manifest.config.digest, *(digest for digest in tocs if digest is not None)]


class Away:
    """A source that is not to be asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def resolve(self, reference: Reference) -> Descriptor:
        raise self._error()

    async def document(self, descriptor: Descriptor) -> bytes:
        raise self._error()

    def blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        raise self._error()

    def _error(self) -> StateError:
        return StateError(
            f"{self.name}: too little of an image is kept here", hint="mount it while its source answers"
        )


async def silent(_: dict[str, Any]) -> None:
    """Progress that nobody waits for."""
    await trio.lowlevel.checkpoint()


class LazyConfig:
    """The image's config, fetched beside the layers: plain layers need their diff ids, and its errors are the image's."""

    def __init__(self, manifest: Manifest, read: Callable[[], Awaitable[bytes]]) -> None:
        self._manifest = manifest
        self._read = read
        self._config: ImageConfig | None = None
        self._loaded = trio.Event()

    async def load(self) -> None:
        """Read it; raises what `read` raises, or ImageInvalid."""
        document = await self._read()
        where = f"config {self._manifest.config.digest}"
        self._config = parse_config(document, len(self._manifest.layers), where=where)
        self._loaded.set()

    async def diff_id(self, number: int) -> Digest:
        """The diff id of a layer; when loading fails the nursery of both cancels this wait."""
        await self._loaded.wait()
        assert self._config is not None
        return self._config.diff_ids[number]


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Several layers may fail at once; the user needs the first cause, the group stays its `__cause__`."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return first_error(error)
        return error
    return group


@contextmanager
def naming(reference: Reference) -> Iterator[None]:
    """Say of every broken image which one it is, and what to do about it."""
    try:
        yield
    except IntegrityError as error:
        if str(reference) not in error.what:
            error.what = f"{reference}: {error.what}"
        error.hint = error.hint or BROKEN_HINT
        raise
