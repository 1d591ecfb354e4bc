"""State directories that are damaged, foreign or unfit: repaired or refused with a message, and never silently emptied."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.evictions import Image, ask_status, push
from tests.e2e.restart.lazy_node import P2PGZ, LazyNode, state_folder
from tests.e2e.restart.test_eviction import until_synced, wrong

SEED = 31
FILES = 6
UNUSABLE = 15
NOBODY = 65534
SECONDS = 30

# Everything is imported before the user changes: root's Python may be unreadable for others
AS_NOBODY = f"""
import os, pathlib, sys, trio
from p2pgz.errors import StateError
from p2pgz.pool.pool import Pool

async def main():
    try:
        async with Pool.open(pathlib.Path(sys.argv[1]), boot_id="boot"):
            pass
    except StateError as error:
        print(error)

os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
trio.run(main)
"""

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture(scope="module")
def full() -> Iterator[tuple[Path, Image]]:
    """The state directory of a node that has all of an image and was stopped cleanly. Not to be changed."""
    with state_folder() as folder, running_registry(folder / "registry") as registry:
        image = push(folder / "plain", registry.address, SEED, FILES)
        node = started(folder / "state")
        try:
            root = mount(node, image)
            assert wrong(root, image[1]) == []
            until_synced(node)
            subprocess.run(["umount", root], check=True)
        finally:
            node.close()
        yield node.state, image


@pytest.fixture
def state(full: tuple[Path, Image]) -> Iterator[Path]:
    """A copy of that, as of another machine's disk."""
    with state_folder() as folder:
        subprocess.run(["cp", "-a", full[0], folder / "state"], check=True)
        yield folder / "state"


def started(state: Path) -> LazyNode:
    node = LazyNode(state, environment={"P2PGZ_PEERS__ENABLED": "never"})
    del node.environment["P2PGZ_POOL__CHECK_FILESYSTEM"]
    node.start()
    return node


def mount(node: LazyNode, image: Image) -> Path:
    root = node.state.parent / "root"
    root.mkdir(exist_ok=True)
    node.call("mount", "--mode", "tree", "--no-fill", image[0], root)
    return root


def segment(state: Path) -> Path:
    [found] = (state / "pool").glob("*.seg")
    return found


def nothing(_: Path) -> None:
    """The copy itself is what is wrong with it."""


def flip(state: Path) -> None:
    with segment(state).open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes([byte[0] ^ 1]))


def overwrite_index(state: Path) -> None:
    (state / "index.db").write_bytes(b"this is no database" * 1000)


def cut_index(state: Path) -> None:
    os.truncate(state / "index.db", (state / "index.db").stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "lost_share", "said"),
    [
        (nothing, 0.0, ""),
        (flip, 0.1, "pool.chunks_lost"),
        (
            lambda state: os.truncate(segment(state), segment(state).stat().st_size // 2),
            0.6,
            "pool.segment_truncated",
        ),
        (lambda state: segment(state).with_suffix(".chunks").unlink(), 0.0, "pool.segment_unusable"),
        (lambda state: (state / "index.db").unlink(), 0.1, "pool.adopted"),
        (overwrite_index, 0.1, "index.damaged"),
        (cut_index, 0.1, "index.damaged"),
        (lambda state: (state / "pool").chmod(0o777), 0.0, "state.mode_repaired"),
    ],
    ids=["copied", "flipped", "truncated", "table", "index-gone", "index-garbage", "index-cut", "mode"],
)
def test_damage_costs_what_is_damaged_and_nothing_else(
    full: tuple[Path, Image], state: Path, damage: Callable[[Path], None], lost_share: float, said: str
) -> None:
    _, image = full
    damage(state)
    # without an index the layer has to be opened again, and its end comes along with the TOC
    node = started(state)
    try:
        root = mount(node, image)
        assert wrong(root, image[1]) == []
        status = ask_status(node)
        fetched, pool = status["sources"]["registry"]["bytes"], status["pool"]
        assert fetched <= lost_share * image[2]
        assert (fetched > 0) == (lost_share > 0)
        # none of it was believed unseen: another disk may have done anything to it
        assert pool["revived_chunks"] >= (1 - lost_share) * pool["chunks"]
        assert said in node.log.read_text()
        assert (state / "pool").stat().st_mode & 0o022 == 0
        assert (state / "index.db.damaged").exists() == (said == "index.damaged")
    finally:
        node.close()


