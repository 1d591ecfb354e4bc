"""The snapshots on disk: one small JSON file each, so that every change is one atomic replacement or removal.

Called by the service under its lock. `ROOT/records/ID.json` is what counts; `ROOT/snapshots/ID/` belongs to it and is
rubbish without it, however a kill fell: directories are made before the record is written and removed after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from p2pgz.errors import SnapshotError, StateError
from p2pgz.pool.disk import TEMPORARY_SUFFIX, is_full, write_durably
from p2pgz.snapshotter.images import Lazy

log = structlog.get_logger(component="snapshotter")

VERSION: Final = 1
Kind = Literal["view", "active", "committed"]


class Usage(msgspec.Struct, frozen=True):
    """What a snapshot takes on the disk, without what is below it."""

    bytes: int = 0
    inodes: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot; `lazy`: a layer that was never unpacked, its content is the node's."""

    version: int = VERSION
    id: int
    name: str
    parent: str
    kind: Kind
    labels: dict[str, str]
    created_ns: int
    updated_ns: int
    lazy: Lazy | None = None
    usage: Usage | None = None
    """of a committed one; what an active one takes is counted when somebody asks"""

    def field(self, path: tuple[str, ...]) -> str | None:
        """A field by the path that filters use."""
        match path:
            case ("name",):
                return self.name
            case ("parent",):
                return self.parent
            case ("kind",):
                return self.kind
            case ("labels", *rest):
                return self.labels.get(".".join(rest))
        return None


class Records:
    """All snapshots, by name. Not for several threads at once."""

    def __init__(self, root: Path) -> None:
        self._records = root / "records"
        self._snapshots = root / "snapshots"
        self._by_name: dict[str, Snapshot] = {}
        self._children: dict[str, int] = {}
        self._last_id = 0

    def load(self) -> None:
        """Read what earlier runs left; raises StateError when the directory cannot be used."""
        try:
            for directory in (self._records, self._snapshots):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                directory.chmod(0o700)  # setuid files of images are for containers only
            names = sorted(path.name for path in self._records.iterdir())
            ids = [int(path.name) for path in self._snapshots.iterdir() if path.name.isdecimal()]
        except OSError as error:
            raise StateError(
                f"{error.filename}: {error.strerror}",
                hint="give the snapshotter a directory that it may write",
            ) from error
        for name in names:
            path = self._records / name
            if name.endswith(TEMPORARY_SUFFIX):
                path.unlink(missing_ok=True)
                continue
            number = name.partition(".")[0]
            if number.isdecimal():
                ids.append(int(number))
            try:
                snapshot = msgspec.json.decode(path.read_bytes(), type=Snapshot)
            except (OSError, msgspec.MsgspecError) as error:  # its directory is kept: `_is_known`
                log.error("snapshot.record_unusable", path=str(path), reason=str(error))
                continue
            self._enter(snapshot)
        self._last_id = max(ids, default=0)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._by_name.values()))

    def get(self, name: str) -> Snapshot:
        """The snapshot of a name; raises SnapshotError with NOT_FOUND."""
        if (found := self._by_name.get(name)) is None:
            raise SnapshotError("NOT_FOUND", f"no snapshot {name!r}")
        return found

    def has(self, name: str) -> bool:
        """Whether there is one of this name."""
        return name in self._by_name

    def is_parent(self, name: str) -> bool:
        """Whether another one stands on it."""
        return self._children.get(name, 0) > 0

    def new_id(self) -> int:
        """A number that no snapshot has had since this process began, nor any that left something behind."""
        self._last_id += 1
        return self._last_id

    def directory(self, snapshot_id: int) -> Path:
        """What belongs to a snapshot."""
        return self._snapshots / str(snapshot_id)

    def make_directory(self, snapshot_id: int, *names: str) -> Path:
        """A new snapshot's directory with these in it, or nothing."""
        path = self.directory(snapshot_id)
        try:
            path.mkdir(mode=0o700)
            for name in names:
                (path / name).mkdir()
                (path / name).chmod(0o711 if name == "work" else 0o755)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise _refused(error) from error
        return path

    def put(self, snapshot: Snapshot, *, replaces: str = "") -> None:
        """Write a snapshot down; `replaces` is the name that it had before."""
        try:
            write_durably(self._path(snapshot.id), msgspec.json.encode(snapshot))
        except OSError as error:
            raise _refused(error) from error
        if replaces:
            self._leave(self._by_name[replaces])
        self._enter(snapshot)

    def remove(self, snapshot: Snapshot) -> None:
        """Forget a snapshot; its directory is for the caller to remove."""
        try:
            self._path(snapshot.id).unlink(missing_ok=True)
        except OSError as error:
            raise _refused(error) from error
        self._leave(snapshot)

    def strays(self) -> list[Path]:
        """Directories that belong to no record."""
        try:
            paths = list(self._snapshots.iterdir())
        except OSError:
            return []
        return [path for path in paths if not (self._records / f"{path.name}.json").exists()]

    def _path(self, snapshot_id: int) -> Path:
        return self._records / f"{snapshot_id}.json"

    def _enter(self, snapshot: Snapshot) -> None:
        self._by_name[snapshot.name] = snapshot
        if snapshot.parent:
            self._children[snapshot.parent] = self._children.get(snapshot.parent, 0) + 1

    def _leave(self, snapshot: Snapshot) -> None:
        del self._by_name[snapshot.name]
        if snapshot.parent:
            self._children[snapshot.parent] -= 1
            if not self._children[snapshot.parent]:
                del self._children[snapshot.parent]


def _refused(error: OSError) -> SnapshotError:
    what = f"{error.filename or 'the state directory'}: {error.strerror}"
    return SnapshotError("RESOURCE_EXHAUSTED" if is_full(error) else "UNAVAILABLE", what)
