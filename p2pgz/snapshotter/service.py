"""The snapshots service, without gRPC: what containerd may ask, in terms of records, directories and the node's mounts.

`server` calls it from several threads. Every failure is a SnapshotError that carries the status containerd goes by. The
node is asked without the lock held; what containerd retries or asks twice at once is made once (`_taking`).
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from p2pgz.errors import P2pgzError, SnapshotError, StateError
from p2pgz.mount.umount import clear_dead_mount, top_mount, unmount
from p2pgz.pool.disk import locked
from p2pgz.snapshotter.filters import matches, parse_filters
from p2pgz.snapshotter.images import REMOTE, SNAPSHOT_REF, Images, Lazy, NotLazy, Wanted, wanted_layer
from p2pgz.snapshotter.lowers import Mount, like_below, mounts, usage_of
from p2pgz.snapshotter.records import Kind, Records, Snapshot, Usage

log = structlog.get_logger(component="snapshotter")

# containerd's own limit of a label, key and value together
LABEL_MAX_BYTES: Final = 4096
# how containerd's clients call a snapshot that they unpack a layer into
UNPACK_PREFIX: Final = "extract-"
NOT_ASKED: Final = (
    "its client fetches layers before it asks for them (`ctr images pull --local`, `nerdctl load`, …)"
)
# what separates directories and options in the data of an overlay mount
UNFIT_LETTERS: Final = frozenset(':,"\\')


class Snapshotter:
    """All operations; one for each root directory."""

    def __init__(
        self, root: Path, images: Images, *, overlay_options: Sequence[str] = ("index=off",)
    ) -> None:
        if UNFIT_LETTERS & set(str(root)):
            raise StateError(
                f"{root}: overlay mounts cannot name it", hint='choose a path without : , " and \\'
            )
        self._root = root
        self._images = images
        self._overlay_options = overlay_options
        self._records = Records(root)
        self._lock = threading.RLock()
        self._busy: dict[str, tuple[threading.Lock, int]] = {}
        self._unfinished: set[int] = set()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Own the root directory, with what earlier runs left in it, until the block ends; raises StateError."""
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StateError(f"{self._root}: {error.strerror}") from error
        with locked(self._root / "lock"):
            self._records.load()
            self.cleanup()
            yield

    # --- making snapshots

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A snapshot to write into. With the label SNAPSHOT_REF it is for a layer to be unpacked: ALREADY_EXISTS says that
        the layer is here without."""
        self._check(key, parent, labels)
        if reference := labels.get(SNAPSHOT_REF):
            with self._taking(f"{reference} {parent}"):
                if self._find(reference, parent) is None:
                    self._take(key, parent, reference, labels)
                if self._find(reference, parent) is not None:
                    raise SnapshotError("ALREADY_EXISTS", f"the layer of {reference} is here")
        elif key.rpartition("/")[2].startswith(UNPACK_PREFIX):
            self._tell(None, key, NOT_ASKED)
        return self._create("active", key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A snapshot to read what is below it."""
        self._check(key, parent, labels)
        return self._create("view", key, parent, labels)

    def _check(self, key: str, parent: str, labels: Mapping[str, str]) -> None:
        if not key:
            raise SnapshotError("INVALID_ARGUMENT", "a snapshot without a key")
        check_labels(labels)
        with self._lock:
            if self._records.has(key):
                raise SnapshotError("ALREADY_EXISTS", f"there is a snapshot {key!r}")
            if parent and self._records.get(parent).kind != "committed":
                raise SnapshotError("FAILED_PRECONDITION", f"the parent {parent!r} is not committed")

    def _find(self, reference: str, parent: str) -> Snapshot | None:
        with self._lock:
            for one in self._records:
                if (one.kind, one.parent, one.labels.get(SNAPSHOT_REF)) == ("committed", parent, reference):
                    return one
        return None

    def _take(self, key: str, parent: str, chain_id: str, labels: Mapping[str, str]) -> None:
        """Make a committed snapshot of a layer that nobody unpacks; or nothing, and say why."""
        wanted: Wanted | None = None
        try:
            wanted = wanted_layer(labels)
            lazy = self._images.find(wanted)
            self._commit_lazy(parent, chain_id, labels, lazy)
        except (NotLazy, P2pgzError) as error:
            self._tell(wanted, key, str(error))
        else:
            log.info("layer.lazy", reference=lazy.reference, layer=wanted.layer)

    def _tell(self, wanted: Wanted | None, key: str, reason: str) -> None:
        named = {"reference": wanted.reference, "layer": wanted.layer} if wanted else {}
        log.warning("layer.unpacked", key=key, reason=reason, **named)
        self._images.unpacked(wanted, key, reason)

    def _commit_lazy(self, parent: str, chain_id: str, labels: Mapping[str, str], lazy: Lazy) -> None:
        with self._making("fs") as (snapshot_id, directory):
            if lazy.layers == lazy.total:  # what containers will use; parts of images seldom are used
                self._images.mount(lazy, directory / "fs")
            now = time.time_ns()
            with self._lock:
                if parent:
                    self._records.get(parent)
                # two parents may be there for one chain: ours, and one that was unpacked
                name = f"{chain_id} {snapshot_id}" if self._records.has(chain_id) else chain_id
                self._records.put(
                    Snapshot(
                        id=snapshot_id,
                        name=name,
                        parent=parent,
                        kind="committed",
                        labels={**labels, REMOTE: "p2pgz"},
                        created_ns=now,
                        updated_ns=now,
                        lazy=lazy,
                        usage=Usage(),
                    )
                )

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        lowers = self._lowers(parent)
        names = ("fs", "work") if kind == "active" else ("fs",)
        with self._making(*names) as (snapshot_id, directory):
            if kind == "active" and lowers:
                like_below(directory / "fs", lowers[0])
            now = time.time_ns()
            with self._lock:
                self._check(key, parent, labels)  # again: another thread may have been faster
                self._records.put(
                    Snapshot(
                        id=snapshot_id,
                        name=key,
                        parent=parent,
                        kind=kind,
                        labels=dict(labels),
                        created_ns=now,
                        updated_ns=now,
                    )
                )
        return mounts(kind, directory, lowers, self._overlay_options)

    @contextmanager
    def _making(self, *names: str) -> Iterator[tuple[int, Path]]:
        """A new snapshot's number and directory, which `cleanup` leaves alone; gone when the block fails."""
        with self._lock:
            snapshot_id = self._records.new_id()
            self._unfinished.add(snapshot_id)
        try:
            directory = self._records.make_directory(snapshot_id, *names)
            try:
                yield snapshot_id, directory
            except BaseException:
                self._discard(directory)
                raise
        finally:
            with self._lock:
                self._unfinished.discard(snapshot_id)

    # --- what is below them

    def mounts(self, key: str) -> list[Mount]:
        """What containerd mounts for a snapshot; what is not mounted any more is mounted again."""
        with self._lock:
            snapshot = self._records.get(key)
        if snapshot.kind == "committed":
            raise SnapshotError("FAILED_PRECONDITION", f"snapshot {key!r} is committed")
        directory = self._records.directory(snapshot.id)
        return mounts(snapshot.kind, directory, self._lowers(snapshot.parent), self._overlay_options)

    def _lowers(self, name: str) -> list[Path]:
        """The directories below, the nearest first. A merged tree is the last: it has all that is below it."""
        found: list[Path] = []
        while name:
            with self._lock:
                snapshot = self._records.get(name)
            directory = self._records.directory(snapshot.id) / "fs"
            found.append(directory)
            if snapshot.lazy is not None:
                self._mount(snapshot.lazy, directory)
                break
            name = snapshot.parent
        return found

    def _mount(self, lazy: Lazy, directory: Path) -> None:
        with self._taking(str(directory)):
            try:
                if top_mount(directory) is not None and not clear_dead_mount(directory):
                    return
                log.info(
                    "layer.mounting", reference=lazy.reference, layers=lazy.layers, directory=str(directory)
                )
                directory.mkdir(exist_ok=True)
                self._images.mount(lazy, directory)
            except P2pgzError as error:
                raise SnapshotError(
                    "UNAVAILABLE", f"{lazy.reference}: {error.what}", hint=error.hint
                ) from error
            except OSError as error:
                raise SnapshotError("UNAVAILABLE", f"{directory}: {error.strerror}") from error

    # --- changing and removing

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make an active snapshot one that others can stand on."""
        check_labels(labels)
        if not name:
            raise SnapshotError("INVALID_ARGUMENT", "a snapshot without a name")
        with self._lock:
            self._check_commit(name, key, parent)
            snapshot = self._records.get(key)
        usage = usage_of(self._records.directory(snapshot.id) / "fs")
        with self._lock:
            self._check_commit(name, key, parent)
            now = time.time_ns()
            self._records.put(
                msgspec.structs.replace(
                    self._records.get(key),
                    name=name,
                    parent=snapshot.parent or parent,
                    kind="committed",
                    labels=dict(labels),
                    created_ns=now,
                    updated_ns=now,
                    usage=usage,
                ),
                replaces=key,
            )

    def _check_commit(self, name: str, key: str, parent: str) -> None:
        if self._records.has(name):
            raise SnapshotError("ALREADY_EXISTS", f"there is a snapshot {name!r}")
        snapshot = self._records.get(key)
        if snapshot.kind != "active":
            raise SnapshotError("FAILED_PRECONDITION", f"snapshot {key!r} is not active")
        if parent and snapshot.parent not in ("", parent):
            raise SnapshotError("INVALID_ARGUMENT", f"snapshot {key!r} stands on {snapshot.parent!r}")
        if parent and self._records.get(parent).kind != "committed":
            raise SnapshotError("FAILED_PRECONDITION", f"the parent {parent!r} is not committed")

    def remove(self, key: str) -> None:
        """Forget a snapshot that nothing stands on, and what it takes on the disk."""
        with self._lock:
            snapshot = self._records.get(key)
            if self._records.is_parent(key):
                raise SnapshotError(
                    "FAILED_PRECONDITION", f"cannot remove snapshot {key!r}: others stand on it"
                )
            self._records.remove(snapshot)
        self._discard(self._records.directory(snapshot.id))

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels: those that `paths` name, or all."""
        with self._lock:
            snapshot = self._records.get(name)
            changed = {} if not paths or "labels" in paths else dict(snapshot.labels)
            if not paths or "labels" in paths:
                changed.update(labels)
            for path in paths:
                if path.startswith("labels."):
                    label = path.removeprefix("labels.")
                    if labels.get(label):
                        changed[label] = labels[label]
                    else:
                        changed.pop(label, None)
                elif path != "labels":
                    raise SnapshotError("INVALID_ARGUMENT", f"{path!r} of a snapshot cannot be changed")
            check_labels(changed)
            updated = msgspec.structs.replace(snapshot, labels=changed, updated_ns=time.time_ns())
            self._records.put(updated, replaces=name)
            return updated

    def cleanup(self) -> None:
        """Remove directories that belong to nothing, such as what a kill left."""
        with self._lock:
            strays = [path for path in self._records.strays() if not self._is_being_made(path)]
        for path in strays:
            log.info("snapshot.stray", path=str(path))
            self._discard(path)

    def _is_being_made(self, path: Path) -> bool:
        return path.name.isdecimal() and int(path.name) in self._unfinished

    def _discard(self, directory: Path) -> None:
        """Best effort: what resists is a stray, for `cleanup`."""
        target = directory / "fs"
        with suppress(P2pgzError, OSError):
            while top_mount(target) is not None:
                unmount(target, lazy=True)
        if top_mount(target) is None:
            shutil.rmtree(directory, ignore_errors=True)

    # --- looking

    def stat(self, key: str) -> Snapshot:
        """One snapshot."""
        with self._lock:
            return self._records.get(key)

    def walk(self, filters: Sequence[str]) -> list[Snapshot]:
        """All snapshots that one of the filters matches."""
        parsed = parse_filters(filters)
        with self._lock:
            every = list(self._records)
        return [snapshot for snapshot in every if matches(parsed, snapshot.field)]

    def usage(self, key: str) -> Usage:
        """What a snapshot takes on the disk. A lazy one takes nothing: its bytes are the pool's, which has its own quota."""
        snapshot = self.stat(key)
        if snapshot.usage is not None:
            return snapshot.usage
        return usage_of(self._records.directory(snapshot.id) / "fs")

    @contextmanager
    def _taking(self, name: str) -> Iterator[None]:
        """One thread at a time does this."""
        with self._lock:
            lock, users = self._busy.get(name, (threading.Lock(), 0))
            self._busy[name] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._busy[name]
                if users == 1:
                    del self._busy[name]
                else:
                    self._busy[name] = lock, users - 1


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise SnapshotError for labels that containerd itself would not keep."""
    for key, value in labels.items():
        if len(key.encode()) + len(value.encode()) > LABEL_MAX_BYTES:
            raise SnapshotError(
                "INVALID_ARGUMENT", f"label {key[:60]!r} has more than {LABEL_MAX_BYTES} bytes with its value"
            )
