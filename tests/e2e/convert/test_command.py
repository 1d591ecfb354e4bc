"""`p2pgz convert` as a real process: what it shows, what it refuses, and what it leaves when it is stopped half way."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import running_registry
from tests.e2e.cli.layouts import Layout, tar_layer

COMMAND = [sys.executable, "-m", "p2pgz", "convert"]
DEADLINE_SECONDS = 30.0


def convert(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **(env or {})}
    )


def noise(size: int) -> bytes:
    """Bytes that take long to compress and stay large."""
    return random.Random(size).randbytes(size)


def small_layer() -> bytes:
    return tar_layer({"etc/hosts": b"127.0.0.1 here\n", "data": noise(200_000)})


def slow_layer() -> bytes:
    """Seconds of work at level 12."""
    return tar_layer({f"file{number}": noise(8_000_000 + number) * 2 for number in range(4)})


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def stop_when(
    arguments: list[str], number: int, ready: Callable[[], bool], env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Start, send a signal as soon as `ready`, and give exit code and standard error."""
    child = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while not ready():
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(number)
        _, err = child.communicate(timeout=DEADLINE_SECONDS)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    return child.returncode, err


@pytest.mark.tools("busybox", "tar")
@pytest.mark.smoke
def test_busybox_becomes_a_layer_that_tar_unpacks_and_that_names_its_files(tmp_path: Path) -> None:
    source, target = tmp_path / "busybox.tar.gz", tmp_path / "out.stargz"
    binary = Path(shutil.which("busybox") or "").read_bytes()
    with tarfile.open(source, "w:gz") as tar:
        for name, link in (("bin/busybox", ""), ("bin/sh", "busybox"), ("bin/ls", "busybox")):
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            else:
                member.size = len(binary)
            tar.addfile(member, None if link else io.BytesIO(binary))
    done = convert(f"file:{source}", f"file:{target}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "containerd.io/snapshot/stargz/toc.digest=sha256:" in done.stdout
    (tmp_path / "root").mkdir()
    subprocess.run(["tar", "-xf", target, "-C", tmp_path / "root"], check=True)
    toc = json.loads((tmp_path / "root" / "stargz.index.json").read_text())
    listed = {entry["name"]: entry for entry in toc["entries"] if entry["type"] != "chunk"}
    assert listed["bin/busybox"]["size"] == len(binary)
    assert listed["bin/sh"]["linkName"] == "busybox"
    ran = subprocess.run([tmp_path / "root" / "bin" / "sh", "-c", "echo ok"], capture_output=True, check=True)
    assert ran.stdout == b"ok\n"


def test_terminal_shows_progress_and_a_pipe_does_not(tmp_path: Path) -> None:
    source = Layout(tmp_path / "in").add("a", gzip.compress(small_layer()))
    assert convert(source, f"oci:{tmp_path / 'quiet'}:a").stderr == ""
    leader, follower = pty.openpty()
    command = [*COMMAND, source, f"oci:{tmp_path / 'out'}:a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower) as child:
        os.close(follower)
        shown = b""
        while True:
            try:
                data = os.read(leader, 1 << 16)
            except OSError:  # EIO: nobody has the other side any more
                break
            if not data:
                break
            shown += data
        out = child.stdout.read()
    os.close(leader)
    assert child.returncode == 0, shown
    assert b"done" in shown
    assert b"%s:a@sha256:" % str(tmp_path / "out").encode() in out


def test_converting_an_image_onto_itself_keeps_it_and_a_layer_is_refused(tmp_path: Path) -> None:
    image = Layout(tmp_path / "in").add("a", gzip.compress(small_layer()))
    first = convert(image, image, "--json")
    second = convert(image, image, "--json")
    assert [layer["kept"] for layer in json.loads(first.stdout)["layers"]] == [False]
    assert [layer["kept"] for layer in json.loads(second.stdout)["layers"]] == [True]
    assert json.loads(first.stdout)["digest"] == json.loads(second.stdout)["digest"]
    layer = tmp_path / "layer.tar"
    layer.write_bytes(small_layer())
    (tmp_path / "link.tar").symlink_to(layer)
    for target in (layer, tmp_path / "link.tar"):
        refused = convert(f"file:{layer}", f"file:{target}")
        assert (refused.returncode, "is source and target" in refused.stderr) == (2, True)
    assert layer.read_bytes() == small_layer()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["file:{in}/none", "file:{out}/x"], 10, "no such file"),
        (["file:{in}", "file:{out}/x"], 10, "no such file"),
        (["file:{in}/layer", "file:{out}/none/x"], 13, "No such file or directory"),
        (["file:{in}/layer", "oci:{out}/x:a"], 2, "file: is for a single layer on both sides"),
        (["--level", "13", "file:{in}/layer", "file:{out}/x"], 15, "1 to 12 are possible"),
        (["--level", "0", "--format", "zstd:chunked", "file:{in}/layer", "file:{out}/x"], 15, "1 to 22 are possible"),
        (["--level", "high", "file:{in}/layer", "file:{out}/x"], 2, "not a valid integer"),
        (["--format", "zip", "file:{in}/layer", "file:{out}/x"], 2, "zstd:chunked-stargz"),
        (["--chunk-size", "1", "file:{in}/layer", "file:{out}/x"], 15, "bytes are possible"),
        (["file:{in}/junk", "file:{out}/x"], 12, "not a tar archive"),
        (["file:{in}/cut", "file:{out}/x"], 12, "cut short"),
        (["oci:{in}/none:a", "oci:{out}/x:a"], 10, "none"),
        (["oci:{in}/layout:b", "oci:{out}/x:a"], 10, "b"),
    ],
)  # fmt: skip
def test_refusals_say_why_and_leave_nothing(
    arguments: list[str], code: int, says: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "layer").write_bytes(small_layer())
    (source / "junk").write_bytes(b"no tar" * 1000)
    (source / "cut").write_bytes(gzip.compress(small_layer())[:-100])
    Layout(source / "layout").add("a", small_layer())
    done = convert(*(word.format(**{"in": source, "out": out}) for word in arguments))
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert {name for name in everything_in(out) if "/" not in name} <= {"x"}
    assert not (out / "x").is_file()


