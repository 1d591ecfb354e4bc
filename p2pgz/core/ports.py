"""The protocols where packages meet: registry, local layouts, pool and peers know only these.

Each has one conformance suite in `p2pgz.testing`, run on the fake and on the real implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from p2pgz.core.media import Descriptor
from p2pgz.core.reference import Reference


class ImageSource(Protocol):
    """A repository: a registry's, or a local OCI layout. Raises ImageNotFound, AuthRefused, SourceUnavailable, ImageInvalid.

    All calls are safe to cancel, to repeat, and to run at the same time. Time-outs are the caller's.
    """

    name: str
    """what to call it in messages: `registry.example/repo`, `oci:DIR`; never holds a secret"""

    async def resolve(self, reference: Reference) -> Descriptor:
        """The descriptor of what the reference's tag or digest names (an index or a manifest).

        A digest may cost no request: the descriptor then has no media type and the size SIZE_UNKNOWN.
        """
        ...

    async def document(self, descriptor: Descriptor) -> bytes:
        """A manifest, index, config or other small blob; size and digest are checked against the descriptor."""
        ...

    def blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream exactly the bytes `start` .. `end` (exclusive) of a blob, not verified.

        Leaving the context early gives up the rest. A body that is too short or too long, or another range than asked
        for, raises SourceUnavailable. Retries that resume in the middle are the source's business.
        """
        ...


class ImageSink(Protocol):
    """Where `convert` writes an image: a registry's repository or a local OCI layout."""

    name: str

    async def has_blob(self, digest: str) -> bool:
        """Whether the blob is there already (then it need not be sent)."""
        ...

    async def put_blob(self, descriptor: Descriptor, read: Callable[[], AsyncIterator[bytes]]) -> None:
        """Send a blob; `read` starts a new pass over its bytes and may be called again for a retry."""
        ...

    async def put_document(self, document: bytes, media_type: str, reference: Reference | None) -> Descriptor:
        """Store a manifest or index; under the reference's tag, or by digest only when it is None."""
        ...
