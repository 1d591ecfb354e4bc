"""A real image in Debian's docker-registry: converted by the command, mounted, compared with umoci's unpack, run, and what
it costs a second time and beside another image.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.e2e import lab_images
from tests.e2e.cli.images import FILES, MIB, noise, push_converted
from tests.e2e.cli.running import P2pgz, below, mounted, until
from tests.e2e.trees import differences

pytestmark = [
    pytest.mark.root,
    pytest.mark.registry,
    pytest.mark.tools("umoci", "skopeo", "debootstrap", "busybox"),
    pytest.mark.timeout(600),  # the first one builds the images
]

UNAVAILABLE = 13
QUICK = {"P2PGZ_FETCH__READ_DEADLINE_SECONDS": "2"}


@pytest.fixture(scope="module")
def converted(lab_registry: RunningRegistry, disk: Path) -> dict[str, str]:
    """`small` in both formats, converted from registry to registry: reference by format."""
    p2pgz = P2pgz(Path(tempfile.mkdtemp(dir=disk)) / "state")
    references = {}
    for layer_format, tag in (("estargz", "es"), ("zstd:chunked", "zc")):
        target = f"{lab_registry.address}/lab/small:{tag}"
        source = f"{lab_registry.address}/lab/small:gz"
        done = p2pgz.ok("convert", "--json", "--plain-http", "--format", layer_format, source, target)
        references[layer_format] = f"{target}@{done.json()['digest']}"
    return references


@pytest.fixture
def own_registry(home: Path) -> Iterator[RunningRegistry]:
    """A registry that a test may stop."""
    with running_registry(home / "registry") as registry:
        yield registry


def blob_requests(registry: RunningRegistry) -> list[str]:
    return [line for line in registry.requests() if '"GET /v2/' in line and "/blobs/" in line]


def read_all(root: Path) -> int:
    """Read every byte of a small tree."""
    return sum(len(path.read_bytes()) for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def fetched_bytes(p2pgz: P2pgz) -> int:
    count: int = p2pgz.status()["sources"]["registry"]["bytes"]
    return count


@pytest.mark.parametrize("layer_format", ["estargz", "zstd:chunked"])
@pytest.mark.parametrize("by", ["tag", "digest"])
def test_mount_is_what_umoci_unpacks(
    p2pgz: P2pgz, converted: dict[str, str], unpacked: dict[str, Path], home: Path, layer_format: str, by: str
) -> None:
    named, digest = converted[layer_format].split("@")
    reference = named if by == "tag" else f"{named.rpartition(':')[0]}@{digest}"
    with mounted(p2pgz, reference, home / "root", "--plain-http", "--suid", "--dev"):
        assert differences(unpacked[lab_images.SMALL], home / "root") == []


def test_plain_image_too(
    p2pgz: P2pgz, lab_registry: RunningRegistry, unpacked: dict[str, Path], home: Path
) -> None:
    reference = f"{lab_registry.address}/lab/small:gz"
    with mounted(p2pgz, reference, home / "root", "--plain-http", "--suid", "--dev"):
        assert differences(unpacked[lab_images.SMALL], home / "root") == []


def test_program_runs_over_an_overlay(p2pgz: P2pgz, converted: dict[str, str], home: Path) -> None:
    upper, work, merged = (home / name for name in ("upper", "work", "merged"))
    for folder in (upper, work, merged):
        folder.mkdir()
    with mounted(p2pgz, converted["estargz"], home / "root", "--plain-http", "--no-fill"):
        options = f"lowerdir={home / 'root'},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(merged)], check=True)
        try:
            assert lab_images.READY in lab_images.run_image(merged)
            (merged / "etc/hostname").write_text("changed\n")
            assert (home / "root/etc/hostname").read_text() == "small\n"
        finally:
            subprocess.run(["umount", str(merged)], check=True)


def test_debian_image_starts_its_service_lazily_and_is_what_umoci_unpacks(
    p2pgz: P2pgz, lab_registry: RunningRegistry, unpacked: dict[str, Path], home: Path
) -> None:
    reference = f"{lab_registry.address}/lab/redis:es"
    p2pgz.ok("convert", "--plain-http", f"{lab_registry.address}/lab/redis:gz", reference)
    with mounted(p2pgz, reference, home / "root", "--plain-http", "--no-fill", "--suid", "--dev"):
        assert lab_images.READY in lab_images.run_image(home / "root")
        total = p2pgz.status()["mounts"][0]["bytes"]
        assert 0 < fetched_bytes(p2pgz) < total / 2
        # an eStargz TOC keeps whole seconds (stargz-snapshotter's format), Debian's packages here have nanoseconds
        times = lambda path, field: field == "mtime"  # noqa: E731
        assert differences(unpacked[lab_images.REDIS], home / "root", ignore=times) == []
    with mounted(
        p2pgz, f"{lab_registry.address}/lab/redis:gz", home / "plain", "--plain-http", "--suid", "--dev"
    ):
        assert differences(unpacked[lab_images.REDIS], home / "plain") == []


def test_second_mount_asks_for_no_blob(
    p2pgz: P2pgz, converted: dict[str, str], lab_registry: RunningRegistry, home: Path
) -> None:
    p2pgz.start_node()
    with mounted(p2pgz, converted["estargz"], home / "first", "--plain-http"):
        count = read_all(home / "first/features")
    asked = len(blob_requests(lab_registry))
    with mounted(p2pgz, converted["estargz"], home / "second", "--plain-http"):
        assert read_all(home / "second/features") == count
    p2pgz.stop_node()
    p2pgz.start_node()
    with mounted(p2pgz, converted["estargz"], home / "third", "--plain-http"):
        assert read_all(home / "third/features") == count
    assert len(blob_requests(lab_registry)) == asked


def test_second_image_costs_what_is_new(p2pgz: P2pgz, own_registry: RunningRegistry, home: Path) -> None:
    p2pgz.start_node()
    new = {"new/file": noise(100)}
    first = push_converted(p2pgz, home / "a", f"{own_registry.address}/team/a:1", FILES, {"a": b"a" * 1000})
    second = push_converted(p2pgz, home / "b", f"{own_registry.address}/team/a:2", FILES, new)
    with mounted(p2pgz, first, home / "first", "--plain-http", "--no-fill"):
        read_all(home / "first")
        before, asked = fetched_bytes(p2pgz), len(blob_requests(own_registry))
        with mounted(p2pgz, second, home / "second", "--plain-http", "--no-fill"):
            read_all(home / "second")
            assert fetched_bytes(p2pgz) - before <= MIB
            blobs = {line.split("/blobs/")[1][:71] for line in blob_requests(own_registry)[asked:]}
            assert len(blobs) <= 2, "the new layer and the config"


def test_files_and_chunks_of_other_layers_are_not_fetched_again(
    p2pgz: P2pgz, own_registry: RunningRegistry, home: Path
) -> None:
    """Two images without a common layer: equal files are found again, and equal chunks of files that differ."""
    p2pgz.start_node()
    large = [noise(number) for number in range(20, 26)]
    changed = [*large[:3], noise(99), *large[4:]]
    one = {**FILES, "large": b"".join(large)}
    two = {
        "first": b"another layer",
        **{f"moved/{name}": data for name, data in FILES.items()},
        "large": b"".join(changed),
    }
    first = push_converted(p2pgz, home / "a", f"{own_registry.address}/team/a:1", one)
    second = push_converted(p2pgz, home / "b", f"{own_registry.address}/team/b:1", two)
    with mounted(p2pgz, first, home / "first", "--plain-http", "--no-fill"):
        read_all(home / "first")
        before = fetched_bytes(p2pgz)
        with mounted(p2pgz, second, home / "second", "--plain-http", "--no-fill"):
            assert (home / "second/large").read_bytes() == two["large"]
            for name, data in FILES.items():
                assert (home / "second/moved" / name).read_bytes() == data
            # the changed chunk, and what the request for the layer's tail brought anyway
            assert fetched_bytes(p2pgz) - before <= 2 * MIB


def test_registry_dies_in_the_middle(
    make_p2pgz: Callable[..., P2pgz], own_registry: RunningRegistry, home: Path
) -> None:
    p2pgz = make_p2pgz(**QUICK)
    reference = push_converted(p2pgz, home / "a", f"{own_registry.address}/team/a:1", FILES)
    root = home / "root"
    with mounted(p2pgz, reference, root, "--plain-http", "--no-fill"):
        assert (root / "data/0").read_bytes() == FILES["data/0"]
        own_registry.stop()
        # what came with the TOC or the first read stays readable; of the rest nothing can be had now
        codes = {read_errno(root / name) for name in list(FILES)[1:]}
        assert errno.EIO in codes
        assert codes <= {errno.EIO, 0}
        assert (root / "data/0").read_bytes() == FILES["data/0"]
        assert os.statvfs(root).f_blocks > 0
        own_registry.start()
        for name, data in FILES.items():
            until(lambda name=name: read_errno(root / name) == 0, f"{name}, readable again")
            assert (root / name).read_bytes() == data


def read_errno(path: Path) -> int:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno or -1
    return 0


def test_registry_is_down_at_mount(p2pgz: P2pgz, own_registry: RunningRegistry, home: Path) -> None:
    reference = push_converted(p2pgz, home / "a", f"{own_registry.address}/team/a:1", FILES)
    own_registry.stop()
    (home / "root").mkdir()
    assert own_registry.address in p2pgz.fails(UNAVAILABLE, "mount", "--plain-http", reference, home / "root")
    assert below(home) == []


def test_full_disk(p2pgz: P2pgz, own_registry: RunningRegistry, home: Path) -> None:
    """A state directory that fills up: reads give right bytes or an error, never wrong ones, and the node lives on."""
    files = {f"f{number}": noise(number) for number in range(40, 64)}
    reference = push_converted(p2pgz, home / "a", f"{own_registry.address}/team/a:1", files)
    image, disk = home / "disk.img", home / "small-disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(20 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    small = P2pgz(disk / "state")
    try:
        pid = small.start_node(**QUICK)
        with mounted(small, reference, disk / "root", "--plain-http", "--no-fill"):
            codes = set()
            for name, data in files.items():
                try:
                    assert (disk / "root" / name).read_bytes() == data
                except OSError as error:
                    codes.add(error.errno)
            assert codes <= {errno.EIO, errno.ENOSPC}
            assert small.node_pid() == pid
            assert (disk / "root/f40").read_bytes() == files["f40"]
    finally:
        small.close()
        subprocess.run(["umount", str(disk)], check=True)
