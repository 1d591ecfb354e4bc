"""What a service manager hears of a node, on a real socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pgz.node.supervision import Supervisor


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        yield listening


def heard(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_the_manager_hears_of_each_state(manager: socket.socket) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": manager.getsockname()})
    supervisor.ready()
    assert heard(manager)["READY"] == "1"
    supervisor.reloading()
    told = heard(manager)
    assert told["RELOADING"] == "1"
    assert int(told["MONOTONIC_USEC"]) > 0  # systemd 253 wants it
    supervisor.stopping()
    assert heard(manager)["STOPPING"] == "1"


def test_an_abstract_socket_is_found() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("")  # the kernel chooses an abstract name
        Supervisor({"NOTIFY_SOCKET": "@" + listening.getsockname()[1:].decode()}).ready()
        assert heard(listening)["READY"] == "1"


def test_nobody_who_listens_costs_nothing(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"NOTIFY_SOCKET": "x" * 200}):
        Supervisor(environment).ready()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, 0.0),  # meant for another process
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": "-1"}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_watchdog_is_found_in_the_environment(environment: dict[str, str], seconds: float) -> None:
    assert Supervisor({"NOTIFY_SOCKET": "/nowhere", **environment}).watchdog_seconds == seconds
    assert Supervisor(environment).watchdog_seconds == 0.0


@pytest.mark.trio
async def test_signs_of_life_come_in_time(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "30000000"})
    with trio.move_on_after(60):
        await supervisor.keep_alive()
    manager.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while heard(manager) == {"WATCHDOG": "1"}:
            count += 1
    assert 6 <= count <= 7  # three for each period


@pytest.mark.trio
async def test_no_watchdog_wants_no_signs() -> None:
    with trio.fail_after(5):
        await Supervisor({}).keep_alive()
