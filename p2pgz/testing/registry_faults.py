"""What a `FakeRegistry` can do wrong, as data: tests list faults, the server looks the first matching one up per request."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Fault:
    """The trouble of the requests whose `METHOD path` contains `on`: after `skip` good ones, the next `times`.

    Exactly what is set goes wrong; the rest of the answer is right.
    """

    on: str = ""
    skip: int = 0
    times: int = 1

    status: int = 0
    """answer with this status and an error document instead"""
    headers: dict[str, str] = field(default_factory=dict)
    """replace or add these headers"""
    without: tuple[str, ...] = ()
    """leave these headers (lower case) out"""
    body: bytes | None = None
    """another body, of the right framing"""
    drop_after: int | None = None
    """cut the connection after so many body bytes (0: after the head; -1: before it)"""
    short_by: int = 0
    """end the body so many bytes early, as if that were all"""
    ignore_range: bool = False
    """answer 200 with the whole to a Range request"""
    no_head: bool = False
    """answer 405 to HEAD"""
    endless: bool = False
    """send zeros after the body for ever"""
    redirect: str = ""
    """answer 307 to this URL"""
    piece_bytes: int = 0
    """send the body in pieces of this size, ..."""
    pause_seconds: float = 0.0
    """... so long after each other"""
    silent: bool = False
    """never answer"""

    def hits(self, request_line: str) -> bool:
        """Whether this request is one of those; counts."""
        if self.on not in request_line or self.times <= 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True