def refused(state: Path) -> str:
    """The message of a node that does not start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("P2PGZ_")}
    done = subprocess.run(
        [*P2PGZ, "--state-dir", str(state), "node"],
        capture_output=True,
        text=True,
        env=inherited | {"P2PGZ_PEERS__ENABLED": "never"},
        cwd="/",
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == UNUSABLE, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    return done.stderr


def snapshot(state: Path) -> dict[str, str]:
    """Everything that would be missed."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [state / "index.db", *(state / "pool").iterdir()]
    }


def test_index_of_a_newer_version_is_left_alone(state: Path) -> None:
    with closing(sqlite3.connect(state / "index.db")) as index:
        index.execute("PRAGMA user_version = 99")
    before = snapshot(state)
    said = refused(state)
    assert "newer p2pgz" in said
    assert "upgrade p2pgz" in said
    assert snapshot(state) == before


def test_second_node_is_refused_and_the_first_not_disturbed(state: Path, full: tuple[Path, Image]) -> None:
    node = started(state)
    try:
        assert node.process is not None
        root = mount(node, full[1])
        assert f"process {node.process.pid}" in refused(state)
        assert ask_status(node)["node"]["pid"] == node.process.pid
        assert wrong(root, full[1][1]) == []
    finally:
        node.close()


def test_read_only_file_system_is_named(state: Path) -> None:
    before = snapshot(state)
    subprocess.run(["mount", "--bind", state, state], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", state], check=True)
        said = refused(state)
        assert "Read-only file system" in said
        assert "read-write" in said
    finally:
        subprocess.run(["umount", state], check=True)
    assert snapshot(state) == before


def test_directory_of_another_user_is_refused_on_both_sides(state: Path) -> None:
    state.parent.chmod(0o755)
    before = snapshot(state)
    said = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, state], capture_output=True, text=True, check=True
    ).stdout
    assert "Permission denied" in said
    assert "owner and mode" in said
    os.chown(state, NOBODY, NOBODY)
    said = refused(state)
    assert f"belongs to user {NOBODY}" in said
    assert "--state-dir" in said
    assert snapshot(state) == before


@pytest.mark.parametrize("kind", ["overlayfs", "tmpfs"])
def test_file_systems_that_lose_the_pool_are_refused(kind: str) -> None:
    with state_folder() as folder:
        place = folder / "merged"
        place.mkdir()
        for name in ("lower", "upper", "work"):
            (folder / name).mkdir()
        options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
        words = ["overlay", "-o", options] if kind == "overlayfs" else ["tmpfs"]
        subprocess.run(["mount", "-t", *words, "none", place], check=True)
        try:
            said = refused(place / "state")
            assert f"is on {kind}" in said
            assert "--state-dir" in said
            assert not list((place / "state").glob("**/*.seg"))
        finally:
            subprocess.run(["umount", place], check=True)


def test_file_system_that_punches_no_holes_is_refused(tmp_path: Path) -> None:
    """ramfs is the one that every kernel has; its name is on another list, which is taken away here."""
    code = (
        "import sys; from pathlib import Path; from p2pgz.pool import disk; disk._UNFIT_FILE_SYSTEMS.clear()\n"
        "disk.refuse_unfit_file_system(Path(sys.argv[1]))"
    )
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], check=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
        )
        assert "punches no holes" in done.stderr
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_something_else_in_its_place_is_named() -> None:
    with state_folder() as folder:
        (folder / "file").write_text("")
        assert "file" in refused(folder / "file" / "state")
        (folder / "theirs").mkdir()
        (folder / "theirs" / "pool").write_text("not ours")
        assert "cannot be used" in refused(folder / "theirs")
        assert (folder / "theirs" / "pool").read_text() == "not ours"
