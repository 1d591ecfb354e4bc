"""`p2pgz doctor`: each check on hosts that are well and on those that are not, and that one failing check stops no other."""

from __future__ import annotations

import json
import os
import socket

import pytest

from p2pgz.cli import checkup, checkup_network
from p2pgz.cli.checkup import Finding
from p2pgz.config import Config, HttpConfig, PeersConfig
from p2pgz.errors import ConfigError, StateError
from p2pgz.pool import disk as pool_disk

WELL = {
    "node": {
        "version": "1",
        "pid": 7,
        "uptime_seconds": 5.0,
        "identity_twins": 0,
        "peer_id": "12D3",
        "addrs": ["/ip4/192.0.2.1/tcp/4801"],
        "http": ["http://127.0.0.1:4802/"],
        "faulty_peers": [],
        "connections_accepted": 2,
    },
    "config": {"refused": None, "waiting_for_restart": []},
    "pool": {"state": "keeping", "error": "", "lost_chunks": 0, "scrub_wrong_chunks": 0},
    "mounts": [],
    "peers": [{"peer_id": "a"}, {"peer_id": "a"}, {"peer_id": "b"}],
    "sources": {"peer": {"bytes": 0}},
}


def changed(**tables):
    return {name: {**value, **tables[name]} if name in tables else value for name, value in WELL.items()}


def states(findings) -> set[str]:
    return {finding.state for finding in findings}


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("6.18.1", "ok"),
        ("6.1.0-18-amd64", "ok"),
        ("5.2.0", "ok"),
        ("5.1.21", "failed"),
        ("4.19.0-26-amd64", "failed"),
        ("nonsense", "failed"),
    ],
)
def test_kernel(release, state):
    assert checkup.kernel(release).state == state


def test_fuse(tmp_path):
    assert checkup.fuse(tmp_path / "absent", is_root=True).state == "failed"
    assert "modprobe" in checkup.fuse(tmp_path / "absent", is_root=True).hint
    (tmp_path / "fuse").touch()
    assert checkup.fuse(tmp_path / "fuse", is_root=True).state == "ok"


def test_fuse_without_root_wants_fusermount3(tmp_path, monkeypatch):
    (tmp_path / "fuse").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkup.fuse(tmp_path / "fuse", is_root=False).state == "failed"
    (tmp_path / "fusermount3").write_text("#!/bin/sh\n")
    (tmp_path / "fusermount3").chmod(0o755)
    assert checkup.fuse(tmp_path / "fuse", is_root=False).state == "ok"


def test_rights():
    assert checkup.rights("CapEff:\t000001ffffffffff\n", is_root=True).state == "ok"
    assert checkup.rights("CapEff:\t00000000a80425fb\n", is_root=True).state == "failed"
    assert checkup.rights("", is_root=True).state == "warning"
    assert checkup.rights("", is_root=False).state == "warning"


def test_erofs(tmp_path):
    result = tmp_path / "result"
    assert checkup.erofs("nodev proc\n", tmp_path, result, boot_id="b").state == "warning"
    assert checkup.erofs("nodev proc\n\terofs\n", tmp_path, result, boot_id="b").state == "ok"
    for passed, boot, state in ((True, "b", "ok"), (False, "b", "warning"), (False, "an earlier one", "ok")):
        result.write_text(json.dumps({"boot_id": boot, "kernel": "", "passed": passed, "reason": "zeros"}))
        assert checkup.erofs("erofs", tmp_path, result, boot_id="b").state == state
    result.write_text("{")
    assert checkup.erofs("erofs", tmp_path, result, boot_id="b").state == "ok"


def test_clock():
    assert checkup.clock(0.0, lambda: 0).state == "failed"
    assert checkup.clock(1_800_000_000, lambda: 0).state == "ok"
    assert checkup.clock(1_800_000_000, lambda: 5).state == "warning"
    assert 0 <= checkup.kernel_clock_state() <= 5


