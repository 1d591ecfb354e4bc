from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.model import Chunk, ChunkKind, Entry, Piece, Toc
from p2pgz.core.ranges import MemberPlan, RangePlan, WantedPiece, plan_ranges

ALL = {"gap_bytes": 1 << 20, "max_bytes": 1 << 30}


def table_of(*chunks: Chunk) -> SegmentTable:
    entries = [Entry(b"%d" % n, "reg", size=c.size, chunks=(c,)) for n, c in enumerate(chunks)]
    return SegmentTable(SegmentLayout.build(Toc(Digest.of(b""), entries), compression="gzip").to_bytes())


def chunk(offset: int, end: int, inner: int = 0, size: int = 10, **more: object) -> Chunk:
    return Chunk(bytes(32), 0, size, offset, end, inner, **more)


def test_nothing_wanted() -> None:
    table = table_of(chunk(100, 200), chunk(200, 300, kind=ChunkKind.ZEROS))
    assert plan_ranges(table, [], **ALL) == []
    assert plan_ranges(table, [1], **ALL) == []


def test_neighbours_share_a_request() -> None:
    table = table_of(chunk(300, 400), chunk(100, 200), chunk(200, 300))
    assert plan_ranges(table, [0, 1, 2, 1], gap_bytes=0, max_bytes=300) == [
        RangePlan(
            100,
            400,
            [
                MemberPlan(100, 200, [WantedPiece(1, 0, 0, 10)]),
                MemberPlan(200, 300, [WantedPiece(2, 0, 0, 10)]),
                MemberPlan(300, 400, [WantedPiece(0, 0, 0, 10)]),
            ],
        )
    ]


def bounds(plans: list[RangePlan]) -> list[tuple[int, int]]:
    return [(plan.start, plan.end) for plan in plans]


def test_gap_and_size_limits() -> None:
    table = table_of(chunk(100, 200), chunk(250, 300), chunk(300, 900))
    assert bounds(plan_ranges(table, [0, 1], gap_bytes=50, max_bytes=200)) == [(100, 300)]
    assert bounds(plan_ranges(table, [0, 1], gap_bytes=49, max_bytes=200)) == [(100, 200), (250, 300)]
    assert bounds(plan_ranges(table, [0, 1], gap_bytes=50, max_bytes=199)) == [(100, 200), (250, 300)]
    assert bounds(plan_ranges(table, [2], gap_bytes=0, max_bytes=1)) == [(300, 900)]


def test_chunks_of_one_member_come_in_one_pass() -> None:
    table = table_of(chunk(100, 200, 20), chunk(100, 200, 0, 20), chunk(100, 200, 20))
    (plan,) = plan_ranges(table, range(3), gap_bytes=0, max_bytes=1)
    (member,) = plan.members
    assert [(w.chunk_no, w.inner, w.size) for w in member.wanted] == [(1, 0, 20), (0, 20, 10), (2, 20, 10)]


def test_all_pieces_of_a_chunk_come_in_one_request() -> None:
    whole = chunk(100, 200, size=30, more=(Piece(200, 5000, 0, 10), Piece(5000, 6000, 0, 10)))
    table = table_of(whole, chunk(6000, 6100))
    first, second = plan_ranges(table, [0, 1], gap_bytes=0, max_bytes=1000)
    assert bounds([first, second]) == [(100, 6000), (6000, 6100)]
    assert [member.wanted for member in first.members] == [[WantedPiece(0, n, 0, 10)] for n in range(3)]


def passes(plans: list[RangePlan]) -> list[list[int]]:
    return [sorted(w.chunk_no for member in plan.members for w in member.wanted) for plan in plans]


def test_overlapping_payloads_come_in_passes_of_their_own() -> None:
    table = table_of(*(chunk(100, 200, inner, 10) for inner in (0, 5, 10, 15, 0)), chunk(200, 300))
    plans = plan_ranges(table, range(6), **ALL)
    assert passes(plans) == [[0, 2, 4, 5], [1, 3]] or sorted(passes(plans)) == [[0, 2, 4], [1, 3], [5]]
    for plan in plans:
        for member in plan.members:
            ends = 0
            for w in member.wanted:
                assert w.inner >= ends or w.inner + w.size == ends
                ends = w.inner + w.size


def test_whole_file_chunk_that_shares_a_member() -> None:
    whole = chunk(100, 200, size=20, more=(Piece(200, 300, 0, 10),))
    table = table_of(whole, chunk(200, 300, 5, 10), chunk(300, 400))
    found = plan_ranges(table, range(3), **ALL)
    assert sorted(n for plan in passes(found) for n in plan) == [0, 0, 1, 2]
    assert all(0 not in plan or 1 not in plan for plan in passes(found))


def test_many_overlaps_take_no_quadratic_time() -> None:
    table = table_of(*(chunk(100, 200, inner, 1 << 20) for inner in range(5000)))
    assert len(plan_ranges(table, range(5000), **ALL)) == 5000


def test_passes_are_shared_between_members() -> None:
    table = table_of(*(chunk(offset, offset + 100, inner, 10) for offset in (100, 200) for inner in (0, 5)))
    assert passes(plan_ranges(table, range(4), **ALL)) == [[0, 2], [1, 3]]
