"""The request of the control API that asks what would be lost without the registry."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from starlette.routing import Route

from p2pgz.web.requests import ImageFields
from p2pgz.web.streaming import Progress, events


class DrillRequest(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask which chunks of an image neither this node nor a peer of it has; `fix`: fetch those."""

    fix: bool = False


class Drills(Protocol):
    """What the node offers here; see `web.api.Control`."""

    async def drill(self, request: DrillRequest, progress: Progress) -> dict[str, Any]: ...


def drill_routes(drills: Drills) -> list[Route]:
    """Its route."""
    return [Route("/v1/drill", partial(events, drills.drill, DrillRequest), methods=["POST"])]
