"""What peers say under a name, over real connections: each is heard once, and who says too much is no peer any more."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.peerid import PeerId
from p2pgz.fetch.offers import PoolOffers
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.hearing import hear
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.plane import open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool

pytestmark = pytest.mark.trio
NAME = Digest.of(b"name").raw
LIMIT_BYTES = 1000


class Says(PoolOffers):
    """Gives the same to whoever asks."""

    def __init__(self, pool: Pool, answer: bytes | None) -> None:
        super().__init__(pool)
        self._answer = answer

    async def document(self, digest: bytes) -> bytes | None:
        await super().document(digest)
        return self._answer


async def test_each_peer_is_heard_once_and_who_says_too_much_is_cut_off(tmp_path: Path) -> None:
    answers = [b"one", None, bytes(LIMIT_BYTES + 1), b"four"]
    heard: dict[PeerId, bytes] = {}
    asked: set[PeerId] = set()
    async with AsyncExitStack() as stack:
        planes = []
        for number, answer in enumerate([None, *answers]):
            pool = await stack.enter_async_context(
                Pool.open(tmp_path / str(number), boot_id="test", check_filesystem=False)
            )
            credentials = Credentials.make(Identity.new(), Admission())
            plane = open_plane(credentials, Says(pool, answer), Uploads(), host="127.0.0.1")
            planes.append(await stack.enter_async_context(plane))
        own, others = planes[0].exchange, planes[1:]
        for plane in others:
            await own.connect("127.0.0.1", plane.port, expected=plane.exchange.own_id)
        for peers_max in (1, 16, 16):
            await hear(
                own.connections(), NAME, heard.__setitem__,
                limit_bytes=LIMIT_BYTES, secret=b"", asked=asked, peers_max=peers_max,
            )  # fmt: skip
            assert peers_max > 1 or len(asked) == 1
        ids = [plane.exchange.own_id for plane in others]
        assert asked == set(ids)
        assert heard == {ids[0]: b"one", ids[3]: b"four"}
        assert {connection.peer for connection in own.connections()} == {ids[0], ids[1], ids[3]}
