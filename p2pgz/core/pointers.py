"""Pointers: the members closest to a chunk are told in which TOC it is, so that it can be found by its digest alone.

A holder of many chunks of a TOC sends each member the prefixes of the digests that this member is close to (`Share`),
and again every twelve hours; the member keeps them a day (`PointerStore`). They are hints, so sixteen of a digest's bytes
are enough: a made-up collision costs one question in vain, since every byte is verified at the end.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import NamedTuple

POINTER_BYTES = 16  # of the chunk's sha256
MEMBERS_PER_CHUNK = 3  # two of them may restart between two renewals
EXPIRES_AFTER_SECONDS = 24 * 3600.0
RENEW_AFTER_SECONDS = 12 * 3600.0
ENOUGH_SENDERS = 2  # holders of a TOC that keep its pointers alive; the others stand by
MAX_SHARE_POINTERS = 60_000  # of one TOC to one member: under a MiB on the wire
MAX_POINTERS = 250_000  # about 40 MB; five million chunks in a cluster of 60 hosts
MAX_SENDERS = 8  # remembered per TOC


class Verdict(IntEnum):
    """What a member answers to an offer."""

    HAVE = 0
    """the same pointers, or as good: they now live for another day"""
    LACK = 1
    """send them"""
    FULL = 2
    """no room, now"""


class Share(NamedTuple):
    """The pointers of one TOC that one member gets: sorted prefixes, one after the other."""

    toc: bytes
    complete: bool
    prefixes: bytes

    @classmethod
    def of(cls, toc: bytes, digests: list[bytes], *, complete: bool) -> Share:
        """The share that holds these digests, the first ones of them if they are too many."""
        prefixes = sorted({digest[:POINTER_BYTES] for digest in digests})
        return cls(toc, complete, b"".join(prefixes[:MAX_SHARE_POINTERS]))

    def offer(self) -> Offer:
        """What the member is asked first; most have it already."""
        return Offer(
            self.toc,
            self.complete,
            len(self.prefixes) // POINTER_BYTES,
            hashlib.sha256(self.prefixes).digest(),
        )


class Offer(NamedTuple):
    """A share by its size and the digest of its bytes."""

    toc: bytes
    complete: bool
    pointers: int
    fingerprint: bytes


class _Set:
    __slots__ = ("complete", "fingerprint", "prefixes", "senders", "toc")

    def __init__(self, share: Share) -> None:
        self.toc = share.toc
        self.complete = share.complete
        self.prefixes = share.prefixes
        self.fingerprint = share.offer().fingerprint
        self.senders: dict[bytes, float] = {}  # peer -> when its word expires

    @property
    def count(self) -> int:
        return len(self.prefixes) // POINTER_BYTES

    def expires(self) -> float:
        return max(self.senders.values(), default=0.0)

    def vouch(self, sender: bytes, now: float) -> None:
        self.senders.pop(sender, None)
        self.senders[sender] = now + EXPIRES_AFTER_SECONDS
        if len(self.senders) > MAX_SENDERS:
            del self.senders[min(self.senders, key=lambda peer: self.senders[peer])]


class PointerStore:
    """The pointers that were sent to us. Times are the caller's monotonic seconds."""

    def __init__(self) -> None:
        self._sets: dict[bytes, _Set] = {}
        self._index: dict[bytes, tuple[_Set, ...]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def offered(self, sender: bytes, offer: Offer, now: float) -> Verdict:
        """Whether we want these pointers; when we have them, the offer keeps them alive."""
        held = self._fresh(offer.toc, now)
        if held is not None and (
            held.fingerprint == offer.fingerprint
            or (held.complete and not offer.complete)
            # members differ by who just joined or left: not worth sending a whole share again
            or (held.complete and held.count * 10 >= offer.pointers * 9)
        ):
            held.vouch(sender, now)
            return Verdict.HAVE
        if offer.pointers > MAX_SHARE_POINTERS or self._count + offer.pointers > MAX_POINTERS:
            return Verdict.FULL
        return Verdict.LACK

    def put(self, sender: bytes, share: Share, now: float) -> Verdict:
        """Keep a share. One of a partial holder adds to what there is; one of a complete holder takes its place."""
        held = self._fresh(share.toc, now)
        if held is not None and held.complete and not share.complete:
            held.vouch(sender, now)
            return Verdict.HAVE
        kept: dict[bytes, float] = {}
        if held is not None:
            kept = held.senders
            if not share.complete:
                share = Share(share.toc, False, _merge(held.prefixes, share.prefixes))
        count = len(share.prefixes) // POINTER_BYTES
        before = 0 if held is None else held.count
        if count > MAX_SHARE_POINTERS or self._count - before + count > MAX_POINTERS:
            return Verdict.FULL
        self._remove(share.toc)
        added = _Set(share)
        added.senders = kept
        added.vouch(sender, now)
        self._sets[share.toc] = added
        for prefix in _split(share.prefixes):
            self._index[prefix] = (*self._index.get(prefix, ()), added)
        self._count += count
        return Verdict.HAVE

    def senders(self, toc: bytes, now: float, *, but: bytes = b"") -> list[bytes]:
        """The peers that keep this TOC's pointers alive here, `but` left out."""
        held = self._sets.get(toc)
        if held is None:
            return []
        return [peer for peer, expires in held.senders.items() if expires > now and peer != but]

    def tocs(self, digest: bytes, now: float) -> list[bytes]:
        """The TOCs that are said to have this chunk, those that a complete holder told of first."""
        sets = [each for each in self._index.get(digest[:POINTER_BYTES], ()) if each.expires() > now]
        return [each.toc for each in sorted(sets, key=lambda each: not each.complete)]

    def sweep(self, now: float) -> int:
        """Forget what has expired; returns how many TOCs that was."""
        gone = [toc for toc, held in self._sets.items() if held.expires() <= now]
        for toc in gone:
            self._remove(toc)
        return len(gone)

    def _fresh(self, toc: bytes, now: float) -> _Set | None:
        held = self._sets.get(toc)
        return held if held is not None and held.expires() > now else None

    def _remove(self, toc: bytes) -> None:
        held = self._sets.pop(toc, None)
        if held is None:
            return
        self._count -= held.count
        for prefix in _split(held.prefixes):
            rest = tuple(each for each in self._index[prefix] if each is not held)
            if rest:
                self._index[prefix] = rest
            else:
                del self._index[prefix]


def _split(prefixes: bytes) -> list[bytes]:
    return [prefixes[at : at + POINTER_BYTES] for at in range(0, len(prefixes), POINTER_BYTES)]


def _merge(one: bytes, other: bytes) -> bytes:
    return b"".join(sorted({*_split(one), *_split(other)}))
