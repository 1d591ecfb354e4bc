"""Finding the first peers, and keeping this node joined to the others.

The node runs one `Bootstrapper`. What to do and when is decided by `core.joining`; here it is done: names are looked up in
threads of their own, peers are dialled through the callable that the node passes in, and who is connected is remembered on
disk. Nothing of it may hold up anything else: every wait has a deadline, a dead name server costs one thread per name.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import structlog
import trio

from p2pgz.core.joining import MIN_PEERS, Endpoint, Entry, Joining, Target
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import P2pgzError, SourceUnavailable
from p2pgz.p2p.remembered import RememberedPeers

log = structlog.get_logger(component="bootstrap")

# how soon a lost connection is noticed if nobody calls `wake`
POLL_SECONDS: Final = 1.0
# the exchange gives up after 3 s by itself; with RETRY_MAX_SECONDS it stays below half a minute
DIAL_SECONDS: Final = 5.0
# glibc tries each name server for 5 s, twice
LOOKUP_SECONDS: Final = 5.0
# of the last session, tried at start
REMEMBERED_TRIED: Final = 16
NOTE_FIRST_SECONDS: Final = 5.0
NOTE_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 2.0

Dial = Callable[[str, int, PeerId | None], Awaitable[PeerId]]
"""Connect to host and port, and say who answered; raises P2pgzError. With an id, nobody else will do."""
Resolve = Callable[[PeerAddress], Awaitable[Sequence[str]]]
"""All IP addresses of a name; raises SourceUnavailable."""

_FAMILIES: Final = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


class SystemResolver:
    """The system's resolver (hosts file, name servers), in threads.

    getaddrinfo cannot be cancelled, so a thread that hangs is left to itself; its name is not asked for again before it
    is back, and no other name, and nobody else's threads, wait for it.
    """

    def __init__(self, getaddrinfo: Callable[..., Any] = socket.getaddrinfo) -> None:
        self._getaddrinfo = getaddrinfo
        self._limiters: dict[PeerAddress, trio.CapacityLimiter] = {}

    async def __call__(self, address: PeerAddress) -> Sequence[str]:
        """All addresses of a name; raises SourceUnavailable."""
        # the caller's addresses are those of the configuration: few, and always the same
        limiter = self._limiters.setdefault(address, trio.CapacityLimiter(1))
        ask = partial(
            self._getaddrinfo, address.host, address.port, _FAMILIES[address.network], socket.SOCK_STREAM
        )
        try:
            with trio.fail_after(LOOKUP_SECONDS):
                found = await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=limiter)
        except trio.TooSlowError:
            raise SourceUnavailable(
                f"{address.host}: no answer from the name server within {LOOKUP_SECONDS:g} s"
            ) from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise SourceUnavailable(f"{address.host}: cannot be looked up: {reason}") from error
        # link-local addresses come with a zone, which no other host can use
        return list(dict.fromkeys(item[4][0] for item in found if "%" not in item[4][0]))


class Bootstrapper:
    """Keeps the node joined while `run` runs. Knows nothing of connections but the callables it is given.

    `connected`: the peers to whom there is a connection. `known`: connected peers and where they listen, for the file
    and for redialling them when they are lost. `is_own`: whether an endpoint is our own listener. `members`: how
    large the cluster is, as far as known.
    """

    def __init__(
        self,
        entries: Iterable[PeerAddress],
        *,
        own: PeerId,
        dial: Dial,
        connected: Callable[[], Iterable[PeerId]],
        known: Callable[[], Iterable[Contact]] = tuple,
        is_own: Callable[[Endpoint], bool] = lambda _endpoint: False,
        members: Callable[[], int] = lambda: 0,
        remembered: RememberedPeers | None = None,
        resolve: Resolve | None = None,
        min_peers: int = MIN_PEERS,
        rng: Callable[[], float] | None = None,
        on_addresses: Callable[[Sequence[str]], None] = lambda _ips: None,
    ) -> None:
        self._joining = Joining(
            entries, own=own, random=rng or random.SystemRandom().random, min_peers=min_peers
        )
        self._own = own
        self._dial = dial
        self._connected = connected
        self._known = known
        self._is_own = is_own
        self._members = members
        self._remembered = remembered if remembered is not None else RememberedPeers(None)
        self._resolve = resolve or SystemResolver()
        self._on_addresses = on_addresses
        self._woken = trio.Event()
        self._writer = trio.CapacityLimiter(1)
        self.dials = self.failures = self.lookups = 0

    def wake(self) -> None:
        """Look at once whether there is something to do (a connection was lost, an address learned)."""
        self._woken.set()

    def configure(self, entries: Iterable[PeerAddress]) -> None:
        """Other entries from now on."""
        self._joining.configure(entries)
        self._on_addresses(self.ips())
        self.wake()

    def offer(self, contact: Contact) -> None:
        """Somebody has told of a peer (mDNS): it may be dialled if peers are missing."""
        try:
            peer = PeerId(contact.peer)
        except ValueError:
            return
        self._joining.offer(peer, _addresses(contact))
        self.wake()

    def ips(self) -> list[str]:
        """The IP addresses of the configured entries, as far as they are known (for `OwnAddresses`)."""
        return self._joining.ips()

    def contacts(self) -> list[Contact]:
        """Peers by which the DHT may be entered: those that answered at a configured entry, then the remembered ones."""
        found: dict[bytes, Contact] = {}
        for entry in self._joining.entries:
            for target in entry.targets.values():
                if target.peer is not None and not target.own and not target.error:
                    address = PeerAddress.of_ip(*target.endpoint).to_bytes()
                    before = found.get(target.peer.raw, Contact(target.peer.raw))
                    found[target.peer.raw] = Contact(target.peer.raw, (*before.addresses, address))
        for contact in self._remembered.contacts():
            found.setdefault(contact.peer, contact)
        return list(found.values())

    def status(self) -> list[dict[str, Any]]:
        """One row per configured entry: entry, state, peer_id, addresses, error, since_seconds."""
        return self._joining.status(trio.current_time(), set(self._connected()))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial, look up and remember until cancelled."""
        for peer, addresses in reversed(self._remembered.best(REMEMBERED_TRIED)):
            self._joining.offer(peer, addresses)
        self._on_addresses(self.ips())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._remember)
                task_status.started()
                await self._keep_joined(nursery)
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._note_known()

    async def _keep_joined(self, nursery: trio.Nursery) -> None:
        while True:
            self._woken = trio.Event()
            steps = self._joining.decide(
                trio.current_time(), set(self._connected()), is_own=self._is_own, members=self._members()
            )
            for target in steps.dials:
                nursery.start_soon(self._try, target)
            for entry in steps.lookups:
                nursery.start_soon(self._look_up, entry)
            with trio.move_on_after(min(steps.wait_seconds, POLL_SECONDS)):
                await self._woken.wait()

    async def _try(self, target: Target) -> None:
        self.dials += 1
        host, port = target.endpoint
        try:
            with trio.fail_after(DIAL_SECONDS):
                peer = await self._dial(host, port, target.expected)
        except trio.TooSlowError:
            self._failed(target, f"no answer within {DIAL_SECONDS:g} s")
        except (P2pgzError, OSError) as error:
            self._failed(target, str(error))
        except Exception as error:  # a bug met at one address must not keep us from the others
            log.exception("bootstrap.bug", address=f"{host}:{port}")
            self._failed(target, f"{type(error).__name__}: {error}")
        else:
            if not target.tried or target.error:
                log.info("bootstrap.reached", address=f"{host}:{port}", peer=str(peer))
            self._joining.dialled(target, peer, trio.current_time())
            if peer != self._own:
                self._remembered.note(peer, [PeerAddress.of_ip(host, port)], time.time())
        self.wake()

    def _failed(self, target: Target, error: str) -> None:
        self.failures += 1
        if target.error != error:  # once per reason: it is tried for as long as the node lives
            host, port = target.endpoint
            write = log.warning if target.literal else log.info
            write("bootstrap.not_reached", address=f"{host}:{port}", reason=error)
        self._joining.dial_failed(target, error, trio.current_time())

    async def _look_up(self, entry: Entry) -> None:
        self.lookups += 1
        try:
            ips = await self._resolve(entry.address)
        except (P2pgzError, OSError) as error:
            if entry.error != str(error):
                log.warning("bootstrap.no_address", entry=str(entry.address), reason=str(error))
            self._joining.lookup_failed(entry, str(error), trio.current_time())
        else:
            before = set(entry.targets)
            self._joining.resolved(entry, ips, trio.current_time())
            if set(entry.targets) != before:
                log.info("bootstrap.addresses", entry=str(entry.address), count=len(entry.targets))
                self._on_addresses(self.ips())
        self.wake()

    # -- remembering

    async def _remember(self) -> None:
        await trio.sleep(NOTE_FIRST_SECONDS)
        while True:
            await self._note_known()
            await trio.sleep(NOTE_SECONDS)

    async def _note_known(self) -> None:
        """Write down who is connected, and keep them as those to redial when they are lost."""
        for contact in self._known():
            try:
                peer = PeerId(contact.peer)
            except ValueError:
                continue
            if peer != self._own:
                addresses = _addresses(contact)
                self._remembered.note(peer, addresses, time.time())
                self._joining.offer(peer, addresses)
        content = self._remembered.pending()
        if content is not None:
            # a disk that hangs must not hold up the end
            await trio.to_thread.run_sync(
                self._remembered.write, content, abandon_on_cancel=True, limiter=self._writer
            )


def _addresses(contact: Contact) -> list[PeerAddress]:
    """The addresses that we can dial; others may have their own kinds."""
    found = []
    for raw in contact.addresses:
        try:
            found.append(PeerAddress.from_bytes(raw))
        except ValueError:
            continue
    return found
