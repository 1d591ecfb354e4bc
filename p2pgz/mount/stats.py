"""What the node counts about each `fs` process. Plain ints, filled by `session`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class FsStats:
    """What happened on one session's channel."""

    requests: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    garbage: int = 0
    """records that made no sense, and were ignored"""
    unanswered_in_fs: int = 0
    """requests without an answer, as of the last pong"""
    lookups: int = 0
    """names that the kernel asked for, as of the last pong (modulo 2^32)"""
    reads: int = 0
    """reads that the kernel sent, as of the last pong (modulo 2^32)"""
