"""What the snapshotter asks by the control API: which part of an image a layer completes; it tells what is unpacked."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.routing import Route

from p2pgz.web.requests import ImageFields
from p2pgz.web.streaming import Progress, events


class LayerRequest(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Open an image and find the layer with the blob `layer` that, with those below it, has this `chain_id`. With
    `verified_diffids` each layer up to it is read once and compared with its diff id."""

    layer: str
    chain_id: str
    verified_diffids: bool = False


class UnpackedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Remember that containerd unpacks a layer, and why; reference and layer are empty when it named none."""

    reference: str
    layer: str
    key: str
    reason: str


class Layers(Protocol):
    """What the node offers here; see `web.api.Control`."""

    def status(self) -> list[dict[str, Any]]: ...

    async def find(self, request: LayerRequest, progress: Progress) -> dict[str, Any]: ...

    async def unpacked(self, request: UnpackedRequest, progress: Progress) -> dict[str, Any]: ...


def routes(layers: Layers) -> list[Route]:
    """Their routes."""
    return [
        Route("/v1/layers", partial(events, layers.find, LayerRequest), methods=["POST"]),
        Route("/v1/layers/unpacked", partial(events, layers.unpacked, UnpackedRequest), methods=["POST"]),
    ]
