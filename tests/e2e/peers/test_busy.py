"""A seed whose upload is limited sends readers on to those who have the image by now."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.peers.swarm import swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

SEED_BYTES_PER_SECOND = 1_000_000
# 20 s from the seed alone
SMALL = ("--chunk-size", str(256 << 10))
CONTENTS = {f"f{n}": random.Random(n).randbytes(4_000_001) for n in range(5)}


def test_reader_that_knows_only_a_busy_seed_is_served_by_whom_it_names(tmp_path: Path) -> None:
    with (
        state_folder() as folder,
        RegistryThread.running() as registry,
        swarm(folder, 3, P2PGZ_PEERS__DHT="false") as (seed, other, reader),
    ):
        push_converted(other, folder / "plain", f"{registry.address}/lab/busy:t", CONTENTS, options=SMALL)
        reference = f"{registry.address}/lab/busy@{registry.fake.store.find_manifest('lab/busy', 't')}"
        other.start_node()
        other.ok("mount", "--plain-http", reference, other.root)
        other.ok("verify", "--plain-http", reference)
        seed.ok("verify", "--plain-http", reference)
        seed.stop_node()
        seed.join(other, P2PGZ_PEERS__UPLOAD_BYTES_PER_SECOND=str(SEED_BYTES_PER_SECOND))
        seed.ok("mount", "--plain-http", reference, seed.root)
        for path in seed.root.iterdir():
            path.read_bytes()  # checked after the restart, so that it may be given away
        wait_until(lambda: seed.peer_ids() and other.peer_ids())

        registry.spoil(Fault(on="/blobs/", status=500, times=1_000_000))
        reader.join(seed)
        wait_until(reader.peer_ids)
        begin = time.monotonic()
        reader.ok("verify", "--plain-http", reference)
        assert time.monotonic() - begin < 15
        assert len(reader.peer_ids()) == 2
        assert seed.status()["node"]["busy_answers"] > 0
        assert reader.sources()["registry"]["chunks"] == 0