def test_layer_of_the_source_that_cannot_be_read(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "in")
    image = layout.add("a", gzip.compress(small_layer()))
    manifest = json.loads((tmp_path / "in" / "index.json").read_text())["manifests"][0]["digest"]
    document = json.loads((tmp_path / "in" / "blobs" / manifest.replace(":", "/")).read_text())
    blob = tmp_path / "in" / "blobs" / document["layers"][0]["digest"].replace(":", "/")
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    done = convert(image, f"oci:{tmp_path / 'out'}:a")
    assert (done.returncode, document["layers"][0]["digest"] in done.stderr) == (12, True)
    blob.unlink()
    done = convert(image, f"oci:{tmp_path / 'out'}:a")
    assert done.returncode in (10, 13)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small-disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_full_disk_says_so_and_leaves_the_disk_as_it_was(tmp_path: Path, small_disk: Path) -> None:
    layer = tar_layer({"big": noise(3_000_000)})
    (tmp_path / "layer.tar").write_bytes(layer)
    image = Layout(tmp_path / "in").add("a", layer)
    done = convert(f"file:{tmp_path / 'layer.tar'}", f"file:{small_disk / 'out.tar.gz'}")
    assert (done.returncode, "No space left on device" in done.stderr) == (13, True), done.stderr
    assert everything_in(small_disk) == set()
    # Scratch files are elsewhere than the target
    done = convert(image, f"oci:{tmp_path / 'out'}:a", env={"TMPDIR": str(small_disk)})
    assert (done.returncode, "TMPDIR chooses another folder" in done.stderr) == (13, True), done.stderr
    assert everything_in(small_disk) == set()
    done = convert(image, f"oci:{small_disk / 'out'}:a")
    assert (done.returncode, "No space left on device" in done.stderr) == (13, True), done.stderr
    assert {path.name for path in small_disk.rglob("*") if path.is_file()} == {"oci-layout"}
    done = convert(image, f"oci-archive:{small_disk / 'out.tar'}:a")
    assert (done.returncode, "No space left on device" in done.stderr) == (13, True), done.stderr
    assert not list(small_disk.glob("*.tar"))
    assert not list(small_disk.glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_a_file_nothing_is_left(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "in.tar").write_bytes(slow_layer())
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.stargz").write_bytes(b"what was there before")
    arguments = ["--level", "12", f"file:{tmp_path / 'in.tar'}", f"file:{out / 'old.stargz'}"]

    def half_written() -> bool:
        return any(path.stat().st_size for path in out.glob(".old.stargz.*"))

    ended, err = stop_when(arguments, number, half_written)
    assert (ended, "Traceback" in err) == (code, False), err
    assert everything_in(out) == {"old.stargz"}
    assert (out / "old.stargz").read_bytes() == b"what was there before"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_an_image_no_tag_and_no_scratch_file_is_left(
    number: int, code: int, tmp_path: Path
) -> None:
    image = Layout(tmp_path / "in").add("a", small_layer(), slow_layer())
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()

    def first_layer_is_there() -> bool:
        return any(len(path.name) == 64 for path in out.glob("blobs/sha256/*"))

    ended, err = stop_when(
        ["--level", "12", image, f"oci:{out}:a"], number, first_layer_is_there, {"TMPDIR": str(scratch)}
    )
    assert (ended, "Traceback" in err) == (code, False), err
    assert everything_in(scratch) == set()
    assert not (out / "index.json").exists()
    assert all(len(path.name) == 64 for path in out.glob("blobs/sha256/*"))
    again = convert("--level", "12", image, f"oci:{out}:a")
    assert (again.returncode, (out / "index.json").exists()) == (0, True), again.stderr


@pytest.mark.registry
def test_interrupted_push_has_no_tag_and_sends_only_the_rest_the_next_time(tmp_path: Path) -> None:
    image = Layout(tmp_path / "in").add("a", small_layer(), slow_layer())
    with running_registry(tmp_path / "registry") as registry:
        target = f"{registry.address}/here:a"
        arguments = ["--plain-http", "--level", "12", image, target]

        def sent(which: int = 0) -> list[str]:
            return [
                line for line in registry.requests()[which:] if '"PUT' in line and "/blobs/uploads/" in line
            ]

        ended, err = stop_when(arguments, signal.SIGINT, lambda: bool(sent()))
        assert (ended, "Traceback" in err) == (130, False), err
        assert not list((tmp_path / "registry" / "storage").rglob("_manifests/tags/a"))
        assert len(sent()) == 1
        before = len(registry.requests())
        done = convert(*arguments)
        assert done.returncode == 0, done.stderr
        # the second layer and the config
        assert len(sent(before)) == 2
        assert list((tmp_path / "registry" / "storage").rglob("_manifests/tags/a"))
        before = len(registry.requests())
        assert convert(*arguments).returncode == 0
        assert sent(before) == []
