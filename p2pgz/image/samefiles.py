"""Files of an image that are on this disk already, in segments of other layers. Called by `image.open`."""

from __future__ import annotations

from typing import Final

import trio

from p2pgz.core.content import FileRef, content_key
from p2pgz.image.layer_records import OpenLayer
from p2pgz.pool.pool import Pool

# 2 us a key: a step of 4 ms
LOOKUP_KEYS: Final = 2048


async def shared_files(pool: Pool, layers: list[OpenLayer], domain: str) -> dict[bytes, FileRef]:
    """Files of these layers that other segments hold completely, asked for in steps that do not stall the loop."""
    own = {layer.segment.id for layer in layers}
    keys = await trio.to_thread.run_sync(
        lambda: list(
            {content_key(entry.chunks) for layer in layers for entry in layer.toc.entries if entry.chunks}
        )
    )
    found: dict[bytes, FileRef] = {}
    if all(layer.record.unverified for layer in layers):
        return found
    for start in range(0, len(keys), LOOKUP_KEYS):
        found |= pool.lookup_files(domain, keys[start : start + LOOKUP_KEYS])
        await trio.lowlevel.checkpoint()
    return {key: ref for key, ref in found.items() if ref.segment not in own}
