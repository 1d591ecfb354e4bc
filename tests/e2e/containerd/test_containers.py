"""Containers of a real containerd whose images are mounts of the node: pulled, run, kept through kills, and collected."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pgz.mount.umount import find_mounts, unmount
from p2pgz.testing.docker_registry import RunningRegistry
from tests.e2e.containerd.engine import Engine
from tests.e2e.lab_images import READY

pytestmark = [
    pytest.mark.root,
    pytest.mark.registry,
    pytest.mark.tools("umoci", "skopeo", "busybox"),
    pytest.mark.slow,
]

# what a container does until it is told to read: a file that nobody has read before
WAITING = "while [ ! -e /tmp/go ]; do sleep 0.05; done; md5sum </features/large >/tmp/sum; sleep 1000"


@pytest.fixture(scope="module")
def image(small_registry: RunningRegistry) -> str:
    return f"{small_registry.address}/lab/small"


def until(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def own_mounts(engine: Engine) -> list[str]:
    return [mount.directory for mount in find_mounts() if mount.directory.startswith(f"{engine.folder}/")]


@pytest.mark.parametrize("tag", ["es", "zc", "gz"])
def test_an_image_runs_without_being_unpacked(engine: Engine, image: str, tag: str) -> None:
    engine.pull(f"{image}:{tag}")
    assert engine.run(f"{image}:{tag}", f"first-{tag}") == f"{READY}\n"
    assert engine.run(f"{image}:{tag}", f"second-{tag}") == f"{READY}\n"
    status = engine.status()
    assert status["unpacked"] == []
    assert [mount["ref"].partition("@")[0] for mount in status["mounts"]].count(f"{image}:{tag}") == 1
    infos = [
        json.loads(engine.ctr("snapshots", "--snapshotter", "p2pgz", "info", row[0]).stdout)
        for row in engine.snapshots()
    ]
    layers = {info["Labels"]["containerd.io/snapshot/cri.layer-digest"] for info in infos}
    assert len(layers) >= 4
    assert layers.isdisjoint(engine.ctr("content", "ls", "-q").stdout.split())


def test_setuid_files_and_devices_are_what_the_image_says(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    said = engine.run(
        f"{image}:es",
        "modes",
        "/bin/sh",
        "-c",
        "stat -c '%a %F %u' /features/setuid /features/null /features/hard-a",
    )
    assert said.splitlines() == [
        "4755 regular file 0",
        "666 character special file 0",
        "644 regular file 1000",
    ]
    nosuid = [mount.options for mount in find_mounts() if mount.directory.startswith(str(engine.folder))]
    assert nosuid
    assert not any("nosuid" in options for options in nosuid)
    for name in ("snapshotter/snapshots", "snapshotter/records"):
        assert (engine.state_dir / name).stat().st_mode & 0o077 == 0


def test_a_container_writes_above_the_image(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    script = (
        "rm /etc/hostname && echo new >/features/hard-a && cat /features/hard-a && rm -r /features/many && "
        "ls /features/opaque"
    )
    assert engine.run(f"{image}:es", "writer", "/bin/sh", "-c", script) == "new\nnew\n"
    assert engine.run(f"{image}:es", "reader") == f"{READY}\n"


def test_containerd_makes_a_layer_of_what_a_container_changed(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    script = "rm /etc/hostname; echo new >/made; sleep 1000"
    engine.ctr("run", "-d", "--snapshotter", "p2pgz", f"{image}:es", "changed", "/bin/sh", "-c", script)
    until(lambda: Path("/proc", pid_of(engine, "changed"), "root/made").exists())
    difference = engine.ctr_bytes("snapshots", "--snapshotter", "p2pgz", "diff", "changed")
    with tarfile.open(fileobj=io.BytesIO(difference)) as tar:
        names = set(tar.getnames())
    assert {"made", "etc/.wh.hostname"} <= names
    assert not any(name.startswith(("features", "bin")) for name in names)
    engine.ctr("tasks", "delete", "--force", "changed")
    engine.ctr("containers", "delete", "changed")


def test_an_export_without_the_blobs_is_an_error_that_says_so(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    failed = engine.ctr("images", "export", str(engine.folder / "export.tar"), f"{image}:es", check=False)
    assert failed.returncode != 0
    assert "content digest" in failed.stderr
    assert "not found" in failed.stderr


def test_layers_that_nobody_names_are_unpacked_with_the_reason(engine: Engine, image: str) -> None:
    engine.ctr("images", "pull", "--local", "--plain-http", "--snapshotter", "p2pgz", f"{image}:nameless")
    assert engine.run(f"{image}:nameless", "nameless") == f"{READY}\n"
    reasons = [entry["reason"] for entry in engine.status()["unpacked"]]
    assert len(reasons) == 4
    assert all("fetches layers before" in reason for reason in reasons)


def test_an_image_that_the_node_refuses_is_unpacked_with_the_reason(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:liar")
    assert engine.run(f"{image}:liar", "liar") == f"{READY}\n"
    assert not any("liar" in mount["ref"] for mount in engine.status()["mounts"])
    why = engine.p2pgz("why", f"{image}:liar").stdout.splitlines()
    assert len(why) == 4
    assert all("was unpacked by containerd" in line and "TOC" in line for line in why)
    assert engine.p2pgz("why", f"{image}:es", check=False).returncode != 0


def test_a_layer_that_must_be_its_diff_id_is_read_first(engine: Engine, image: str) -> None:
    engine.end("snapshotter")
    engine.environment["P2PGZ_SNAPSHOTTER__REQUIRE_VERIFIED_DIFFID"] = "true"
    try:
        engine.start_snapshotter()
        engine.pull(f"{image}:verified")
        assert any(f"{image}:verified" in mount["ref"] for mount in engine.status()["mounts"])
        failed = engine.ctr(
            "images", "pull", "--plain-http", "--snapshotter", "p2pgz", f"{image}:claimant", check=False
        )
        assert "wrong diff id" in failed.stderr  # containerd unpacks it, and finds the same
        assert not any("claimant" in mount["ref"] for mount in engine.status()["mounts"])
        assert engine.status()["diffid_conflicts"][-1]["effect"] == "this one is refused"
    finally:
        del engine.environment["P2PGZ_SNAPSHOTTER__REQUIRE_VERIFIED_DIFFID"]
        engine.end("snapshotter")
        engine.start_snapshotter()


class Namespace:
    """The engine in another namespace of containerd."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self._before = engine.namespace
        engine.namespace = name

    def close(self) -> None:
        self.engine.namespace = self._before


