"""Start-up lists as users get them: the second start, here or on another host, finds its chunks on their way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cli.conftest import disk, home  # noqa: F401
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.cli.running import umount
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until

pytestmark = pytest.mark.root

FILES = 300
FILE_BYTES = 24 << 10
# what the program reads at its start: some neighbours, and some that stand far apart, in no order of the layer
STARTING = [n for n in range(FILES) if n % 40 < 4]
random.Random(3).shuffle(STARTING)
NOT_FOUND = 10
# in erofs mode the kernel reads a little around what is needed, which is then on the list
EXACT = ("--mode", "tree")
STARTING_BYTES = len(STARTING) * FILE_BYTES


def content(n: int) -> bytes:
    return random.Random(n).randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryThread]:
    with RegistryThread.running() as running:
        yield running


@pytest.fixture
def image(registry: RegistryThread, home: Path) -> str:  # noqa: F811
    files = {f"lib/f{n:03}": content(n) for n in range(FILES)}
    target = f"{registry.address}/team/app:start"
    with swarm(home / "convert", 1) as (node,):
        push_converted(node, home / "layout", target, files)
    registry.fake.requests.clear()
    return target


def start(node: SwarmNode) -> None:
    """What the image is for."""
    for n in STARTING:
        assert (node.root / f"lib/f{n:03}").read_bytes() == content(n)


def state(node: SwarmNode) -> dict[str, Any]:
    [mount] = node.status()["mounts"]
    found: dict[str, Any] = mount["startup"]
    return found


@contextmanager
def mounted(node: SwarmNode, image: str, *options: str) -> Iterator[None]:
    node.ok("mount", *options, image, node.root)
    yield
    umount(node.root)
    wait_until(lambda: not node.mounts())


def lists(node: SwarmNode) -> list[Path]:
    return sorted((node.state / "startup").glob("*"))


@pytest.mark.parametrize("mode", ["tree", "erofs"])
def test_second_start_asks_for_what_the_first_one_read_and_for_little_else(
    home: Path,  # noqa: F811
    registry: RegistryThread,
    image: str,
    mode: str,
) -> None:
    with swarm(home, 1) as (node,):
        node.start_node()
        with mounted(node, image, "--mode", mode):
            assert state(node)["state"] == "waiting"
            start(node)
            first = registry.blob_requests()
            wait_until(lambda: state(node)["read_chunks"] >= len(STARTING))
            assert state(node)["state"] == "recording"
            assert state(node)["hit_chunks"] == 0
        assert len(lists(node)) == 1

        node.stop_node()
        node.start_node()
        assert node.ok("pool", "gc", "--all", "--json").json()["evicted_bytes"]
        before, received = registry.blob_requests(), node.sources()["registry"]["bytes"]
        with mounted(node, image, "--mode", mode):
            wait_until(lambda: state(node)["prefetched_chunks"] >= len(STARTING))
            brought = registry.blob_requests() - before
            assert brought < first / 2
            assert state(node)["listed_chunks"] == state(node)["prefetched_chunks"]
            start(node)
            assert registry.blob_requests() - before == brought
            wait_until(lambda: state(node)["hit_chunks"] >= len(STARTING))  # told beside the reads
            now = state(node)
            assert (now["recordings"], now["peer_lists"]) == (1, 0)
            assert f"a list of {now['listed_chunks']} chunks, which named" in node.ok("status").out
            received = node.sources()["registry"]["bytes"] - received
            assert received <= 1.1 * now["listed_bytes"]
            assert mode == "erofs" or now["listed_bytes"] == STARTING_BYTES


def test_other_host_prefetches_by_the_list_of_its_peer(
    home: Path,  # noqa: F811
    registry: RegistryThread,
    image: str,
) -> None:
    with swarm(home, 2) as (first, second):
        first.start_node()
        with mounted(first, image, *EXACT):
            start(first)
        second.join(first)
        wait_until(second.peer_ids)
        before = registry.blob_requests()
        with mounted(second, image, *EXACT):
            wait_until(lambda: state(second)["prefetched_chunks"] == len(STARTING))
            assert registry.blob_requests() == before
            assert state(second)["peer_lists"] == 1
            assert lists(second) == []
            start(second)
            assert registry.blob_requests() == before
            assert second.sources()["peer"]["bytes"] == STARTING_BYTES
            wait_until(lambda: state(second)["hit_chunks"] == len(STARTING))  # told beside the reads
        assert [path.name for path in lists(second)] == [path.name for path in lists(first)]


@pytest.mark.slow
def test_images_for_nobody_tell_nobody_how_they_start(
    home: Path,  # noqa: F811
    image: str,
) -> None:
    config = home / "private.toml"
    config.write_text('version = 1\n[[sharing]]\nrepository = "*"\nmode = "none"\n')
    with swarm(home, 2) as (first, second):
        first.start_node(P2PGZ_CONFIG=str(config))
        with mounted(first, image, *EXACT):
            start(first)
        assert len(lists(first)) == 1
        second.join(first)
        wait_until(second.peer_ids)
        with mounted(second, image, *EXACT):
            start(second)
            assert state(second)["peer_lists"] == 0


@pytest.mark.slow
def test_those_who_know_an_image_tell_each_other_how_it_starts(
    home: Path,  # noqa: F811
    image: str,
) -> None:
    config = home / "proof.toml"
    config.write_text('version = 1\n[[sharing]]\nrepository = "*"\nmode = "proof"\n')
    with swarm(home, 3, P2PGZ_CONFIG=str(config)) as (first, second, stranger):
        first.start_node()
        with mounted(first, image, *EXACT):
            start(first)
        second.join(first)
        wait_until(second.peer_ids)
        with mounted(second, image, *EXACT):
            wait_until(lambda: state(second)["prefetched_chunks"] == len(STARTING))
            assert state(second)["peer_lists"] == 1
        # to whoever does not say that it knows it, there is no such thing
        stranger.join(first, P2PGZ_CONFIG="")
        wait_until(stranger.peer_ids)
        with mounted(stranger, image):
            start(stranger)
            assert state(stranger)["peer_lists"] == 0


@pytest.mark.slow
def test_optimize_writes_into_an_image_how_it_starts(
    home: Path,  # noqa: F811
    registry: RegistryThread,
    image: str,
) -> None:
    optimized = image.replace(":start", ":optimized")
    with swarm(home, 2) as (node, other):
        node.start_node()
        error = node.fails(NOT_FOUND, "optimize", "--plain-http", image, optimized)
        assert "nothing is known of how it starts" in error
        with mounted(node, image, *EXACT):
            start(node)
        done = node.ok("optimize", "--plain-http", image, optimized)
        assert f"{len(STARTING)} files start {image} (seen 1 times here)" in done.err

        # whoever mounts it has its start on the way, though nobody has ever started it
        other.start_node(P2PGZ_FETCH__STARTUP_LIST="false")
        other.ok("mount", *EXACT, optimized, other.root)
        wait_until(lambda: other.status()["mounts"][0]["present_bytes"] >= STARTING_BYTES)
        before = registry.blob_requests()
        start(other)
        assert registry.blob_requests() == before
        names = [row["name"] for row in other.ok("ls", optimized, "/lib", "--json").json()]
        assert len(names) == FILES


def test_option_turns_all_of_it_off(
    home: Path,  # noqa: F811
    image: str,
) -> None:
    with swarm(home, 1, P2PGZ_FETCH__STARTUP_LIST="false") as (node,):
        node.start_node()
        with mounted(node, image, *EXACT):
            start(node)
            assert state(node)["state"] == "off"
            assert state(node)["read_chunks"] == 0
        assert lists(node) == []
