"""What the snapshotter asks of a node: which part of an image a layer completes. `web.layers.Layers`.

Made by `node.Node`. The chain id that containerd will keep a layer under is computed anew from the image's own config, so
that nobody's label can put one image's layers under the name of another's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import trio

from p2pgz.core.chain import chain_ids
from p2pgz.core.digest import Digest
from p2pgz.core.media import ImageConfig, Manifest
from p2pgz.core.ports import ImageSource
from p2pgz.core.reference import parse_reference
from p2pgz.errors import ImageInvalid, ImageNotFound
from p2pgz.fetch.diffids import DiffIds, check_blob
from p2pgz.image.layer_records import OpenLayer
from p2pgz.image.open import ImageOpener
from p2pgz.image.opened import ImageRecord, OpenImage
from p2pgz.registry.sources import Sources
from p2pgz.web.api import MountRequest
from p2pgz.web.layers import LayerRequest, UnpackedRequest
from p2pgz.web.streaming import Progress

log = structlog.get_logger(component="node")

# What `status` shows; the log has all
UNPACKED_KEPT: Final = 100
REASON_MAX_LETTERS: Final = 1000
# of a LayerRequest, beside those of a MountRequest
OWN_FIELDS: Final = frozenset({"layer", "chain_id", "verified_diffids"})

Open = Callable[[MountRequest, Progress], Awaitable[OpenImage]]


class Layers:
    """The answers of one node."""

    def __init__(self, open_image: Open, opener: ImageOpener, sources: Sources, state_path: Path) -> None:
        self._open = open_image
        self._sources = sources
        self._opener = opener
        self.diff_ids = DiffIds(state_path)
        self._unpacked: deque[dict[str, Any]] = deque(maxlen=UNPACKED_KEPT)

    def status(self) -> list[dict[str, Any]]:
        """The layers that containerd unpacked, the last ones."""
        return list(self._unpacked)

    async def find(self, request: LayerRequest, progress: Progress) -> dict[str, Any]:
        """Open the image, and find the layer by both of its names."""
        layer, chain_id = Digest.parse(request.layer), Digest.parse(request.chain_id)
        fields = msgspec.to_builtins(request)
        asked = MountRequest(**{name: fields[name] for name in fields if name not in OWN_FIELDS})
        image = await self._open(asked, progress)
        reference = parse_reference(image.reference)
        source = await self._sources.get(reference, asked)
        manifest, config = await self._opener.config(reference, source, image)
        chains = chain_ids(config.diff_ids)
        if chain_id not in chains:
            raise ImageNotFound(
                f"{image.reference}: no layer of {image.digest} has the chain id {chain_id}",
                hint="its tag may have moved while it was pulled: pull it again",
            )
        number = chains.index(chain_id)
        if manifest.layers[number].digest != layer:
            raise ImageInvalid(
                f"{image.reference}: layer {number + 1} of {image.digest} is "
                f"{manifest.layers[number].digest}, not {layer}"
            )
        await self._vouch(image, manifest, config, source, require=request.verified_diffids)
        return {
            "reference": str(reference.with_digest(image.digest)),
            "digest": str(image.digest),
            "layers": number + 1,
            "total": len(chains),
            "chain_ids": [str(one) for one in chains],
            "layer_digests": [str(one.digest) for one in manifest.layers],
            "warnings": image.warnings,
        }

    async def _vouch(
        self,
        image: OpenImage,
        manifest: Manifest,
        config: ImageConfig,
        source: ImageSource,
        *,
        require: bool,
    ) -> None:
        """Raise ImageInvalid unless all layers may stand for their diff ids."""
        reference = parse_reference(image.reference)
        opened: list[OpenLayer] = []
        known = msgspec.json.decode(image.tree.info, type=ImageRecord).layers

        for number, record in enumerate(known):

            async def check(number: int = number) -> Digest:
                if not opened:
                    opened.extend(await self._opener.layers_of(reference, source, image))
                return await check_blob(source, manifest.layers[number], opened[number].toc)

            await self.diff_ids.admit(
                config.diff_ids[number],
                Digest.parse(record.segment),
                check,
                checked=record.streamed,
                require=require,
                reference=image.reference,
            )

    async def unpacked(self, request: UnpackedRequest, progress: Progress) -> dict[str, Any]:
        """Keep a reason for `status` and `why`."""
        await trio.lowlevel.checkpoint()
        document: dict[str, Any] = msgspec.to_builtins(request)
        document = {name: text[:REASON_MAX_LETTERS] for name, text in document.items()}
        self._unpacked.append({"at": time.time(), **document})
        log.warning("layer.unpacked", **document)
        return {}
