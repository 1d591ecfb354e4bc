"""Frames that end too early are faults, wherever they end."""

from __future__ import annotations

import pytest

from p2pgz.core.frames import encode, parse_body
from p2pgz.core.messages import Alternative, BitmapDelta, Busy, Frame
from p2pgz.core.wire import HEADER
from p2pgz.errors import PeerFault

BUSY = Busy(7, 100, (Alternative(b"\x00\x24" + b"p" * 36, "/ip4/192.0.2.7/tcp/4801"),))
DELTA = BitmapDelta(b"s" * 32, ((0, 3), (9, 1)), ((5, 2),))


@pytest.mark.parametrize("frame", [BUSY, DELTA], ids=["busy", "delta"])
def test_cut_frames_are_faults(frame: Frame) -> None:
    data = encode(frame)
    _, kind = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    assert encode(parse_body(kind, memoryview(body))) == data
    for end in range(len(body)):
        with pytest.raises(PeerFault):
            parse_body(kind, memoryview(body)[:end])
