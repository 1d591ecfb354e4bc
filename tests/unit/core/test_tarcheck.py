"""A TOC that tells of its tar, and every way in which one may not."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable

import msgspec
import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.core.ownindex import PlainIndexer
from p2pgz.core.tarcheck import TarCheck
from p2pgz.errors import ImageInvalid


def tar_of(*members: tuple[str, bytes, dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


CONTENT = bytes(range(256)) * 1000
TAR = tar_of(
    ("dir", b"", {"type": tarfile.DIRTYPE, "mode": 0o755}),
    ("dir/file", CONTENT, {"mode": 0o4755, "uid": 7, "pax_headers": {"SCHILY.xattr.user.x": "y"}}),
    ("dir/empty", b"", {}),
    ("link", b"", {"type": tarfile.SYMTYPE, "linkname": "dir/file"}),
    ("hard", b"", {"type": tarfile.LNKTYPE, "linkname": "dir/file"}),
    ("null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    (".no.prefetch.landmark", b"\x0f", {}),
    ("stargz.index.json", b"{}", {}),
)


def true_toc(tar: bytes = TAR, chunk_bytes: int = 100_000) -> Toc:
    """Cut otherwise than the tar is fed, and without what writers add."""
    indexer = PlainIndexer(chunk_bytes=chunk_bytes)
    indexer.feed(tar)
    toc = indexer.finish().toc
    entries = [one for one in toc.entries if one.name not in (b".no.prefetch.landmark", b"stargz.index.json")]
    return msgspec.structs.replace(toc, entries=entries)


def check(toc: Toc, tar: bytes = TAR, step: int = 7777) -> Digest:
    checking = TarCheck(toc)
    for start in range(0, len(tar), step):
        checking.feed(tar[start : start + step])
    return checking.finish()


def changed(name: bytes, /, **fields: object) -> Toc:
    toc = true_toc()
    entries = [msgspec.structs.replace(one, **fields) if one.name == name else one for one in toc.entries]
    return msgspec.structs.replace(toc, entries=entries)


@pytest.mark.parametrize("step", [1 << 20, 7777, 511])
def test_the_diff_id_of_a_tar_that_its_toc_tells_of(step: int) -> None:
    assert check(true_toc(), step=step) == Digest(hashlib.sha256(TAR).digest())


def test_times_may_be_rounded_and_attributes_of_hard_links_missing() -> None:
    assert check(changed(b"dir/file", mtime=1_700_000_001))
    assert check(changed(b"hard", mode=0, uid=5))


def chunks_of(change: Callable[[list[Chunk]], list[Chunk]]) -> Toc:
    chunks = next(one.chunks for one in true_toc().entries if one.name == b"dir/file")
    return changed(b"dir/file", chunks=tuple(change(list(chunks))))


@pytest.mark.parametrize(
    ("toc", "said"),
    [
        (changed(b"dir/file", mode=0o755), "another one"),
        (changed(b"dir/file", uid=0), "another one"),
        (changed(b"dir/file", xattrs={}), "another one"),
        (changed(b"dir/file", size=1), "another one"),
        (changed(b"dir/file", name=b"dir/other"), "another one"),
        (changed(b"dir/file", mtime=0), "another one"),
        (changed(b"dir", kind="reg"), "another one"),
        (changed(b"link", link=b"elsewhere"), "another one"),
        (changed(b"hard", link=b"dir/empty"), "another one"),
        (changed(b"null", dev_minor=5), "another one"),
        (
            chunks_of(lambda chunks: [*chunks[:-1], msgspec.structs.replace(chunks[-1], digest=bytes(32))]),
            "other content",
        ),
        (chunks_of(lambda chunks: chunks[:-1]), "more content in the tar"),
        (chunks_of(lambda chunks: [*chunks, chunks[-1]]), "more content in the TOC"),
    ],
)
def test_a_toc_that_tells_something_else(toc: Toc, said: str) -> None:
    with pytest.raises(ImageInvalid, match=said):
        check(toc)


def test_entries_too_many_and_too_few() -> None:
    toc = true_toc()
    with pytest.raises(ImageInvalid, match="in the tar alone"):
        check(msgspec.structs.replace(toc, entries=toc.entries[:-1]))
    with pytest.raises(ImageInvalid, match="in the TOC alone"):
        check(msgspec.structs.replace(toc, entries=[*toc.entries, Entry(b"more", "dir")]))


def test_sparse_files_have_the_zeros_of_their_holes() -> None:
    data = b"x" * 512
    sparse = tar_of(
        (
            "sparse",
            data,
            {
                "pax_headers": {
                    "GNU.sparse.size": "3000000",
                    "GNU.sparse.map": "1000000,512",
                    "GNU.sparse.name": "sparse",
                }
            },
        )
    )
    assert check(true_toc(sparse), sparse)


def test_a_name_that_no_tree_has_is_passed_over_and_a_broken_entry_refused() -> None:
    tar = tar_of(("/", b"", {}), ("file", b"data", {}))
    assert check(true_toc(tar), tar)
    broken = tar_of(("hard", b"", {"type": tarfile.LNKTYPE, "linkname": "hard"}))
    with pytest.raises(ImageInvalid, match="hard"):
        check(Toc(Digest.of(b""), []), broken)


def test_a_tar_that_is_cut_off() -> None:
    with pytest.raises(ImageInvalid):
        check(true_toc(), TAR[: len(TAR) // 2])
