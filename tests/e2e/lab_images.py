"""Two real images for the end-to-end tests, as an OCI layout made by other people's tools.

- `small`: busybox and one of everything a layer can hold, in four layers, written with tarfile and umoci; a second to build.
- `redis`: Debian, from debootstrap and the packages of this machine's own Debian release, in three layers; a minute.

The entry point of both is `/app/run`: it prints READY when its program has done its work, and needs nothing writable but
`/tmp`. `image_layout()` builds what is missing into the cache folder and keeps it there; nothing outside that folder is
written. `python tests/e2e/lab_images.py FOLDER` does the same by hand. Root, and the Debian packages of `.ci/setup test`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

SMALL, REDIS = "small", "redis"
READY = "READY"
MEMORY_FOR_TMPFS_BYTES = (
    4 << 30
)  # the Debian image is built in memory where there is this much: half the time
SMALL_TIMESTAMP = 1_700_000_000  # of every entry of `small` that does not test timestamps

SMALL_RUN = """\
#!/bin/sh
[ "$(cat /features/hard-a)" = "shared content" ] && [ ! -e /features/gone ] && [ "$(ls /features/opaque)" = new ] &&
[ "$(md5sum </features/large)" = "$(cat /features/large.md5)" ] && echo READY
"""

REDIS_RUN = """\
#!/bin/bash
redis-server --port 0 --unixsocket /tmp/redis.sock --save '' --dir /tmp --loglevel warning &
ask() { redis-cli -s /tmp/redis.sock "$@" 2>/dev/null; }
for _ in $(seq 500); do [ "$(ask set key value)" = OK ] && break; sleep .02; done
[ "$(ask get key)" = value ] && echo READY
ask shutdown nosave
wait
"""


def run(*command: str | Path, **options: object) -> str:
    """Runs a tool to its end; its output is in the exception when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(  # type: ignore[call-overload]
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: status {done.returncode}\n{done.stdout[-3000:]}")
    return str(done.stdout)


def image_layout(cache: Path, *names: str) -> Path:
    """The OCI layout with the named images (default: both), built now unless this very version of them is there."""
    version = hashlib.sha256(Path(__file__).read_bytes() + debian_suite().encode()).hexdigest()[:12]
    layout = cache / f"images-{version}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once build once
        for old in cache.glob("images-*"):
            if old != layout:
                shutil.rmtree(old)
        if not layout.exists():
            run("umoci", "init", "--layout", layout)
        there = run("umoci", "list", "--layout", layout).split()
        for name in names or (SMALL, REDIS):
            if name not in there:
                # a mount namespace of its own: no mount of a failed build outlives it
                builder = [sys.executable, __file__, "--build", name, layout]
                run("unshare", "--mount", "--propagation", "private", *map(str, builder))
    return layout


def push(layout: Path, name: str, reference: str) -> None:
    """Copies an image to a registry that speaks plain HTTP."""
    policy = ["--insecure-policy", "--dest-tls-verify=false"]
    run("skopeo", "copy", "-q", *policy, f"oci:{layout}:{name}", f"docker://{reference}")


def unpack(layout: Path, name: str, folder: Path) -> Path:
    """The root file system as umoci sees it: the foreign oracle for what a mount must show."""
    run("umoci", "unpack", "--image", f"{layout}:{name}", folder)
    return folder / "rootfs"


def run_image(root: Path, *, within_seconds: float = 60) -> str:
    """Runs `/app/run` of a read-only root file system in a chroot, with /proc and an empty /tmp; returns what it printed."""
    script = 'mount -t tmpfs tmpfs "$0/tmp" && mount -t proc proc "$0/proc" && exec chroot "$0" /app/run'
    return run(
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        script,
        root,
        timeout=within_seconds,
    )


def debian_suite() -> str:
    release = Path("/etc/os-release").read_text()
    found = [
        line.partition("=")[2].strip('"')
        for line in release.splitlines()
        if line.startswith("VERSION_CODENAME=")
    ]
    return found[0] if found else "stable"


def debian_mirror(suite: str) -> str:
    """The mirror that this machine's apt uses for its own release; empty for debootstrap's default."""
    listing = run("apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)")
    return next((line.split()[0] for line in listing.splitlines() if line.split()[1:] == [suite]), "")


@contextlib.contextmanager
def tagged(layout: Path, name: str) -> Iterator[str]:
    """Builds under a tag of its own, so that an image that has its name is complete."""
    work = f"{layout}:unfinished-{name}"
    with contextlib.suppress(RuntimeError):  # of a build that failed
        run("umoci", "rm", "--image", work)
    run("umoci", "new", "--image", work)
    yield work
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    run("umoci", "config", "--image", work, "--config.entrypoint", "/app/run", "--config.env", path)
    run("umoci", "tag", "--image", work, name)
    run("umoci", "rm", "--image", work)
    run("umoci", "gc", "--layout", layout)


class LayerTar:
    """A layer written entry by entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by add_to

    def add(
        self, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **more: object
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.mode, entry.mtime = kind, len(data), mode, SMALL_TIMESTAMP
        for field, value in more.items():
            setattr(entry, field, value)
        self.tar.addfile(entry, io.BytesIO(data))

    def folder(self, name: str, **more: object) -> None:
        self.add(name, kind=tarfile.DIRTYPE, **{"mode": 0o755, **more})  # type: ignore[arg-type]

    def add_to(self, image: str) -> None:
        self.tar.close()
        run("umoci", "raw", "add-layer", "--image", image, self.path)
        self.path.unlink()


def build_small(layout: Path, work: Path) -> None:
    seeded = random.Random(20)
    large = b"".join(
        seeded.randbytes(700) + bytes(324) for _ in range(5 << 10)
    )  # 5 MiB: several chunks, compressible
    busybox = next(path for path in map(Path, ("/bin/busybox", "/usr/bin/busybox")) if path.exists())
    with tagged(layout, SMALL) as image:
        layer = LayerTar(work / "layer.tar")
        for name in ("app", "bin", "dev", "etc", "features", "proc", "tmp"):
            layer.folder(name, mode=0o1777 if name == "tmp" else 0o755)
        layer.add("bin/busybox", busybox.read_bytes(), mode=0o755)
        for applet in run(busybox, "--list").split():
            if applet != "busybox":
                layer.add(f"bin/{applet}", kind=tarfile.SYMTYPE, linkname="busybox", mode=0o777)
        layer.add("etc/hostname", b"small\n")
        layer.add_to(image)

        layer = LayerTar(work / "layer.tar")
        layer.folder("features", uid=1, gid=2, mtime=SMALL_TIMESTAMP + 1)
        layer.add("features/large", large)
        layer.add("features/large.md5", hashlib.md5(large).hexdigest().encode() + b"  -\n")
        layer.add("features/hard-a", b"shared content\n", uid=1000, gid=1000)
        layer.add("features/hard-b", kind=tarfile.LNKTYPE, linkname="features/hard-a")
        layer.add("features/link", kind=tarfile.SYMTYPE, linkname="hard-a", mode=0o777)
        layer.add("features/dangling", kind=tarfile.SYMTYPE, linkname="/no/where", mode=0o777)
        layer.add("features/empty", mode=0)
        layer.add("features/setuid", b"#!/bin/sh\n", mode=0o4755)
        layer.add("features/fifo", kind=tarfile.FIFOTYPE)
        layer.add("features/null", kind=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
        layer.add("features/xattr", b"x", pax_headers={"SCHILY.xattr.user.p2pgz": "a value"})
        layer.add("features/old", b"before 1970\n", mtime=-86_400)
        layer.add("features/naïve 日本語\n", b"a name\n")
        layer.add(f"features/{'n' * 255}", b"a long name\n")
        layer.add("features/gone", b"to be deleted\n")
        layer.folder("features/gone-folder")
        layer.add("features/gone-folder/file", b"to be deleted\n")
        layer.folder("features/opaque")
        layer.add("features/opaque/old", b"to be hidden\n")
        layer.folder("features/many")
        for number in range(500):
            layer.add(f"features/many/{number:03}", f"{number}\n".encode() * (number % 7))
        layer.add_to(image)

        layer = LayerTar(work / "layer.tar")
        layer.add("features/.wh.gone")
        layer.add("features/.wh.gone-folder")
        layer.folder("features/opaque", mode=0o700)
        layer.add("features/opaque/.wh..wh..opq")
        layer.add("features/opaque/new", b"new\n")
        layer.add_to(image)

        layer = LayerTar(work / "layer.tar")
        layer.folder("app")
        layer.add("app/run", SMALL_RUN.encode(), mode=0o755)
        layer.add("features/many/000", b"replaced\n")
        layer.add_to(image)


def build_redis(layout: Path, work: Path) -> None:
    """debootstrap's minimal Debian; redis-server on top, its packages fetched from outside by this machine's apt; then a
    layer that deletes documentation (whiteouts) and adds the entry point."""
    suite = debian_suite()
    mirror = debian_mirror(suite)
    base = work / "base"
    run("debootstrap", "--variant=minbase", suite, base, *([mirror] if mirror else []))
    for archive in (base / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    packages = download(["redis-server"], base, work / "apt")
    with tagged(layout, REDIS) as image:
        tar = work / "base.tar"
        run("tar", "-C", base, "--xattrs", "--numeric-owner", "-cf", tar, ".")
        run("umoci", "raw", "add-layer", "--image", image, tar)
        tar.unlink()
        shutil.rmtree(base)
        bundle = work / "bundle"
        root = unpack_wip(image, bundle)

        (root / "packages").mkdir()
        for package in packages:
            shutil.copy(package, root / "packages")
        (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # start no service in the chroot
        (root / "usr/sbin/policy-rc.d").chmod(0o755)
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
        }
        install = (
            "mount -t proc proc /proc; dpkg --force-unsafe-io -i /packages/*.deb; s=$?; umount /proc; exit $s"
        )
        run("chroot", root, "sh", "-c", install, env=environment)
        shutil.rmtree(root / "packages")
        (root / "usr/sbin/policy-rc.d").unlink()
        repack(image, bundle)

        shutil.rmtree(root / "usr/share/doc")
        (root / "app").mkdir()
        (root / "app/run").write_text(REDIS_RUN)
        (root / "app/run").chmod(0o755)
        repack(image, bundle)


def unpack_wip(image: str, bundle: Path) -> Path:
    run("umoci", "unpack", "--image", image, bundle)
    return bundle / "rootfs"


def repack(image: str, bundle: Path) -> None:
    run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)


def download(names: list[str], root: Path, folder: Path) -> list[Path]:
    """The packages, with what they depend on and `root` lacks. apt's lists and cache are kept in `folder`, not in /var."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    options = {
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        "Dir::State": folder / "state",
        "Dir::State::status": root / "var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
    }
    apt = ["apt-get", "-qy", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    run(*apt, "update")
    run(*apt, "--download-only", "install", *names)
    return sorted((folder / "cache/archives").glob("*.deb"))


def available_memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def build(name: str, layout: Path) -> None:
    """In a mount namespace of its own (see image_layout)."""
    os.umask(0o022)
    with tempfile.TemporaryDirectory(
        prefix="building-", dir=layout.parent, ignore_cleanup_errors=True
    ) as folder:
        in_memory = available_memory_bytes() >= MEMORY_FOR_TMPFS_BYTES
        if in_memory:
            run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
        try:
            {SMALL: build_small, REDIS: build_redis}[name](layout, Path(folder))
        finally:
            if in_memory:
                run("umount", "-l", folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(sys.argv[2], Path(sys.argv[3]))
    elif len(sys.argv) == 2:
        print(image_layout(Path(sys.argv[1]).absolute()))
    else:
        sys.exit("usage: lab_images.py FOLDER")
