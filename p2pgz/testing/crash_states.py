"""The states that a crash may leave, from a `CrashLog`, and how to make one of them real in a directory.

A crash can only differ from another one by what was synced and by which part of the rest survived. So it is enough to stop
right before each sync returns, and where a `Note` says that time passed, which decides what may be lost. There, all
combinations of "all" and "nothing" per kind of file are tried (some of them, when there are more than three kinds), and as
many random subsets as asked for, torn in pages or in sectors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

from p2pgz.testing.crash_log import (
    DIRECTORY,
    SECTOR_BYTES,
    TOP,
    Change,
    CrashLog,
    DirectorySynced,
    FileState,
    Image,
    Naming,
    Note,
    Synced,
)

PAGE_SECTORS: Final = 8  # the page cache writes 4 KiB at a time
SHARED_MEMORY_SUFFIX: Final = "-shm"
WRITE_AHEAD_SUFFIX: Final = "-wal"
# How the unsynced changes of one file, or of one directory, fare
FATES: Final = ("none", "all", "first ones", "some", "torn pages", "torn sectors")


@dataclass(frozen=True, slots=True)
class Crash:
    """One state. `position` is how many entries of the log had been written; `label` says what survived of the rest."""

    image: Image
    position: int
    at: float
    label: str
    everything: bool
    """nothing was lost: what a kill of the process leaves"""


@dataclass(slots=True)
class _Pending:
    """What is not durable, in order: of files by number, of directories by name."""

    changes: dict[int, list[tuple[int, Change]]]
    namings: dict[str, list[tuple[int, Naming]]]


def crashes(log: CrashLog, rng: random.Random, *, random_per_point: int) -> Iterator[Crash]:
    """The states after a crash in the life that `log` has recorded. Each is used before the next is asked for."""
    durable = log.base.copy()
    pending = _Pending({}, {})
    at, stirred = 0.0, True  # nothing happened since the last point: the same states again
    for position, entry in enumerate([*log.entries, Note(log.now)]):
        match entry:
            case Change():
                pending.changes.setdefault(entry.file, []).append((position, entry))
                stirred = True
                continue
            case Naming():
                pending.namings.setdefault(entry.directory, []).append((position, entry))
                stirred = True
                continue
            case Synced():
                at = entry.at
                waiting = any(number < entry.begin for number, _ in pending.changes.get(entry.file, ()))
            case DirectorySynced():
                waiting = any(number < entry.begin for number, _ in pending.namings.get(entry.directory, ()))
            case Note():
                at, waiting = entry.at, entry.fact is None
        if waiting and (stirred or isinstance(entry, Note)):
            yield from _at(durable, pending, position, at, rng, random_per_point)
            stirred = False
        _settle(durable, pending, entry)
        stirred = stirred or not isinstance(entry, Note)


def _settle(durable: Image, pending: _Pending, entry: Synced | DirectorySynced | Note) -> None:
    """What a sync makes durable."""
    if isinstance(entry, Synced) and (changes := pending.changes.pop(entry.file, [])):
        state = durable.files[entry.file].copy() if entry.file in durable.files else None
        for _, change in (pair for pair in changes if pair[0] < entry.begin):
            state = state or _empty()
            state.apply(change)
        if state is not None:
            durable.files[entry.file] = state
        if later := [pair for pair in changes if pair[0] >= entry.begin]:
            pending.changes[entry.file] = later
    elif isinstance(entry, DirectorySynced):
        namings = pending.namings.pop(entry.directory, [])
        for _, naming in (pair for pair in namings if pair[0] < entry.begin):
            durable.rename(naming)
        if later_names := [pair for pair in namings if pair[0] >= entry.begin]:
            pending.namings[entry.directory] = later_names


def _at(
    durable: Image, pending: _Pending, position: int, at: float, rng: random.Random, random_per_point: int
) -> Iterator[Crash]:
    kinds = _kinds(durable, pending)
    names = sorted(kinds)
    chosen: list[dict[int | str, str]] = []
    for count in range(len(names) + 1):
        for lucky in combinations(names, count):
            chosen += [{key: "all" for kind in lucky for key in kinds[kind]}]
    if len(names) > 3:  # 8 of each size are plenty: the random ones come on top
        chosen = [chosen[0], chosen[-1], *rng.sample(chosen[1:-1], 6)]
    keys = [key for kind in names for key in kinds[kind]]
    chosen += [{key: rng.choice(FATES) for key in keys} for _ in range(random_per_point if keys else 0)]
    for fates in chosen:
        image = durable.copy()
        for file, changes in pending.changes.items():
            _survive(image, file, changes, fates.get(file, "none"), rng)
        for directory, namings in pending.namings.items():
            _keep_names(image, namings, fates.get(directory, "none"), rng)
        label = ", ".join(f"{key or 'names'}: {fate}" for key, fate in fates.items() if fate != "none")
        everything = bool(keys) and all(fates.get(key) == "all" for key in keys)
        yield Crash(image, position, at, label or "nothing unsynced survived", everything or not keys)


def _kinds(durable: Image, pending: _Pending) -> dict[str, list[int | str]]:
    """What is pending, in groups that are tried against each other: names, log, database, each other file's kind."""
    named = durable.copy()
    for namings in pending.namings.values():
        for _, naming in namings:
            named.rename(naming)
    suffixes = {
        file: name.rpartition("-" if name.endswith(WRITE_AHEAD_SUFFIX) else ".")[2]
        for names in named.names.values()
        for name, file in names.items()
    }
    kinds: dict[str, list[int | str]] = {}
    for file in pending.changes:
        if file in suffixes:  # nobody can see the others any more
            kinds.setdefault(suffixes[file], []).append(file)
    if pending.namings:
        kinds["names"] = list(pending.namings)
    return kinds


