"""The requests of the control API that only look: who provides something, and where a file's bytes came from."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.routing import Route

from p2pgz.web.streaming import Progress, events


class FindRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask who provides what a digest or CID names."""

    digest: str
    timeout_seconds: float = 10.0


class WhyRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask where the bytes of a file came from, or those of a directory's files; `path` is that of a mount, or below it."""

    path: str


class Questions(Protocol):
    """What the node offers here; see `web.api.Control`."""

    async def find(self, request: FindRequest, progress: Progress) -> dict[str, Any]: ...

    async def why(self, request: WhyRequest, progress: Progress) -> dict[str, Any]: ...


def routes(questions: Questions) -> list[Route]:
    """Their routes."""
    return [
        Route("/v1/find", partial(events, questions.find, FindRequest), methods=["POST"]),
        Route("/v1/why", partial(events, questions.why, WhyRequest), methods=["POST"]),
    ]
