"""Manifests, indexes and configs of images (OCI image spec 1.1, Docker schema 2): strict parsing with limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pgz.core.digest import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a document says about a blob: where it is is the business of a source."""

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()