def _survive(
    image: Image, file: int, changes: list[tuple[int, Change]], fate: str, rng: random.Random
) -> None:
    if fate == "none":
        return
    state = image.files[file].copy() if file in image.files else _empty()
    image.files[file] = state
    kept = [change for _, change in changes]
    if fate == "first ones":
        kept = kept[: rng.randrange(len(kept) + 1)]
    elif fate == "some":
        kept = [change for change in kept if rng.random() < 0.5]
    tear = {"torn pages": PAGE_SECTORS, "torn sectors": 1}.get(fate, 0)
    luck = rng.choice((0.1, 0.5, 0.9))
    for change in kept:
        only = None
        if tear and not change.truncates:
            blocks = sorted({number // tear for number in change.sectors})
            lucky = {block for block in blocks if rng.random() < luck}
            only = {number for number in change.sectors if number // tear in lucky}
        state.apply(change, only)


def _keep_names(image: Image, namings: list[tuple[int, Naming]], fate: str, rng: random.Random) -> None:
    kept = [naming for _, naming in namings]
    if fate == "none":
        return
    if fate == "first ones":
        kept = kept[: rng.randrange(len(kept) + 1)]
    elif fate != "all":
        kept = [naming for naming in kept if rng.random() < 0.5]
    for naming in kept:
        image.rename(naming)


def _empty() -> FileState:
    return FileState()


def materialise(image: Image, root: Path, rng: random.Random) -> Image:
    """Make the state real in `root`, a new directory; returns what can be seen of it, the base of the next life's log.

    Half of the time there is a shared-memory file of SQLite's with rubbish in it, since nothing orders its writing.
    """
    seen = Image()
    root.mkdir()
    for directory in sorted(image.names):
        if directory != TOP:
            if image.names[TOP].get(directory) != DIRECTORY:
                continue
            (root / directory).mkdir()
        seen.names[directory] = {}
        for name, file in image.names[directory].items():
            if file != DIRECTORY:
                seen.files[file] = image.files.get(file, _empty())
                _write(root / directory / name, seen.files[file])
                if name.endswith(WRITE_AHEAD_SUFFIX) and rng.random() < 0.5:
                    stem = name.removesuffix(WRITE_AHEAD_SUFFIX)
                    rubbish = rng.randbytes(rng.choice((100, 32768)))
                    (root / directory / (stem + SHARED_MEMORY_SUFFIX)).write_bytes(rubbish)
            seen.names[directory][name] = file
    for name, file in list(seen.names[TOP].items()):
        if file == DIRECTORY and not (root / name).is_dir():
            (root / name).mkdir()
            seen.names[name] = {}
    return seen


def _write(path: Path, state: FileState) -> None:
    """One file, holes where nothing was written."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, state.size)
        run: list[bytes] = []
        start = last = -1
        for number in [*sorted(state.sectors), -1]:
            if number != last + 1 and run:
                data = b"".join(run)[: max(0, state.size - start * SECTOR_BYTES)]
                os.pwrite(fd, data, start * SECTOR_BYTES)
                run = []
            if not run:
                start = number
            if number >= 0:
                run.append(state.sectors[number])
            last = number
    finally:
        os.close(fd)
