"""Which of a peer's addresses are worth dialling. Used by `p2p.host`."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from multiaddr import Multiaddr

log = structlog.get_logger(component="libp2p")

_P2P_CODE = 0x01A5  # multicodec table
_NETWORKS = ("ip4", "ip6", "dns", "dns4", "dns6")


def dialable(addresses: Sequence[bytes], own: Sequence[bytes]) -> tuple[bytes, ...]:
    """Plain TCP addresses, without the peer id at their end, and none that is ours as well (bridges: 172.17.0.1)."""
    found = []
    for raw in addresses:
        try:
            address = Multiaddr(raw)
            names = [protocol.name for protocol in address.protocols()]
            if names[-1:] == ["p2p"]:
                address = address.decapsulate_code(_P2P_CODE)
                names.pop()
        except Exception as error:  # noqa: BLE001  # peers send these bytes; the library raises many types
            log.debug("address.malformed", reason=str(error)[:200])
            continue
        if len(names) == 2 and names[0] in _NETWORKS and names[1] == "tcp" and address.to_bytes() not in own:
            found.append(address.to_bytes())
    return tuple(dict.fromkeys(found))
