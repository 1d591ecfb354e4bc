"""The index: which chunks and files the pool holds, in SQLite.

`pool.Pool` calls it; `catalog` keeps images, tags, pins and mounts in the same database. Reads are
synchronous on the event loop (3 us each); writes are closures that run one at a time in a thread, each in one
transaction. A commit may be lost with the power (synchronous=NORMAL) but not half of it, until the committer
calls `settle` within a second or two; what must not come back, removals, is written with FULL.

The index only remembers: no byte is ever believed because of it alone, except after a clean stop. So a
damaged database is moved aside and a new one begun. One of a newer p2pgz is refused and left as it is.
Design, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import apsw
import structlog
import trio

from p2pgz.errors import PoolFull, StateError
from p2pgz.pool.disk import Disk, Reserve, means_full

log = structlog.get_logger(component="pool")
T = TypeVar("T")

SCHEMA_VERSION: Final = 2
# SQLite refuses more parameters than 32766 in a statement
_KEYS_PER_QUERY: Final = 8192
_SCHEMA: Final = """
CREATE TABLE facts(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE segments(
    row INTEGER PRIMARY KEY, domain TEXT NOT NULL, id BLOB NOT NULL,
    segment_bytes INTEGER NOT NULL, chunk_count INTEGER NOT NULL, compression TEXT NOT NULL,
    blob_digest BLOB, blob_bytes INTEGER NOT NULL, source TEXT NOT NULL,
    table_digest BLOB NOT NULL,                     -- sha256 of the segment table
    file_starts BLOB NOT NULL,                      -- u32 each: the first chunk of every file
    present BLOB NOT NULL,                          -- bitmap: what is durable here
    verified BLOB,                                  -- bitmap at a clean stop, else NULL
    stamp TEXT NOT NULL DEFAULT '',                 -- the data file's identity and mtime then
    held_chunks INTEGER NOT NULL, held_bytes INTEGER NOT NULL,
    last_mount REAL NOT NULL DEFAULT 0, heat INTEGER NOT NULL DEFAULT 0,
    native_served INTEGER NOT NULL DEFAULT 0,       -- a kernel may read the file without asking us
    UNIQUE(domain, id));
CREATE TABLE chunks(digest BLOB NOT NULL, segment INTEGER NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY(digest, segment, n)) WITHOUT ROWID;
CREATE TABLE files(key BLOB NOT NULL, segment INTEGER NOT NULL, segment_offset INTEGER NOT NULL,
    first_chunk INTEGER NOT NULL, chunk_count INTEGER NOT NULL, size INTEGER NOT NULL,
    PRIMARY KEY(key, segment)) WITHOUT ROWID;
CREATE TABLE heat(segment INTEGER NOT NULL, n INTEGER NOT NULL, reads INTEGER NOT NULL,
    last REAL NOT NULL,
    PRIMARY KEY(segment, n)) WITHOUT ROWID;
CREATE TABLE objects(domain TEXT NOT NULL, digest BLOB NOT NULL, size INTEGER NOT NULL,
    packed INTEGER NOT NULL, data BLOB NOT NULL, UNIQUE(domain, digest));
CREATE TABLE images(domain TEXT NOT NULL, manifest BLOB NOT NULL, reference TEXT NOT NULL,
    tree_path TEXT NOT NULL, segments BLOB NOT NULL, created REAL NOT NULL, last_mount REAL NOT NULL,
    PRIMARY KEY(manifest, domain)) WITHOUT ROWID;
CREATE TABLE tags(reference TEXT NOT NULL, platform TEXT NOT NULL, digest BLOB NOT NULL,
    resolved REAL NOT NULL,
    PRIMARY KEY(reference, platform)) WITHOUT ROWID;
CREATE TABLE pins(manifest BLOB NOT NULL, owner TEXT NOT NULL, reference TEXT NOT NULL,
    since REAL NOT NULL,
    PRIMARY KEY(manifest, owner)) WITHOUT ROWID;
CREATE TABLE seeds(reference TEXT NOT NULL, platform TEXT NOT NULL, origin TEXT NOT NULL,
    request TEXT NOT NULL, since REAL NOT NULL,
    PRIMARY KEY(reference, platform)) WITHOUT ROWID;
CREATE TABLE mounts(id TEXT PRIMARY KEY, directory TEXT NOT NULL, manifest BLOB NOT NULL,
    options TEXT NOT NULL, since REAL NOT NULL) WITHOUT ROWID;
"""

# From version 1: tags did not say for which platform (they are resolved again), pins not whose they are (users')
_FROM_1: Final = (
    "DROP TABLE tags",
    "ALTER TABLE pins RENAME TO pins_1",
    *(
        statement
        for statement in _SCHEMA.split(";")
        if statement.strip().startswith(("CREATE TABLE tags", "CREATE TABLE pins", "CREATE TABLE seeds"))
    ),
    "INSERT INTO pins SELECT manifest, 'user', reference, since FROM pins_1",
    "DROP TABLE pins_1",
)

FORGET_BITMAPS: Final = "UPDATE segments SET verified = NULL WHERE verified IS NOT NULL"

_UNUSABLE: Final = (
    apsw.AuthError,
    apsw.BusyError,
    apsw.CantOpenError,
    apsw.ConnectionClosedError,
    apsw.IOError,
    apsw.PermissionsError,
    apsw.ReadOnlyError,
)


_STIR: Final = "INSERT INTO facts VALUES('settled', 1) ON CONFLICT DO UPDATE SET value = value + 1"


class SegmentRow(NamedTuple):
    """A row of `segments`: what is known of a segment that is not open."""

    row: int
    domain: str
    id: bytes
    segment_bytes: int
    chunk_count: int
    blob_digest: bytes | None
    blob_bytes: int
    source: str
    table_digest: bytes
    file_starts: bytes
    present: bytes
    held_bytes: int
    verified: bytes | None
    stamp: str
    native_served: int


_SELECT_SEGMENTS: Final = "SELECT " + ", ".join(SegmentRow._fields) + " FROM segments"  # noqa: S608  # names of ours


class Index:
    """An open index. Made by `Index.open`; `Index.in_memory` is for tests and fakes."""

    def __init__(
        self, reader: apsw.Connection, writer: apsw.Connection, reserve: Reserve | None, *, fresh: bool
    ) -> None:
        self._reserve = reserve
        self._reader = reader
        self._writer = writer
        self._limiter = trio.CapacityLimiter(1)
        self.fresh = fresh
        """whether it began empty just now"""
        self.unsynced = False
        """whether the power could take a commit back"""
        self.distrusts_bitmaps = False
        """`verified` may still have what an unclean stop should have erased: a full disk was in the way"""
        self.on_unsynced: Callable[[], None] = lambda: None
        """called after such a commit, for somebody to call `settle`"""

    @classmethod
    def open(cls, path: Path, disk: Disk) -> Index:
        """Open or make the database at `path`. Blocks; call it in a thread. Raises StateError."""
        reserve = Reserve(path.with_name("index.reserve"))
        try:
            writer, fresh = _open_or_begin(path, disk)
        except (PoolFull, StateError):
            # a full disk shows as one or the other, since SQLite makes files when it opens a database
            if not reserve.release():
                raise
            log.warning("index.reserve_used", effect="the disk is full; the pool has to shrink")
            writer, fresh = _open_or_begin(path, disk)
        reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=disk.sqlite_vfs)
        reader.set_busy_timeout(5000)
        index = cls(reader, writer, reserve, fresh=fresh)
        reserve.fill()
        reserve.share()
        return index

    @classmethod
    def in_memory(cls) -> Index:
        """One that is gone when closed; writes run where they are called."""
        connection = apsw.Connection(":memory:")
        for _ in connection.execute(_SCHEMA):
            pass
        return cls(connection, connection, None, fresh=True)

    def take_reserve(self) -> None:
        """Keep some room on the disk for our own writes, now that there may be some. Blocks."""
        if self._reserve is not None:
            self._reserve.fill()

    def release_reserve(self) -> bool:
        """Give that room up; false when it was given up before. Blocks."""
        return self._reserve is not None and self._reserve.release()

    @property
    def lacks_reserve(self) -> bool:
        """Whether that room was given up and there was none since."""
        return self._reserve is not None and not self._reserve.is_there

    def close(self) -> None:
        """Close the database, folding the log into it if there is room. Blocks."""
        self._reader.close()
        with suppress(apsw.FullError):  # the log stays, and is read at the next start
            self._writer.close()

    async def write(self, change: Callable[[apsw.Connection], T], *, durable: bool = False) -> T:
        """Run `change` in a transaction; `durable`: it is on the disk before this returns.

        All of it happens or nothing: raises PoolFull or StateError. A cancelled caller still waits for the
        end.
        """
        return await self._write(change, durable=durable, from_reserve=True)

    async def write_spare(self, change: Callable[[apsw.Connection], T]) -> T:
        """The same for what can be done without: on a full disk the room that is reserved is not spent for it."""
        return await self._write(change, durable=False, from_reserve=False)

    async def _write(self, change: Callable[[apsw.Connection], T], *, durable: bool, from_reserve: bool) -> T:
        def attempt() -> T:
            self._writer.pragma("synchronous", "FULL" if durable else "NORMAL")
            with _full_is_full(self._writer), _transaction(self._writer):
                result = change(self._writer)
                if durable and self.unsynced:
                    # a change that comes to nothing is no reason for SQLite to sync, and earlier ones wait for it
                    self._writer.execute(_STIR)
            self.unsynced = not durable
            return result

        def run() -> T:
            with _named_errors():
                try:
                    return attempt()
                except apsw.FullError:
                    if not from_reserve or self._reserve is None or not self._reserve.release():
                        raise
                    log.warning("index.reserve_used", effect="the disk is full; the pool has to shrink")
                    return attempt()

        if self._writer is self._reader:
            await trio.lowlevel.checkpoint()
            return run()
        result = await trio.to_thread.run_sync(run, limiter=self._limiter)
        if not durable:
            self.on_unsynced()
        return result

    async def settle(self) -> None:
        """Make every commit so far durable: the log is synced as a whole, so one more commit does it."""
        if self.unsynced:
            await self.write(lambda _: None, durable=True)

    async def forget_distrusted(self) -> None:
        """Erase what `distrusts_bitmaps` is about; before a clean stop, which would make it count."""
        if self.distrusts_bitmaps:
            await self.write(lambda connection: connection.execute(FORGET_BITMAPS), durable=True)
            self.distrusts_bitmaps = False

    def rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a short query. Raises StateError when the database is damaged."""
        with _named_errors():
            return list(self._reader.execute(sql, bindings))

    def fact(self, name: str) -> Any:
        """A single value, or None."""
        rows = self.rows("SELECT value FROM facts WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def segments(self) -> list[SegmentRow]:
        """All segments, in the order in which they were first opened."""
        return [SegmentRow(*row) for row in self.rows(_SELECT_SEGMENTS + " ORDER BY row")]

    def segment(self, row: int) -> SegmentRow | None:
        """One segment."""
        rows = self.rows(_SELECT_SEGMENTS + " WHERE row = ?", (row,))
        return SegmentRow(*rows[0]) if rows else None

    def heat(self) -> list[tuple[int, str, bytes, int, float, int, int]]:
        """Of all segments: row, domain, id, held bytes, last mount, number of mounts, served natively."""
        sql = "SELECT row, domain, id, held_bytes, last_mount, heat, native_served FROM segments"
        return [
            (row, domain, segment_id, held, last, mounts, native)
            for row, domain, segment_id, held, last, mounts, native in self.rows(sql)
        ]

    def held(self) -> tuple[int, int]:
        """Chunks and bytes of all segments together."""
        sql = "SELECT coalesce(sum(held_chunks), 0), coalesce(sum(held_bytes), 0) FROM segments"
        chunks, held_bytes = self.rows(sql)[0]
        return chunks, held_bytes

    def places(self, domain: str, digest: bytes, *, limit: int) -> list[tuple[int, int]]:
        """Where a chunk is in the segments of a domain: (segment row, n), at most `limit` of them."""
        sql = (
            "SELECT segment, n FROM chunks JOIN segments ON row = segment"
            " WHERE chunks.digest = ? AND domain = ? LIMIT ?"
        )
        return [(segment, n) for segment, n in self.rows(sql, (digest, domain, limit))]

    def files(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, int, int, int, int]]:
        """Complete files by content: (key, segment row, segment offset, first chunk, chunk count)."""
        if not self.rows("SELECT 1 FROM files LIMIT 1"):
            return
        wanted = list(keys)
        for start in range(0, len(wanted), _KEYS_PER_QUERY):
            part = wanted[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            sql = "SELECT key, segment, segment_offset, first_chunk, chunk_count FROM files WHERE key IN"
            yield from self.rows(f"{sql} ({marks})", part)


@contextmanager
def _full_is_full(connection: apsw.Connection) -> Iterator[None]:
    """SQLite knows a disk without room, but takes a quota that is used up for a broken disk."""
    try:
        yield
    except (apsw.IOError, apsw.CantOpenError) as error:
        if means_full(connection.system_errno):
            raise apsw.FullError(str(error)) from error
        raise


@contextmanager
def _transaction(connection: apsw.Connection) -> Iterator[None]:
    """All or nothing. Not apsw's own, which stumbles over a transaction that SQLite has ended itself (a full disk)."""
    connection.execute("BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _open_or_begin(path: Path, disk: Disk) -> tuple[apsw.Connection, bool]:
    fresh = not path.exists()
    try:
        return _connect(path, disk), fresh
    except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError) as error:
        _move_aside(path, error, disk)
        return _connect(path, disk), True


def _connect(path: Path, disk: Disk) -> apsw.Connection:
    with _named_errors(pass_damage=True):
        connection = apsw.Connection(str(path), vfs=disk.sqlite_vfs)
        path.chmod(0o600)
        connection.set_busy_timeout(5000)
        version = connection.pragma("user_version")
        if version > SCHEMA_VERSION:
            connection.close()
            raise StateError(
                f"{path} was written by a newer p2pgz (index version {version}, ours is {SCHEMA_VERSION})",
                hint="upgrade p2pgz, or choose another --state-dir",
            )
        connection.pragma("journal_mode", "WAL")
        if version == 0:
            with connection:
                for _ in connection.execute(_SCHEMA):
                    pass
                connection.pragma("user_version", SCHEMA_VERSION)
            return connection
        if version == 1:
            with connection:
                for statement in _FROM_1:
                    connection.execute(statement)
                connection.pragma("user_version", SCHEMA_VERSION)
        clean = list(connection.execute("SELECT value FROM facts WHERE name = 'clean'"))
        # after a clean stop nobody but us touched it; else look at every page before anything relies on one
        if clean != [(1,)]:
            found = list(connection.execute("PRAGMA quick_check(1)"))
            if found != [("ok",)]:
                raise apsw.CorruptError(f"quick_check: {found}")
        return connection


def _move_aside(path: Path, error: apsw.Error, disk: Disk) -> None:
    damaged = path.with_name(path.name + ".damaged")
    log.error(
        "index.damaged",
        path=str(path),
        reason=str(error),
        kept_as=str(damaged),
        effect="a new index is begun; chunks that the pool's files hold are checked when first used",
    )
    for suffix in ("-wal", "-shm"):
        disk.unlink(path.with_name(path.name + suffix))
    with suppress(FileNotFoundError):
        disk.replace(path, damaged)


@contextmanager
def _named_errors(*, pass_damage: bool = False) -> Iterator[None]:
    """Give SQLite's errors our names, except, when asked so, those that mean a damaged database."""
    try:
        yield
    except apsw.FullError as error:
        raise PoolFull("the index cannot grow: no room on the disk", hint="free some space") from error
    except (
        apsw.CantOpenError,
        apsw.PermissionsError,
        apsw.ReadOnlyError,
        apsw.IOError,
        apsw.BusyError,
    ) as error:
        raise StateError(
            f"the index cannot be used: {error}", hint="see owner and mode of index.db"
        ) from error
    except (apsw.NotADBError, apsw.CorruptError) as error:
        if pass_damage:
            raise
        hint = "restart the node: it begins a new index and keeps the chunks"
        raise StateError(f"the index is damaged: {error}", hint=hint) from error
