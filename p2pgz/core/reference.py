"""Image references: the distribution grammar, and `oci:`/`oci-archive:` for local layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2pgz.core.digest import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A parsed reference. `transport` tells which fields count.

    registry: `host` (`docker.io`, `localhost:5000`), `repository`, `tag`, `digest`. oci, oci-archive: `path`, `tag`.
    """

    transport: Literal["registry", "oci", "oci-archive"]
    host: str = ""
    repository: str = ""
    path: str = ""
    tag: str = ""
    digest: Digest | None = None
