"""The requests of the control API about seeds: images that the node keeps whole and gives to its peers."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from p2pgz.web.requests import ImageFields
from p2pgz.web.streaming import Progress, events


class SeedRequest(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fetch all of an image, keep it, give it to peers; with `watch` follow its tag."""

    allow_unverified_toc: bool = False
    watch: bool = False


class UnseedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Let an image go that was seeded under this reference; no `platform`: for all platforms."""

    reference: str
    platform: str = ""


class Seeds(Protocol):
    """What the node offers here; see `web.api.Control`."""

    def status(self) -> list[dict[str, Any]]: ...

    async def add(self, request: SeedRequest, progress: Progress) -> dict[str, Any]: ...

    async def remove(self, request: UnseedRequest, progress: Progress) -> dict[str, Any]: ...


def routes(seeds: Seeds) -> list[Route]:
    """Their routes."""

    async def listed(_: Request) -> JSONResponse:
        return JSONResponse({"seeds": seeds.status()})

    return [
        Route("/v1/seeds", listed),
        Route("/v1/seeds", partial(events, seeds.add, SeedRequest), methods=["POST"]),
        Route("/v1/seeds/remove", partial(events, seeds.remove, UnseedRequest), methods=["POST"]),
    ]
