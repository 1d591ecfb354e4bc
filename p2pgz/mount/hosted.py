"""The mounts of a segment host, and the file in the run directory that says of each how another host can take it over.

The host writes the file before the node hears of the mount, and removes it before the kernel hears that its end was
noticed: a file that is there, with a connection that the holder still has, is a mount that needs a host. Used by
`segment_host`, and on the node's side by `segment_client`.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from p2pgz.mount import setup
from p2pgz.mount.hosting import Hosted
from p2pgz.mount.segments import HostedLink, SegmentFile, WatchFile
from p2pgz.mount.setup import SessionOptions
from p2pgz.pool.presence import Presence

_NAME: Final = re.compile(r"hosted-([0-9a-f]+)\.json")


class HostedMount:
    """One mounted image."""

    def __init__(self, options: SessionOptions, presences: list[Presence], watch: WatchFile) -> None:
        self.options = options
        self.presences = presences
        self.watch = watch
        self.files: list[SegmentFile] = []
        self.bdi_name = ""
        self.listener: socket.socket | None = None
        self.link: HostedLink

    @property
    def record_path(self) -> Path | None:
        """Where it is written down; nowhere when no node could find it."""
        if not self.options.socket_path or not self.options.hold_id:
            return None
        return record_path(Path(self.options.socket_path).parent, self.options.hold_id)

    def write_down(self, hosted: Hosted) -> None:
        """For the host that may have to go on with it."""
        if (path := self.record_path) is not None:
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(msgspec.json.encode(hosted))
            temporary.replace(path)

    def strike_out(self) -> None:
        """It has ended: nobody is to take it over, and a node that sees its socket gone knows."""
        if (path := self.record_path) is not None:
            path.unlink(missing_ok=True)
        if self.options.socket_path:
            Path(self.options.socket_path).unlink(missing_ok=True)


def record_path(run_path: Path, mount_id: str) -> Path:
    """The file of a mount."""
    return run_path / f"hosted-{mount_id}.json"


def read_record(run_path: Path, mount_id: str) -> Hosted | None:
    """What is written down of a mount; None when nothing that can be used is."""
    try:
        return msgspec.json.decode(record_path(run_path, mount_id).read_bytes(), type=Hosted)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def records(run_path: Path) -> Iterator[tuple[str, Hosted]]:
    """All of them, by mount; files that cannot be used are removed."""
    for path in sorted(run_path.glob("hosted-*.json")):
        match = _NAME.fullmatch(path.name)
        hosted = read_record(run_path, match[1]) if match else None
        if match and hosted is not None:
            yield match[1], hosted
        else:
            path.unlink(missing_ok=True)


def attach_presences(options: SessionOptions) -> list[Presence]:
    """The presence bitmaps of a mount; none and no descriptor is left when one is wrong."""
    presences: list[Presence] = []
    try:
        for files in options.segments:
            presences.append(Presence.attach(files.presence_fd, files.presence_count))  # noqa: PERF401
    except BaseException:
        setup.close_all([files.presence_fd for files in options.segments[len(presences) :]])
        for presence in presences:
            presence.close()
        raise
    return presences
