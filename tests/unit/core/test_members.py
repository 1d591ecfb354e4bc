import gzip
import tracemalloc
import zlib

import pytest
import zstandard

from p2pgz.core.footer import make_skippable_frame
from p2pgz.core.members import STEP_BYTES, MemberInflater
from p2pgz.errors import ChunkCorrupt

MIB = 1 << 20


def pack(compression: str, data: bytes) -> bytes:
    return gzip.compress(data) if compression == "gzip" else zstandard.ZstdCompressor().compress(data)


def run(
    compression: str, data: bytes, wanted: list[tuple[int, int]], *, step: int = 1 << 30
) -> dict[int, bytes]:
    inflater = MemberInflater(compression, wanted)
    found: dict[int, bytes] = {}
    for at in range(0, len(data), step):
        for index, payload in inflater.feed(data[at : at + step]):
            assert index not in found
            found[index] = payload
    inflater.close()
    return found


both = pytest.mark.parametrize("compression", ["gzip", "zstd"])
CONTENT = b"".join(b"%d " % n for n in range(200_000))


@both
@pytest.mark.parametrize("step", [1 << 30, 4099, 1])
def test_payloads_in_any_order(compression: str, step: int) -> None:
    content = CONTENT if step > 1 else CONTENT[:40_000]
    wanted = [(30_000, 100), (0, 7), (7, 10_000), (10_010, 1), (30_000, 100), (len(content) - 3, 3)]
    found = run(compression, pack(compression, content), wanted, step=step)
    assert found == {k: content[inner : inner + size] for k, (inner, size) in enumerate(wanted)}


@both
def test_each_payload_comes_as_soon_as_its_bytes_are_there(compression: str) -> None:
    data = pack(compression, CONTENT)
    inflater = MemberInflater(compression, [(0, 1000), (MIB, 1000)])
    assert inflater.feed(b"") == []
    early = inflater.feed(data[: len(data) // 2])
    assert [index for index, _ in early] == [0]
    assert not inflater.finished
    late = inflater.feed(data[len(data) // 2 :])
    assert late == [(1, CONTENT[MIB : MIB + 1000])]
    assert inflater.finished
    assert inflater.feed(b"whatever follows") == []


@both
def test_nothing_wanted_is_finished(compression: str) -> None:
    inflater = MemberInflater(compression, [])
    assert inflater.finished
    assert inflater.feed(b"junk") == []
    inflater.close()


@both
def test_payload_may_go_on_in_the_next_member(compression: str) -> None:
    data = pack(compression, b"abc") + pack(compression, b"") + pack(compression, b"defghi")
    for step in (1, 1000):
        assert run(compression, data, [(1, 4), (5, 2)], step=step) == {0: b"bcde", 1: b"fg"}


@both
def test_what_follows_the_payload_is_not_looked_at(compression: str) -> None:
    assert run(compression, pack(compression, b"abc") + b"\xff junk", [(0, 3)]) == {0: b"abc"}


def test_skippable_zstd_frames() -> None:
    skip = make_skippable_frame(b"x" * 100)
    data = skip + pack("zstd", b"abc") + skip + pack("zstd", b"def")
    for step in (1, 1000):
        assert run("zstd", data, [(0, 6)], step=step) == {0: b"abcdef"}


def test_gzip_header_with_name_and_comment() -> None:
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = body.compress(b"abc") + body.flush()
    data = (
        b"\x1f\x8b\x08\x18\0\0\0\0\0\xffname\0comment\0"
        + deflated
        + zlib.crc32(b"abc").to_bytes(4, "little")
        + b"\3\0\0\0"
    )
    for step in (1, 1000):
        assert run("gzip", data + gzip.compress(b"d"), [(0, 4)], step=step) == {0: b"abcd"}


@both
def test_cut_short(compression: str) -> None:
    data = pack(compression, CONTENT)
    inflater = MemberInflater(compression, [(0, len(CONTENT))])
    inflater.feed(data[:-100])
    with pytest.raises(ChunkCorrupt, match="before 1 of its chunks"):
        inflater.close()
    with pytest.raises(ChunkCorrupt, match="after 3 bytes"):
        run(compression, pack(compression, b"abc"), [(0, 4)])


@both
def test_junk(compression: str) -> None:
    with pytest.raises(ChunkCorrupt, match="cannot"):
        run(compression, b"this is neither gzip nor zstd, whatever it is", [(0, 4)])
    with pytest.raises(ChunkCorrupt, match="cannot"):
        run(compression, pack(compression, b"abc") + b"\0" * 100, [(0, 4)])


@both
def test_bomb_behind_the_payload_does_not_go_off(compression: str) -> None:
    data = pack(compression, CONTENT + bytes(200 * MIB))
    tracemalloc.start()
    try:
        found = run(compression, data, [(100, 1000)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == {0: CONTENT[100:1100]}
    assert peak < 4 * MIB


@both
def test_bytes_between_payloads_are_not_kept(compression: str) -> None:
    data = pack(compression, bytes(64 * MIB) + b"end")
    tracemalloc.start()
    try:
        found = run(compression, data, [(0, 10), (64 * MIB, 3)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == {0: bytes(10), 1: b"end"}
    assert peak < 8 * STEP_BYTES


def test_frame_that_lies_about_its_size() -> None:
    frame = bytearray(pack("zstd", b"abc" * 100))
    parameters = zstandard.get_frame_parameters(bytes(frame))
    assert parameters.content_size == 300
    # single segment, 8 bytes of content size: 2 GiB
    lying = bytes(frame[:4]) + bytes([frame[4] | 0xC0]) + (2 << 30).to_bytes(8, "little") + bytes(frame[7:])
    with pytest.raises(ChunkCorrupt, match="too much memory"):
        run("zstd", lying, [(0, 300)])


@pytest.mark.parametrize("wanted", [[(0, 0)], [(-1, 5)], [(0, -3)]])
def test_impossible_wishes(wanted: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="cannot be wanted"):
        MemberInflater("gzip", wanted)


@pytest.mark.parametrize("wanted", [[(0, 5), (4, 5)], [(0, 5), (0, 6)], [(3, 1), (0, 9)]])
def test_overlapping_wishes(wanted: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        MemberInflater("gzip", wanted)
