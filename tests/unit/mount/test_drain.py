"""Leaving a device to a successor loses nothing that was announced to the leaver."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from p2pgz.mount.drain import before_poll

ROUNDS = 300
pytestmark = pytest.mark.trio


async def lost_in_one_round(*, between_polls: bool) -> bool:
    """A reader that throws away what it reads after the exit flag is set, as libfuse does; whether it did."""
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stop_read, stop_write = os.pipe()
    exited = lost = False

    def leave() -> None:
        nonlocal exited
        exited = True
        trio.lowlevel.notify_closing(ours)

    async def read() -> None:
        nonlocal lost
        while not exited:
            try:
                await trio.lowlevel.wait_readable(ours)
            except trio.ClosedResourceError:
                return
            ours.recv(16)
            lost = lost or exited

    with ours, peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            # both become readable before the same poll, in an order that trio shuffles
            os.write(stop_write, b"x")
            peer.send(b"request")
            await trio.lowlevel.wait_readable(stop_read)
            if between_polls:
                await before_poll(leave)
            else:
                leave()
    os.close(stop_read)
    os.close(stop_write)
    return lost


async def test_request_that_woke_a_reader_is_not_lost_to_the_exit_flag() -> None:
    assert not any([await lost_in_one_round(between_polls=True) for _ in range(ROUNDS)])


async def test_setting_the_flag_at_any_time_does_lose_some() -> None:
    assert any([await lost_in_one_round(between_polls=False) for _ in range(ROUNDS)])
