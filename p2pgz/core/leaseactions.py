"""What `core.leases` tells its caller to do. Done in order; none of them may be dropped without saying so to the machine."""

from __future__ import annotations

from typing import NamedTuple

from p2pgz.core.crowdmsg import CrowdFrame


class Send(NamedTuple):
    """To that peer; it may have to be connected to first. When it cannot be, the caller says `lost`."""

    peer: bytes
    frame: CrowdFrame


class Forget(NamedTuple):
    """Say FORGET of a request: this node does not wait for it any more. What comes all the same is welcome."""

    peer: bytes
    request: int


class Serve(NamedTuple):
    """Send these chunks, which are here, as the answer to that FOLLOW; say `sent` when they are on their way."""

    peer: bytes
    request: int
    swarm: bytes
    extent: int
    chunks: tuple[int, ...]
    priority: int


class Fetch(NamedTuple):
    """Fetch from the registry, on behalf of all; then say `landed` or `failed`."""

    swarm: bytes
    extent: int
    chunks: tuple[int, ...]
    priority: int


class Direct(NamedTuple):
    """Fetch from the registry for this node's own readers, who have waited long enough. No lease stands behind it."""

    swarm: bytes
    extent: int
    chunks: tuple[int, ...]


Action = Send | Forget | Serve | Fetch | Direct
