"""A registry that lies, stalls or refuses: a named error at mount, EIO for a read, and right bytes once it behaves."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pgz.core.media import OCI_MANIFEST
from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import FILES, MIB, push_converted
from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.cli.running import P2pgz, below, mounted, until

pytestmark = [pytest.mark.root]

ALWAYS = 1 << 30
REFUSED, INVALID, UNAVAILABLE = 11, 12, 13
QUICK = {"P2PGZ_FETCH__READ_DEADLINE_SECONDS": "2"}
REPOSITORY = "team/app"


@pytest.fixture
def reader(make_p2pgz: Callable[..., P2pgz]) -> P2pgz:
    """A node whose reads give up soon."""
    p2pgz = make_p2pgz("reader", **QUICK)
    p2pgz.start_node()
    return p2pgz


@pytest.fixture
def image(make_p2pgz: Callable[..., P2pgz], registry: RegistryThread, home: Path) -> str:
    """A converted image in the registry."""
    target = f"{registry.address}/{REPOSITORY}:1"
    push_converted(make_p2pgz("converter"), home / "layout", target, FILES)
    registry.fake.requests.clear()
    return target


AT_MOUNT = {
    "manifest of other bytes": (
        Fault(on="GET /v2/team/app/manifests", body=b'{"schemaVersion": 2}'),
        INVALID,
    ),
    "manifest cut short": (Fault(on="GET /v2/team/app/manifests", short_by=10), INVALID),
    "HTML instead of a manifest": (Fault(on="manifests", body=b"<html>Sign in</html>"), INVALID),
    "endless manifest": (Fault(on="GET /v2/team/app/manifests", endless=True), INVALID),
    "layer of zeros": (Fault(on="GET /v2/team/app/blobs", body=bytes(1000)), INVALID),
    "connection cut before every answer": (Fault(drop_after=-1), UNAVAILABLE),
    "redirect loop": (Fault(on="blobs", redirect="/v2/team/app/blobs/loop"), UNAVAILABLE),
    "redirect to nowhere": (Fault(on="blobs", redirect="http://127.0.0.1:1/"), UNAVAILABLE),
    "internal server error": (Fault(status=500), UNAVAILABLE),
    "forbidden": (Fault(status=403), REFUSED),
}


@pytest.mark.parametrize("name", AT_MOUNT)
def test_mount_is_refused(reader: P2pgz, registry: RegistryThread, image: str, home: Path, name: str) -> None:
    fault, code = AT_MOUNT[name]
    fault.times = ALWAYS
    registry.spoil(fault)
    root = home / "root"
    root.mkdir()
    said = reader.fails(code, "mount", "--plain-http", image, root)
    assert registry.address in said
    assert below(home) == []
    registry.spoil()
    with mounted(reader, image, root, "--plain-http", "--no-fill"):
        assert (root / "data/0").read_bytes() == FILES["data/0"]


AT_READ = {
    "zeros": Fault(body=bytes(MIB // 2)),
    "short": Fault(short_by=1),
    "cut": Fault(drop_after=1000),
    "endless": Fault(endless=True),
    "another range": Fault(headers={"Content-Range": "bytes 0-1/99999999"}),
    "a range of a larger blob": Fault(headers={"Content-Range": "bytes 0-1048575/1048576"}),
    "HTML": Fault(body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
    "redirect loop": Fault(redirect="/v2/team/app/blobs/loop"),
    "internal server error": Fault(status=503),
    "not found": Fault(status=404),
}


@pytest.mark.parametrize("name", AT_READ)
def test_read_fails_and_later_succeeds(
    reader: P2pgz, registry: RegistryThread, image: str, home: Path, name: str
) -> None:
    root = home / "root"
    with mounted(reader, image, root, "--plain-http", "--no-fill"):
        fault = AT_READ[name]
        fault.on, fault.times = "/blobs/", ALWAYS
        registry.spoil(fault)
        try:
            data = (root / "data/1").read_bytes()
        except OSError as error:
            assert error.errno in (errno.EIO, errno.ENOENT), error  # noqa: PT017
        else:  # some lies can be told apart from the bytes that came with them
            assert data == FILES["data/1"]
        registry.spoil()
        for path, content in FILES.items():
            until(lambda path=path: is_readable(root / path), f"{path}, readable again")
            assert (root / path).read_bytes() == content


def is_readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def test_a_server_without_ranges_is_read_all_the_same(
    reader: P2pgz, registry: RegistryThread, image: str, home: Path
) -> None:
    registry.spoil(Fault(on="/blobs/", ignore_range=True, times=ALWAYS))
    with mounted(reader, image, home / "root", "--plain-http", "--no-fill"):
        assert (home / "root/data/2").read_bytes() == FILES["data/2"]


def test_ten_thousand_layers(reader: P2pgz, registry: RegistryThread, home: Path) -> None:
    store = registry.fake.store
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + "1" * 64, "size": 1}
    config = store.add_blob(REPOSITORY, b"{}")
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/json", "digest": str(config.digest), "size": 2},
        "layers": [layer] * 10_000,
    }
    store.add_manifest(REPOSITORY, json.dumps(document).encode(), tag="many")
    (home / "root").mkdir()
    said = reader.fails(
        INVALID, "mount", "--plain-http", f"{registry.address}/{REPOSITORY}:many", home / "root"
    )
    assert "10000 layers" in said
    assert registry.blob_requests() == 0


def test_credentials(reader: P2pgz, registry: RegistryThread, image: str, home: Path) -> None:
    registry.fake.auth = "basic"
    registry.fake.users = {"ann": "right-password"}
    root = home / "root"
    root.mkdir()
    assert registry.address in reader.fails(REFUSED, "mount", "--plain-http", image, root)
    said = reader.fails(REFUSED, "mount", "--plain-http", "--user", "ann:wrong-password", image, root)
    assert "wrong-password" not in said
    with mounted(reader, image, root, "--plain-http", "--user", "ann:right-password"):
        assert (root / "data/0").read_bytes() == FILES["data/0"]
    assert "password" not in reader.log()


def test_no_such_tag(reader: P2pgz, registry: RegistryThread, image: str, home: Path) -> None:
    (home / "root").mkdir()
    said = reader.fails(10, "mount", "--plain-http", f"{registry.address}/{REPOSITORY}:other", home / "root")
    assert REPOSITORY in said
    assert "other" in said


def test_nobody_listens(reader: P2pgz, home: Path) -> None:
    (home / "root").mkdir()
    said = reader.fails(UNAVAILABLE, "mount", "--plain-http", "127.0.0.1:1/team/app:1", home / "root")
    assert "127.0.0.1:1" in said


def test_a_plain_layer_with_other_bytes_is_refused(
    reader: P2pgz, registry: RegistryThread, home: Path
) -> None:
    layer = tar_layer({"file": os.urandom(300_000)})
    folder = Layout(home / "layout")
    p2pgz_reference = folder.add("plain", layer)
    assert p2pgz_reference.startswith("oci:")
    blob = next(
        path for path in (folder.folder / "blobs/sha256").iterdir() if path.stat().st_size == len(layer)
    )
    damaged = bytearray(layer)
    damaged[200_000] ^= 1
    blob.write_bytes(damaged)
    (home / "root").mkdir()
    reader.fails(INVALID, "mount", p2pgz_reference, home / "root")
    assert reader.status()["pool"]["chunks"] == 0
