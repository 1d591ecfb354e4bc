"""What is known of a layer that was opened: for reading it, and for never asking for it twice.

Made by `image.layers`; the tree file and `layers/KEY.json` keep parts of it (docs/reference/disk-format.md).
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import msgspec

from p2pgz.core.footer import FooterKind
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor
from p2pgz.core.model import Toc
from p2pgz.core.tail import Opened
from p2pgz.core.toc import parse_toc
from p2pgz.errors import ImageInvalid
from p2pgz.pool.segment import SHARED_DOMAIN, Segment


class LayerRecord(msgspec.Struct, frozen=True):
    """What a tree file remembers of each layer."""

    segment: str
    blob: str
    streamed: bool
    unverified: bool
    prefetch_end: int


class LayerFacts(msgspec.Struct, frozen=True):
    """What `layers/KEY.json` remembers: enough to parse the kept TOC again."""

    document: str
    kind: FooterKind | Literal["plain"]
    compression: Literal["gzip", "zstd", "none"]
    payload_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLayer:
    """A layer that can be merged and read."""

    toc: Toc
    layout: SegmentLayout
    segment: Segment
    record: LayerRecord


def domain_of(record: LayerRecord, domain: str) -> str:
    """The dedup domain of a layer of an image that belongs to `domain`.

    What nothing vouches for stays by itself, so that it can never stand in for others.
    """
    if not record.unverified:
        return domain
    own = f"unverified-{record.blob.removeprefix('sha256:')}"
    return own if domain == SHARED_DOMAIN else f"{domain}-{own}"


def facts_name(descriptor: Descriptor) -> str:
    """The file that facts are kept in: by all that a manifest says of the layer, since that is what vouches for them."""
    key = hashlib.sha256(
        msgspec.json.encode([str(descriptor.digest), descriptor.size, sorted(descriptor.annotations.items())])
    )
    return f"{key.hexdigest()}.json"


def laid_out(descriptor: Descriptor, opened: Opened, known: Segment | None) -> tuple[Opened, SegmentLayout]:
    """The layout, as the pool knows it if it does: where the last member ends the footer alone tells, and who opened the
    layer by its document has taken it for longer (`core.tail.open_document`). Runs in a thread."""
    layout = SegmentLayout.build(opened.toc, compression=opened.compression)
    if known is None or known.has_table(layout.to_bytes()):
        return opened, layout
    footer = opened.footer._replace(payload_end=max(known.table.blob_end, default=0))
    with suppress(ImageInvalid):
        toc = parse_toc(
            opened.toc_json, kind=footer.kind, payload_end=footer.payload_end, blob_size=descriptor.size
        )
        same = SegmentLayout.build(toc, compression=opened.compression)
        if known.has_table(same.to_bytes()):
            return opened._replace(toc=toc, footer=footer), same
    return opened, layout
