"""Layers that nobody converted, joined to the peers: who is believed, and the task that checks it. Called by `node.run`."""

from __future__ import annotations

from pathlib import Path

import trio

from p2pgz.config import PeersConfig
from p2pgz.core.peerid import PeerId
from p2pgz.fetch.plainshare import PlainShare
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.signed import SignedLayers
from p2pgz.image.plain_layers import PlainLayers
from p2pgz.node.peering import Peering
from p2pgz.p2p.certificate import verify_signature
from p2pgz.pool.pool import Pool


def share_plain_layers(
    config: PeersConfig,
    peering: Peering,
    pool: Pool,
    fetcher: ChunkFetcher,
    state_path: Path,
    nursery: trio.Nursery,
) -> PlainLayers:
    """What opens plain layers on a node with peers; raises ConfigError for trusted indexers that are no peer ids."""
    share = PlainShare(
        pool,
        peering.peers,
        peering.indexes,
        fetcher.counters,
        state_path,
        verify=verify_signature,
        rate=fetcher.rates.peers,
        trusted=[PeerId.parse(text) for text in config.trusted_indexers],
    )
    nursery.start_soon(SignedLayers(pool, peering.indexes, share, fetcher.refuse).run)
    return PlainLayers(pool, fetcher.counters, state_path, peering.indexes, share)
