"""`mount`, `umount`, `node` and the rest as processes: refusals, ends, two at once, JSON for programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cli.images import noise
from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.cli.running import P2pgz, below, gone, mounted, mounted_at, umount, until, wait_gone

pytestmark = [pytest.mark.root]

USAGE, NOT_FOUND, UNMOUNTABLE, CONFIG = 2, 10, 14, 15
CLAIM_SECONDS = 45.0  # the node waits 30 for a command to fetch its mount


@pytest.fixture(scope="module")
def image(disk: Path) -> str:
    return Layout(disk / "commands").add("one", tar_layer({"file": b"content", "big": noise(1)}))


@pytest.fixture(scope="module")
def other_image(disk: Path) -> str:
    return Layout(disk / "commands-other").add("two", tar_layer({"file": b"other content"}))


@pytest.fixture(scope="module", autouse=True)
def abandoned(shared: P2pgz, image: str) -> Iterator[P2pgz]:
    """A mount that was asked for by a command that never came for it, like one killed in between."""
    shared.ask("POST", "/v1/mounts", {"reference": image, "directory": "/nowhere"})
    assert shared.mounts() == ["/nowhere"]
    return shared


def test_mount_point_must_be_an_empty_directory(p2pgz: P2pgz, image: str, home: Path) -> None:
    (home / "full").mkdir()
    (home / "full/file").touch()
    (home / "file").touch()
    for name, why in {"absent": "no such directory", "full": "not empty", "file": "not a directory"}.items():
        said = p2pgz.fails(UNMOUNTABLE, "mount", image, home / name)
        assert why in said
        assert str(home / name) in said
    assert p2pgz.node_pid() == 0, "a node was started for nothing"


def test_mounted_already(p2pgz: P2pgz, image: str, home: Path) -> None:
    with mounted(p2pgz, image, home / "root"):
        said = p2pgz.fails(UNMOUNTABLE, "mount", image, home / "root")
        assert "mounted there already" in said
        assert (home / "root/file").read_bytes() == b"content"
        assert len(p2pgz.mounts()) == 1


def test_ephemeral_node_ends_after_its_last_mount(p2pgz: P2pgz, image: str, home: Path) -> None:
    with mounted(p2pgz, image, home / "a"):
        pid = p2pgz.node_pid()
        with mounted(p2pgz, image, home / "b"):
            assert p2pgz.node_pid() == pid
        umounted = until(lambda: p2pgz.mounts() == [str(home / "a")], "the end of one mount")
        assert umounted
    wait_gone(pid)


def test_two_at_once(p2pgz: P2pgz, image: str, other_image: str, home: Path) -> None:
    wanted = {"a": image, "b": image, "c": other_image}
    for name in wanted:
        (home / name).mkdir()
    commands = [p2pgz.start("mount", reference, home / name) for name, reference in wanted.items()]
    try:
        for command in commands:
            _, said = command.communicate(timeout=30)
            assert command.returncode == 0, said
        assert sorted(p2pgz.mounts()) == sorted(str(home / name) for name in wanted)
        assert (home / "a/file").read_bytes() == (home / "b/file").read_bytes() == b"content"
        assert (home / "c/file").read_bytes() == b"other content"
    finally:
        umount(*(Path(directory) for directory in below(home)))


def test_new_mount_after_the_node_was_killed(p2pgz: P2pgz, image: str, home: Path) -> None:
    first = home / "first"
    with mounted(p2pgz, image, first):
        (first / "file").read_bytes()
        pid = p2pgz.node_pid()
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        with mounted(p2pgz, image, home / "second"):
            assert (home / "second/big").read_bytes() == noise(1)
            assert p2pgz.node_pid() not in (0, pid)


def test_umount_refuses_what_is_busy_or_not_ours(p2pgz: P2pgz, image: str, home: Path) -> None:
    (home / "empty").mkdir()
    said = p2pgz.fails(UNMOUNTABLE, "umount", home / "empty")
    assert "no p2pgz image is mounted there" in said
    with mounted(p2pgz, image, home / "root"):
        with (home / "root/file").open("rb") as file:
            said = p2pgz.fails(UNMOUNTABLE, "umount", home / "root")
            assert "in use by" in said
            assert str(os.getpid()) in said
            assert file.read() == b"content"
        p2pgz.ok("umount", home / "root")
        assert not mounted_at(home / "root")
    with mounted(p2pgz, image, home / "root"), (home / "root/big").open("rb") as file:
        p2pgz.ok("umount", "--lazy", home / "root")
        assert not mounted_at(home / "root")
        assert file.read() == noise(1)


def test_umount_of_several_does_all_it_can(p2pgz: P2pgz, image: str, home: Path) -> None:
    (home / "empty").mkdir()
    with mounted(p2pgz, image, home / "root"):
        p2pgz.fails(UNMOUNTABLE, "umount", home / "empty", home / "root")
        assert not mounted_at(home / "root")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_unmounts_on_a_signal(p2pgz: P2pgz, image: str, home: Path, number: int) -> None:
    root = home / "root"
    root.mkdir()
    command = p2pgz.start("mount", "--foreground", image, root)
    until(lambda: mounted_at(root), "the mount")
    assert (root / "file").read_bytes() == b"content"
    command.send_signal(number)
    assert command.wait(15) == 0, command.stderr and command.stderr.read()
    assert not mounted_at(root)
    until(lambda: p2pgz.node_pid() == 0, "the end of the node")


def test_foreground_ends_with_its_mount(p2pgz: P2pgz, image: str, home: Path) -> None:
    root = home / "root"
    root.mkdir()
    command = p2pgz.start("mount", "--foreground", image, root)
    until(lambda: mounted_at(root), "the mount")
    umount(root)
    assert command.wait(15) == 0


def test_without_dev_fuse(p2pgz: P2pgz, image: str, home: Path) -> None:
    (home / "root").mkdir()
    script = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *p2pgz.command("mount", image, home / "root")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=p2pgz.environment, cwd=home, check=False
    )
    assert done.returncode == UNMOUNTABLE, done.stderr
    assert "/dev/fuse" in done.stderr
    assert "modprobe fuse" in done.stderr
    until(lambda: p2pgz.node_pid() == 0, "the end of the node")


def test_other_platform(p2pgz: P2pgz, image: str, home: Path) -> None:
    (home / "root").mkdir()
    said = p2pgz.fails(NOT_FOUND, "mount", "--platform", "plan9/riscv64", image, home / "root")
    assert "plan9/riscv64" in said
    assert below(home) == []


def test_json_for_programs(shared: P2pgz, image: str, home: Path) -> None:
    with mounted(shared, image, home / "root", "--json") as done:
        document = done.json()
        assert document["dir"] == str(home / "root")
        assert document["digest"].startswith("sha256:")
        entry = next(
            mount
            for mount in shared.ok("status", "--json").json()["mounts"]
            if mount["dir"] == document["dir"]
        )
        assert entry["digest"] == document["digest"]
        assert shared.ok("verify", "--json", str(home / "root")).json()["wrong"] == []
    assert {entry["name"] for entry in shared.ok("ls", "--json", image).json()} == {"file", "big"}
    assert shared.ok("pool", "stat", "--json").json()["segments"] >= 1
    assert shared.ok("config", "show", "--json").json()["fetch.fill"] is True


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["mount", "--json", "oci:/nowhere:x", "ROOT"], NOT_FOUND),
        (["mount", "--json", "UPPER CASE", "ROOT"], USAGE),
        (["mount", "--json", "--no-such-option"], USAGE),
        (["ls", "--json", "IMAGE", "/absent"], NOT_FOUND),
    ],
)
def test_errors_as_json(shared: P2pgz, image: str, home: Path, words: list[str], code: int) -> None:
    (home / "root").mkdir()
    places = {"ROOT": str(home / "root"), "IMAGE": image}
    done = shared.run(*(places.get(word, word) for word in words))
    assert done.code == code, done.err
    error = done.error_json()
    assert error["message_type"] == "exit_error"
    assert error["code"] == code
    assert error["message"]
    assert not done.out


@pytest.mark.parametrize(
    "words", [["--no-such-option"], ["mountt"], ["mount"], ["umount"], ["mount", "a", "b", "c"]]
)
def test_called_wrongly(shared: P2pgz, words: list[str]) -> None:
    assert "Usage" in shared.fails(USAGE, *words)


def test_bad_configuration(p2pgz: P2pgz, image: str, home: Path) -> None:
    (home / "root").mkdir()
    said = p2pgz.fails(CONFIG, "mount", image, home / "root", P2PGZ_FETCH__FILL="perhaps")
    assert "fetch.fill" in said
    assert below(home) == []


def test_many_commands_within_a_minute(shared: P2pgz) -> None:
    for _ in range(300):
        assert shared.node_pid()


def test_a_mount_that_nobody_came_for_is_taken_down(abandoned: P2pgz) -> None:
    assert gone(abandoned.node_pid()) is False
    until(lambda: "/nowhere" not in abandoned.mounts(), "the end of the abandoned mount", CLAIM_SECONDS)
    assert json.dumps(abandoned.status())