def test_two_namespaces_share_one_mount(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    before = own_mounts(engine)
    other = Namespace(engine, "other")
    try:
        engine.pull(f"{image}:es")
        assert engine.run(f"{image}:es", "other") == f"{READY}\n"
    finally:
        other.close()
    assert own_mounts(engine) == before


def test_a_mount_torn_away_is_made_again(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    assert engine.run(f"{image}:es", "whole") == f"{READY}\n"
    for directory in own_mounts(engine):
        unmount(directory, lazy=True)
    assert engine.run(f"{image}:es", "torn") == f"{READY}\n"


def test_a_container_lives_through_the_kills_of_everything_below_it(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    engine.ctr("run", "-d", "--snapshotter", "p2pgz", f"{image}:es", "survivor", "/bin/sh", "-c", WAITING)
    engine.kill("snapshotter")
    engine.kill("node")
    engine.kill("containerd")
    engine.start()
    upper = Path("/proc", pid_of(engine, "survivor"), "root")
    (upper / "tmp" / "go").touch()
    until(lambda: (upper / "tmp" / "sum").exists() and (upper / "tmp" / "sum").read_text() != "")
    assert (upper / "tmp" / "sum").read_text() == (upper / "features" / "large.md5").read_text()
    assert engine.run(f"{image}:es", "after") == f"{READY}\n"
    engine.ctr("tasks", "kill", "-s", "SIGKILL", "survivor")
    until(lambda: "STOPPED" in engine.ctr("tasks", "ls").stdout)
    engine.ctr("tasks", "delete", "survivor")
    engine.ctr("containers", "delete", "survivor")


def pid_of(engine: Engine, name: str) -> str:
    rows = [line.split() for line in engine.ctr("tasks", "ls").stdout.splitlines()]
    return next(row[1] for row in rows if row[0] == name)


def test_a_container_starts_again_after_all_mounts_are_gone(engine: Engine, image: str) -> None:
    engine.pull(f"{image}:es")
    engine.ctr("containers", "create", "--snapshotter", "p2pgz", f"{image}:es", "again")
    for directory in own_mounts(engine):
        unmount(directory, lazy=True)
    engine.kill("snapshotter")
    engine.start_snapshotter()
    assert engine.ctr("tasks", "start", "again").stdout == f"{READY}\n"
    engine.ctr("containers", "delete", "again")


def test_what_no_image_needs_is_removed(engine: Engine, image: str) -> None:
    for name in ("es", "zc", "gz"):
        engine.pull(f"{image}:{name}")
    for namespace in ("test", "other"):
        there = Namespace(engine, namespace)
        try:
            for reference in engine.ctr("images", "ls", "-q").stdout.split():
                engine.ctr("images", "rm", "--sync", reference)
        finally:
            there.close()
    until(lambda: engine.snapshots() == [])
    until(lambda: own_mounts(engine) == [])
    for name in ("records", "snapshots"):
        until(lambda name=name: os.listdir(engine.state_dir / "snapshotter" / name) == [])  # type: ignore[misc]
    until(lambda: engine.status()["mounts"] == [])
