"""Images carried in files, by real commands between two nodes: one has a registry, the other has nobody."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import FILES, push_converted
from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.cli.running import P2pgz, mounted, until
from tests.e2e.peers.swarm import swarm

pytestmark = pytest.mark.root


def test_a_host_without_a_registry_mounts_by_tag_and_by_digest(
    make_p2pgz: Callable[..., P2pgz], home: Path
) -> None:
    connected, alone = make_p2pgz("connected"), make_p2pgz("alone")
    file, second = home / "app.export", home / "second.export"
    connected.start_node()
    with RegistryThread.running() as registry:
        reference = push_converted(
            connected, home / "layout", f"{registry.address}/team/app:1", FILES, options=("--quiet",)
        )
        connected.ok("export", "--plain-http", reference, "-o", file)
        # a later image shares a file with the first, and is on the disk of the other side as far as that goes
        later = push_converted(
            connected,
            home / "layout2",
            f"{registry.address}/team/app:2",
            {"data/0": FILES["data/0"], "new": b"new"},
        )
        alone.start_node()
        done = alone.ok("import", file, "--json")
        inventory = home / "inventory"
        alone.ok("inventory", "-o", inventory)
        connected.ok("export", "--plain-http", later, "-o", second, "--missing-from", inventory)
        before = len(registry.fake.seen("GET", "/"))
    assert second.stat().st_size < 20_000 < 1 << 20 < file.stat().st_size
    digest = done.json()["digest"]
    repository = reference.rpartition(":")[0]
    for name in (reference, f"{repository}@{digest}"):
        with mounted(alone, name, home / "root") as shown:
            assert ("cannot be reached" in shown.err) == (name == reference)
            for path, data in FILES.items():
                assert (home / "root" / path).read_bytes() == data
    assert len(registry.fake.seen("GET", "/")) == before  # it was still up when the file was taken in
    assert [pin["digest"] for pin in alone.status()["pool"]["pins"]] == [digest]

    assert "left out" in alone.ok("import", "--check", second).out
    alone.ok("import", second)
    assert alone.ok("cat", later, "/new").out == "new"
    assert "1 chunks right" not in alone.ok("verify", later).out
    assert alone.status()["sources"]["registry"]["bytes"] == 0


def test_an_import_that_is_interrupted_leaves_no_image(make_p2pgz: Callable[..., P2pgz], home: Path) -> None:
    sender, receiver = make_p2pgz("sender"), make_p2pgz("receiver")
    layout = Layout(home / "layout").add("t", tar_layer(FILES))
    file = home / "app.export"
    sender.ok("export", layout, "--as", "registry.example/team/app:1", "-o", file)
    receiver.start_node()
    data = file.read_bytes()
    with subprocess.Popen(
        receiver.command("import", "-"),
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=receiver.environment,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        owners = until(
            lambda: [pin["owner"] for pin in receiver.status()["pool"]["pins"]], "the first chunks"
        )
        assert owners == ["import"]
        process.send_signal(signal.SIGKILL)
    until(lambda: receiver.status()["pool"]["pins"] == [], "the end of the import")
    receiver.fails(13, "ls", "registry.example/team/app:1", "/")
    (home / "half").write_bytes(data[: len(data) // 2])
    assert "copy it again" in receiver.fails(12, "import", home / "half")
    assert "this is another file" in receiver.fails(12, "import", file, "--digest", "sha256:" + "0" * 64)
    receiver.fails(2, "import", home / "nosuch")
    receiver.ok("import", file)
    assert "4 chunks right" in receiver.ok("verify", "registry.example/team/app:1").out

    sender.fails(2, "export", layout, "-o", home / "x")  # no name for the other side
    sender.fails(10, "export", f"oci:{home}/layout:nosuch", "--as", "registry.example/x:1", "-o", home / "x")
    os.mkfifo(home / "fifo")
    sender.fails(2, "export", layout, "--as", "registry.example/x:1", "-o", home / "fifo")
    assert not (home / "x").exists()
    assert list(home.glob(".*.partial")) == []


def test_what_a_peer_has_is_left_out(home: Path) -> None:
    layout = Layout(home / "layout").add("t", tar_layer(FILES))
    reference = "registry.example/team/app:1"
    with swarm(home, 2) as (first, second):
        first.join()
        second.join(first)
        first.ok("convert", layout, f"oci:{home}/lazy:t", "--quiet")
        for node in (first, second):
            node.ok("ls", f"oci:{home}/lazy:t", "/data")
        second.ok("cat", f"oci:{home}/lazy:t", "/data/1")
        words = ("export", f"oci:{home}/lazy:t", "--as", reference, "-o", home / "file", "--missing-from")
        peer = second.status()["node"]["peer_id"]
        first.ok(*words, peer)
        left = first.ok("import", "--check", home / "file", "--json").json()["left_out_chunks"]
        assert 0 < left < 4
        stranger = peer[:-4] + ("aaaa" if peer[-4:] != "aaaa" else "bbbb")
        assert "must be connected" in first.fails(10, *words, stranger)
