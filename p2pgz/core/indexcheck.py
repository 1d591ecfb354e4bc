"""Is this index true? A receiver's check of an index that somebody else made, chunk by chunk as they come.

Called by `fetch.plainshare` and `fetch.indexes`. That every chunk has its digest and the stream its diffID says nothing
about names, modes and which file a chunk belongs to: the index states those beside the stream. So the rebuilt stream is
indexed anew, as if it had come from the registry, and the two must agree. Sans-io; memory is bounded by one chunk.
"""

from __future__ import annotations

from p2pgz.core.model import Chunk
from p2pgz.core.ownindex import OtherBytes, PlainIndex, PlainIndexer, stored_chunks
from p2pgz.errors import ImageInvalid


class IndexCheck:
    """Feed it the payloads of `chunks`, in that order, whose digests the caller has checked; then `finish`."""

    def __init__(self, index: PlainIndex) -> None:
        self.chunks: list[Chunk] = stored_chunks(index.toc)
        self._index = index
        self._indexer = PlainIndexer(chunk_bytes=index.chunk_bytes)
        self._others = OtherBytes(index.other)
        self._taken = 0
        self._position = 0

    @property
    def taken(self) -> int:
        """How many chunks have been fed."""
        return self._taken

    def take(self, payload: bytes) -> None:
        """The next chunk; raises ImageInvalid when what there is by now is no layer."""
        chunk = self.chunks[self._taken]
        self._other_bytes(chunk.offset)
        self._indexer.feed(payload)
        self._position = chunk.end
        self._taken += 1

    def finish(self) -> PlainIndex:
        """All chunks have been fed: the index of the stream that they make; raises ImageInvalid when it is another one."""
        assert self._taken == len(self.chunks)
        self._other_bytes(self._index.stream_bytes)
        self._others.finish()
        found = self._indexer.finish()
        said = self._index.toc
        if found.toc.digest != said.digest:
            raise _lie(f"its stream is {found.toc.digest}, not {said.digest}")
        if found.toc.entries != said.entries:
            raise _lie(f"it does not say what is in the stream {said.digest}")
        return found

    def _other_bytes(self, end: int) -> None:
        for piece in self._others.take(end - self._position):
            self._indexer.feed(piece)
        self._position = end


def _lie(what: str) -> ImageInvalid:
    return ImageInvalid(
        f"index of a plain layer: {what}", hint="who made it lied; the layer is read from the registry"
    )
