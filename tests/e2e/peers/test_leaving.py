"""SIGTERM: what a peer was promised still arrives, then it is told goodbye; nobody new is let in."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.core.multiaddress import PeerAddress
from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.cli.running import P2pgz, wait_gone
from tests.e2e.peers.swarm import swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

FILES = {f"f{number}": random.Random(number).randbytes(40_000) for number in range(20)}
# all of it takes about two seconds
UPLOAD_BYTES_PER_SECOND = 400_000


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


def test_uploads_in_progress_end_before_the_node_does(folder: Path) -> None:
    with RegistryThread.running() as registry, swarm(folder, 2) as (giver, taker):
        converter = P2pgz(folder / "converter" / "state")
        converter.home.mkdir()
        reference = push_converted(converter, folder / "layout", f"{registry.address}/lab/app:t", FILES)
        giver.start_node(P2PGZ_PEERS__UPLOAD_BYTES_PER_SECOND=str(UPLOAD_BYTES_PER_SECOND))
        giver.ok("verify", "--plain-http", reference)
        taker.join(giver, P2PGZ_FETCH__READ_DEADLINE_SECONDS="15")
        wait_until(taker.peer_ids)
        taker.ok("ls", "--plain-http", reference)
        digest = registry.fake.store.tags["lab/app", "t"]
        registry.spoil(Fault(status=503, times=1_000_000))  # nobody else has it

        address = PeerAddress.parse(giver.addresses()[0])
        reading = taker.start("verify", "--plain-http", f"{registry.address}/lab/app@{digest}")
        wait_until(lambda: taker.sources()["peer"]["chunks"] > 2)
        pid = giver.node_pid()
        asked_at = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not connects(address))
        assert taker.sources()["peer"]["chunks"] < len(FILES), "too quick to show anything"
        assert reading.wait(20) == 0, reading.stderr.read() if reading.stderr else ""
        wait_gone(pid)
        assert time.monotonic() - asked_at < 10
        wait_until(lambda: not taker.peer_ids())
        assert taker.sources()["peer"]["failures"] == 0
        assert "peer.fault" not in taker.log()


def connects(address: PeerAddress) -> bool:
    probe = ["bash", "-c", f"exec 3<>/dev/tcp/{address.host}/{address.port}"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0
