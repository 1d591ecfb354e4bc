"""Going to peers: one dial at a time per peer and address, and who is charged for one that failed.

The exchange makes one `Dialler`. Before the peer that was expected has proven its id, nothing that goes wrong is its doing:
somebody else may live at the address by now. Peers that a busy one names are dialled in the background; they are that
peer's word only, so few at a time, none again and again, and no names are looked up for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

import structlog
import trio

from p2pgz.core.messages import Alternative
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Fault, Standing
from p2pgz.errors import ConfigError, P2pgzError, PeerFault, SourceUnavailable
from p2pgz.p2p.connection import Connection
from p2pgz.p2p.handshake import Credentials, Handshaken, Ourselves, Unproven, WrongPeer, dial

log = structlog.get_logger(component="peers")

# TCP, TLS and HELLO: three round trips and 5 ms of CPU; a peer that needs longer is no help to a read
DIAL_SECONDS: Final = 3.0
HINTS_AT_ONCE: Final = 4
# a named peer that could not be reached, or is gone again
HINT_AGAIN_SECONDS: Final = 30.0
HINTS_REMEMBERED: Final = 256


class Dialler:
    """The dials of one exchange. `find`: an open connection; `adopt`: takes over a new one, or raises SourceUnavailable."""

    def __init__(
        self,
        credentials: Credentials,
        standing: Standing,
        nursery: trio.Nursery,
        find: Callable[[PeerId], Connection | None],
        adopt: Callable[[Handshaken], Connection],
    ) -> None:
        self._credentials = credentials
        self._standing = standing
        self._nursery = nursery
        self._find = find
        self._adopt = adopt
        self._dialling: dict[str, trio.Event] = {}
        self._hinting: set[PeerId] = set()
        self._hinted: dict[PeerId, float] = {}
        self.twins = 0
        """how often another host with our identity answered"""

    async def connect(
        self, host: str, port: int, *, expected: PeerId | None = None, insist: bool = False
    ) -> Connection:
        """An open connection to the peer there, a new one if need be; raises SourceUnavailable and its kin.

        `insist`: the caller has its own pace; only a peer that is banned is not dialled.
        Many may ask at the same time: one dials.
        """
        return await self._one_at_a_time(
            partial(trio.open_tcp_stream, host, port), f"{host}:{port}", expected, insist=insist
        )

    async def through(
        self, open_stream: Callable[[], Awaitable[trio.abc.Stream]], peer: PeerId
    ) -> Connection:
        """The same on a stream that somebody else opens, to a peer whose addresses have just not answered."""
        return await self._one_at_a_time(open_stream, f"stream {peer}", peer, insist=True)

    async def _one_at_a_time(
        self,
        open_stream: Callable[[], Awaitable[trio.abc.Stream]],
        where: str,
        expected: PeerId | None,
        *,
        insist: bool,
    ) -> Connection:
        while True:
            known = self._find(expected) if expected is not None else None
            if known is not None:
                return known
            if expected is not None and self._is_out(expected, insist=insist):
                raise SourceUnavailable(f"peer {expected} has lost its place for a while")
            other = self._dialling.get(where)
            if other is None or expected is None:
                break
            await other.wait()
        done = self._dialling[where] = trio.Event()
        try:
            return await self._dial(open_stream, where, expected)
        finally:
            done.set()
            if self._dialling.get(where) is done:
                del self._dialling[where]

    def _is_out(self, peer: PeerId, *, insist: bool) -> bool:
        now = trio.current_time()
        return self._standing.banned(peer, now) if insist else bool(self._standing.out_until(peer, now))

    async def _dial(
        self, open_stream: Callable[[], Awaitable[trio.abc.Stream]], where: str, expected: PeerId | None
    ) -> Connection:
        raw: trio.abc.Stream | None = None
        try:
            with trio.fail_after(DIAL_SECONDS):
                raw = await open_stream()
                ends = await dial(raw, self._credentials, expected=expected)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, P2pgzError) as error:
            if raw is not None:
                await trio.aclose_forcefully(raw)
            self._failed(error, where, expected)
            if isinstance(error, P2pgzError):
                raise
            why = (
                f"no answer within {DIAL_SECONDS:g} s" if isinstance(error, trio.TooSlowError) else str(error)
            )
            raise SourceUnavailable(f"peer at {where}: {why}") from error
        except BaseException:
            if raw is not None:
                await trio.aclose_forcefully(raw)
            raise
        try:
            return self._adopt(ends)
        except SourceUnavailable:
            await trio.aclose_forcefully(raw)
            raise

    def _failed(self, error: Exception, where: str, expected: PeerId | None) -> None:
        if isinstance(error, Ourselves):
            if error.twin:
                self.twins += 1
                log.error(
                    "identity.twice",
                    address=where,
                    peer=str(self._credentials.identity.peer_id),
                    effect="neither host can use the other, and others take the two for one",
                    hint="identities must not be copied: stop one node, remove its identity.key and start it again",
                )
        elif expected is not None and not isinstance(error, Unproven | WrongPeer):
            fault = Fault.PROTOCOL if type(error) is PeerFault else Fault.LOST
            self._standing.fault(expected, fault, trio.current_time())

    # --- what busy peers say

    def hint(self, alternatives: Iterable[Alternative]) -> None:
        """Dial peers that may have what a busy one has, in the background."""
        now = trio.current_time()
        for alternative in alternatives:
            try:
                peer, address = PeerId(alternative.peer), PeerAddress.parse(alternative.address)
            except (ValueError, ConfigError):
                continue
            if (
                address.is_name
                or peer == self._credentials.identity.peer_id
                or peer in self._hinting
                or len(self._hinting) >= HINTS_AT_ONCE
                or self._hinted.get(peer, 0.0) > now
                or self._find(peer) is not None
            ):
                continue
            self._hinting.add(peer)
            self._hinted.pop(peer, None)
            self._hinted[peer] = now + HINT_AGAIN_SECONDS
            if len(self._hinted) > HINTS_REMEMBERED:
                del self._hinted[next(iter(self._hinted))]
            self._nursery.start_soon(self._follow_hint, peer, address)

    async def _follow_hint(self, peer: PeerId, address: PeerAddress) -> None:
        try:
            await self.connect(address.host, address.port, expected=peer)
        except SourceUnavailable as error:
            log.debug("peer.hint_failed", peer=str(peer), reason=error.what)
        finally:
            self._hinting.discard(peer)
