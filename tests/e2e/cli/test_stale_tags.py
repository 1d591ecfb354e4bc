"""Commands while the registry is down: the tag means what it meant, and everybody is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pgz.core.media import OCI_INDEX, OCI_LAYER_TAR
from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.layouts import ARCHITECTURE, Layout, diff_id, tar_layer
from tests.e2e.cli.running import P2pgz, mounted, mounted_at, umount, until

pytestmark = pytest.mark.root


def test_commands_go_on_with_the_last_digest_and_say_so(
    p2pgz: P2pgz, registry: RegistryThread, home: Path
) -> None:
    layout = Layout(home / "layout").add("t", tar_layer({"file": b"contents\n"}))
    reference = f"{registry.address}/team/app:1"
    p2pgz.ok("convert", layout, reference)
    p2pgz.start_node()
    with mounted(p2pgz, reference, home / "first", "--json") as done:
        digest = done.json()["digest"]
        assert done.json()["warnings"] == []
        registry.spoil(Fault(status=503, headers={"Retry-After": "3600"}, times=10_000))
        (home / "second").mkdir()
        done = p2pgz.ok("mount", reference, home / "second", "--json")
        [warning] = done.json()["warnings"]
        assert "cannot be reached" in warning
        assert done.json()["digest"] == digest
        assert (home / "second" / "file").read_bytes() == b"contents\n"
        stale = {mount["dir"]: mount["stale_since"] for mount in p2pgz.status()["mounts"]}
        assert stale[str(home / "first")] is None
        assert stale[str(home / "second")] > 1e9
        umount(home / "second")

        for words, expected in ((("cat", reference, "/file"), "contents\n"), (("ls", reference), "file")):
            done = p2pgz.ok(*words)
            assert expected in done.out
            assert "cannot be reached" in done.err
        done = p2pgz.ok("ls", "--json", reference)
        assert isinstance(json.loads(done.out), list)
        done = p2pgz.ok("verify", "--json", reference)
        assert "cannot be reached" in done.json()["warnings"][0]

        assert "by digest it can be had" in p2pgz.fails(13, "ls", f"{registry.address}/team/app:2")
    registry.spoil()
    assert p2pgz.ok("cat", reference, "/file").err == ""


def test_mount_at_start_is_of_this_machine_whatever_platform_was_asked_for_last(
    p2pgz: P2pgz, home: Path
) -> None:
    other = "arm64" if ARCHITECTURE != "arm64" else "amd64"
    layout = Layout(home / "layout")
    entries = []
    for architecture in (ARCHITECTURE, other):
        layer = tar_layer({"file": architecture.encode()})
        config = layout.config([diff_id(layer)], architecture=architecture)
        manifest = layout.manifest([layout.store(layer, OCI_LAYER_TAR)], config)
        entries.append({**manifest, "platform": {"os": "linux", "architecture": architecture}})
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    layout.tag("t", layout.store(json.dumps(index).encode(), OCI_INDEX))
    reference = layout.reference("t")
    p2pgz.start_node()
    assert p2pgz.ok("cat", reference, "/file").out == ARCHITECTURE
    assert p2pgz.ok("cat", "--platform", f"linux/{other}", reference, "/file").out == other
    p2pgz.stop_node()

    root = home / "root"
    root.mkdir()
    config = home / "config.toml"
    config.write_text(f'[[mounts]]\nreference = "{reference}"\ndirectory = "{root}"\n')
    p2pgz.start_node(P2PGZ_CONFIG=str(config))
    until(lambda: mounted_at(root), "the mount of the configuration")
    assert (root / "file").read_text() == ARCHITECTURE
    umount(root)
