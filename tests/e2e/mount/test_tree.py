"""What programs see of a mounted tree: names, attributes, contents, and that nothing can be changed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import shutil
import stat
import struct
from pathlib import Path

import pytest

from tests.e2e.mount.image_on_disk import ImageOnDisk, call, mounted, run

pytestmark = [pytest.mark.root, pytest.mark.trio]

MTIME, MTIME_NSEC = 1_234_567_890, 987_654_321
BIG = random.Random(1).randbytes(700_001)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


def every_kind(folder: Path) -> ImageOnDisk:
    image = ImageOnDisk(folder)
    image.add(b"", mode=0o755, mtime=MTIME)
    image.add(b"bin")
    image.add(b"bin/true", "reg", Path(shutil.which("true") or "/bin/true").read_bytes())
    image.add(b"etc", mode=0o1777, uid=7, gid=8, mtime=MTIME, mtime_nsec=MTIME_NSEC)
    image.add(
        b"etc/text",
        "reg",
        b"hello\n",
        mode=0o4640,
        uid=70_000,
        gid=90_000,
        mtime=MTIME,
        mtime_nsec=MTIME_NSEC,
    )
    image.add(b"etc/empty", "reg", b"", mode=0o600, mtime=-5)
    image.add(b"etc/link", "symlink", link=b"../bin/true", mode=0o777)
    image.add(b"etc/hard", "hardlink", link=b"etc/text")
    image.add(b"dev")
    image.add(b"dev/null", "char", dev_major=1, dev_minor=3, mode=0o666)
    image.add(b"dev/disk", "block", dev_major=259, dev_minor=70_000, mode=0o660)
    image.add(b"dev/pipe", "fifo", mode=0o644)
    image.add(b"big", "reg", BIG)
    image.add(b"n\xff\xfe name", "reg", b"odd")
    image.add(
        b"attributes",
        "reg",
        b"x",
        xattrs={b"user.a": b"1\x002", b"user.empty": b"", b"security.capability": CAPABILITY},
    )
    image.add(b"deep")
    for n in range(3):
        image.add(b"deep/%d" % n)
    return image.write().supply_all()


async def test_every_kind_of_inode_looks_as_in_the_image(tmp_path: Path) -> None:
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root", suid=True, dev=True) as m:
        at = m.directory

        def look() -> None:
            root = at.stat()
            assert (root.st_ino, stat.S_IMODE(root.st_mode), root.st_mtime, root.st_nlink) == (
                1,
                0o755,
                MTIME,
                6,
            )
            etc = (at / "etc").stat()
            assert (stat.S_IMODE(etc.st_mode), etc.st_uid, etc.st_gid) == (0o1777, 7, 8)
            assert etc.st_mtime_ns == MTIME * 10**9 + MTIME_NSEC
            text = (at / "etc/text").stat()
            assert stat.S_ISREG(text.st_mode)
            assert stat.S_IMODE(text.st_mode) == 0o4640
            assert (text.st_uid, text.st_gid, text.st_size, text.st_nlink) == (70_000, 90_000, 6, 2)
            assert text.st_mtime_ns == MTIME * 10**9 + MTIME_NSEC
            assert (at / "etc/hard").stat().st_ino == text.st_ino
            assert (at / "etc/empty").read_bytes() == b""
            assert (at / "etc/empty").stat().st_mtime == -5
            link = (at / "etc/link").lstat()
            assert stat.S_ISLNK(link.st_mode)
            assert link.st_size == len("../bin/true")
            assert os.readlink(at / "etc/link") == "../bin/true"
            null, disk = (at / "dev/null").lstat(), (at / "dev/disk").lstat()
            assert stat.S_ISCHR(null.st_mode)
            assert null.st_rdev == os.makedev(1, 3)
            assert stat.S_ISBLK(disk.st_mode)
            assert disk.st_rdev == os.makedev(259, 70_000)
            assert stat.S_ISFIFO((at / "dev/pipe").lstat().st_mode)
            assert (at / "big").read_bytes() == BIG
            assert (at / "big").stat().st_blocks == -(-len(BIG) // 512)
            assert Path(os.fsdecode(os.fsencode(at) + b"/n\xff\xfe name")).read_bytes() == b"odd"
            assert (at / "deep").stat().st_nlink == 5
            assert (at / "dev/null").read_bytes() == b""  # --dev: it is the device
            with pytest.raises(FileNotFoundError):
                (at / "etc/absent").stat()

        await call(look)


async def test_extended_attributes(tmp_path: Path) -> None:
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:
        file = m.directory / "attributes"

        def look() -> None:
            assert sorted(os.listxattr(file)) == ["security.capability", "user.a", "user.empty"]
            assert os.getxattr(file, "user.a") == b"1\x002"
            assert os.getxattr(file, "user.empty") == b""
            assert os.getxattr(file, "security.capability") == CAPABILITY
            assert os.listxattr(m.directory / "big") == []
            with pytest.raises(OSError) as caught:
                os.getxattr(file, "user.absent")
            assert caught.value.errno == errno.ENODATA
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.getxattr(os.fsencode(file), b"user.a", ctypes.create_string_buffer(2), 2) == -1
            assert ctypes.get_errno() == errno.ERANGE
            with pytest.raises(OSError) as caught:
                os.setxattr(file, "user.b", b"1")
            assert caught.value.errno == errno.EROFS

        await call(look)


async def test_file_system_size_is_the_images_own(tmp_path: Path) -> None:
    image = every_kind(tmp_path / "image")
    async with mounted(image, tmp_path / "root") as m:
        answer = await call(os.statvfs, m.directory)
    total = sum(len(content) for content in image.contents.values())
    assert abs(answer.f_blocks * answer.f_frsize - total) < 4096
    assert (answer.f_bsize, answer.f_bavail, answer.f_ffree, answer.f_namemax) == (4096, 0, 0, 255)
    assert answer.f_files >= 18
    assert (
        answer.f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV)
        == os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
    )


async def test_nothing_can_be_changed(tmp_path: Path) -> None:
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:
        at = m.directory
        attempts = [
            lambda: os.open(at / "big", os.O_WRONLY),
            lambda: os.open(at / "big", os.O_RDWR),
            lambda: os.open(at / "big", os.O_RDONLY | os.O_TRUNC),
            lambda: os.open(at / "new", os.O_WRONLY | os.O_CREAT),
            lambda: os.unlink(at / "big"),
            lambda: os.mkdir(at / "new"),
            lambda: os.rename(at / "big", at / "small"),
            lambda: os.chmod(at / "big", 0o777),
            lambda: os.utime(at / "big"),
            lambda: os.symlink("a", at / "b"),
            lambda: os.truncate(at / "big", 0),
        ]

        def attempt() -> None:
            for change in attempts:
                with pytest.raises(OSError) as caught:
                    change()
                assert caught.value.errno == errno.EROFS

        await call(attempt)
        assert await call((at / "big").read_bytes) == BIG


async def test_permissions_bind_other_users(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:
        done = await run("cat", m.directory / "etc/text", user=65534, group=65534, extra_groups=[])
        assert done.returncode != 0
        assert b"ermission denied" in done.stderr
        done = await run("cat", m.directory / "big", user=65534, group=65534, extra_groups=[])
        assert done.stdout == BIG


async def test_programs_run_from_the_mount(tmp_path: Path) -> None:
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:
        assert (await run(m.directory / "bin/true")).returncode == 0
        assert (await run(m.directory / "etc/link")).returncode == 0


async def test_shared_map_locks_and_watches(tmp_path: Path) -> None:
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:

        def use() -> None:
            with (m.directory / "big").open("rb") as file:
                with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
                    assert view[:] == BIG
                fcntl.flock(file, fcntl.LOCK_EX)
                fcntl.flock(file, fcntl.LOCK_UN)
                fcntl.lockf(file, fcntl.LOCK_SH)
            libc = ctypes.CDLL(None, use_errno=True)
            watch = libc.inotify_init1(0)
            assert watch >= 0
            assert libc.inotify_add_watch(watch, os.fsencode(m.directory / "etc"), 0x20) > 0  # IN_OPEN
            os.close(watch)

        await call(use)


async def test_direct_and_unaligned_reads(tmp_path: Path) -> None:
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:
        seed = random.randrange(1 << 32)
        print(f"seed {seed}")
        choose = random.Random(seed)

        def read() -> None:
            fd = os.open(m.directory / "big", os.O_RDONLY)
            for _ in range(200):
                offset, size = choose.randrange(len(BIG) + 100), choose.randrange(1, 300_000)
                assert os.pread(fd, size, offset) == BIG[offset : offset + size]
            os.close(fd)
            fd = os.open(m.directory / "big", os.O_RDONLY | os.O_DIRECT)
            buffer = mmap.mmap(-1, 1 << 20)
            assert os.preadv(fd, [buffer], 4096) == len(BIG) - 4096
            assert buffer[: len(BIG) - 4096] == BIG[4096:]
            os.close(fd)

        await call(read)


async def test_large_directory_is_listed_completely_by_many(tmp_path: Path) -> None:
    image = ImageOnDisk(tmp_path / "image")
    image.add(b"many")
    names = [b"%05d-%s" % (n, b"x" * (n % 40)) for n in range(20_000)]
    for name in names:
        image.add(b"many/" + name, "reg", b"", mode=0o644)
    image.write()
    async with mounted(image, tmp_path / "root") as m:
        command = ("find", m.directory / "many", "-type", "f", "-printf", r"%f\n")
        results: list[bytes] = []

        async def list_it() -> None:
            results.append((await run(*command)).stdout)

        await together([list_it] * 3)
        for output in results:
            assert sorted(output.splitlines()) == names


async def test_directory_position_can_be_returned_to(tmp_path: Path) -> None:
    image = ImageOnDisk(tmp_path / "image")
    for n in range(500):
        image.add(b"%03d" % n, "reg", b"", mode=0o644)
    image.write()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long

    async with mounted(image, tmp_path / "root") as m:

        def read() -> None:
            handle = ctypes.c_void_p(libc.opendir(os.fsencode(m.directory)))

            def name() -> bytes:
                entry = libc.readdir(handle)
                return ctypes.string_at(entry + 19) if entry else b""  # struct dirent64: d_name at 19

            seen, places = [], []
            while True:
                places.append(libc.telldir(handle))
                found = name()
                if not found:
                    break
                seen.append(found)
            assert sorted(seen) == sorted([b".", b"..", *(b"%03d" % n for n in range(500))])
            for index in (0, 1, 2, 77, 499):
                libc.seekdir(handle, ctypes.c_long(places[index]))
                assert name() == seen[index]
            libc.closedir(handle)

        await call(read)


async def test_absent_names_are_cached(tmp_path: Path) -> None:
    """Programs probe for files that are not there all the time; the kernel must not ask us twice."""
    async with mounted(every_kind(tmp_path / "image"), tmp_path / "root") as m:

        def probe(times: int) -> None:
            for _ in range(times):
                assert not os.path.exists(m.directory / "etc/no-such-file")

        await call(probe, 1)
        await m.session.ping()
        before = m.session.stats.lookups
        await call(probe, 2000)
        await m.session.ping()
        assert m.session.stats.lookups == before


async def together(functions: list[object]) -> None:
    import trio

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(function)  # type: ignore[arg-type]