def test_disk(tmp_path, monkeypatch):
    [finding] = checkup.disk(tmp_path / "not" / "made" / "yet", check_filesystem=False)
    assert finding.state in {"ok", "warning"}
    assert not (tmp_path / "not").exists(), "looking changes nothing"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert states(checkup.disk(tmp_path, check_filesystem=False)) == {"failed"}


def test_a_disk_that_a_pool_cannot_be_on(tmp_path, monkeypatch):
    def refuse(directory):
        raise StateError(f"{directory} is on NFS", hint="choose another")

    monkeypatch.setattr(pool_disk, "refuse_unfit_file_system", refuse)
    [finding] = checkup.examine([("disk", lambda: checkup.disk(tmp_path, check_filesystem=True))])
    assert finding == Finding("disk", "failed", f"{tmp_path} is on NFS", "choose another")


def test_a_check_that_fails_stops_no_other():
    def broken():
        raise ConfigError("what", hint="do this")

    def lost():
        raise OSError(5, "Input/output error")

    def two():
        return [Finding("c", "ok", "1"), Finding("c", "ok", "2")]

    found = checkup.examine([("a", broken), ("b", lost), ("c", two)])
    assert [finding.state for finding in found] == ["failed", "failed", "ok", "ok"]
    assert found[0].hint == "do this"


def test_ports():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert checkup.port("ports", "127.0.0.1", number, ours=False).state == "failed"
        assert checkup.port("ports", "127.0.0.1", number, ours=True).state == "ok"
        config = Config(peers=PeersConfig(enabled="never"), http=HttpConfig(listen=f"127.0.0.1:{number}"))
        assert states(checkup_network.ports(config, None)) == {"failed"}
    assert checkup.port("ports", "192.0.2.77", 4801, ours=False).state == "failed"
    nothing = Config(peers=PeersConfig(enabled="never"), http=HttpConfig(listen="none"))
    assert states(checkup_network.ports(nothing, None)) == {"skipped"}
    assert states(checkup_network.ports(Config(), WELL)) == {"ok"}


def test_names():
    def look(name):
        if name == "absent":
            raise socket.gaierror(-2, "Name or service not known")
        return ["192.0.2.1"]

    assert [finding.state for finding in checkup_network.names(["here", "absent", "here"], look)] == [
        "ok",
        "failed",
    ]
    assert states(checkup_network.names([], look)) == {"skipped"}
    assert "127.0.0.1" in checkup_network.look_up("localhost")


def test_node():
    assert states(checkup_network.node(None, "1")) == {"skipped"}
    assert states(checkup_network.node(WELL, "1")) == {"ok"}
    assert states(checkup_network.node(WELL, "2")) == {"ok", "warning"}
    for trouble in (
        {"node": {"identity_twins": 1}},
        {"config": {"refused": "a key"}},
        {"pool": {"state": "failing", "error": "EIO"}},
    ):
        assert states(checkup_network.node(changed(**trouble), "1")) == {"ok", "failed"}
    for trouble in ({"config": {"waiting_for_restart": ["x.y"]}}, {"pool": {"scrub_wrong_chunks": 1}}):
        assert states(checkup_network.node(changed(**trouble), "1")) == {"ok", "warning"}
    lost = {**WELL, "mounts": [{"dir": "/mnt", "state": "lost", "error": "gone"}]}
    assert states(checkup_network.node(lost, "1")) == {"ok", "failed"}


def test_peers():
    assert states(checkup_network.peers(None, [])) == {"skipped"}
    assert states(checkup_network.peers(WELL, [])) == {"ok"}
    assert states(checkup_network.peers({**WELL, "peers": []}, [])) == {"warning"}
    assert states(checkup_network.peers(changed(node={"connections_accepted": 0}), [])) == {"ok", "warning"}
    assert states(checkup_network.peers(changed(node={"faulty_peers": [{}]}), [])) == {"ok", "warning"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"
        assert states(checkup_network.peers(WELL, [address])) == {"ok"}
    assert states(checkup_network.peers({**WELL, "peers": []}, [address])) == {"failed"}


def test_a_byte_from_a_peer_is_not_claimed_where_none_came():
    assert checkup_network.byte_from_a_peer(None, None, None).state == "skipped"
