"""The tar archive of an OCI image layout: where its members are, found once, then random access (`oci-archive:FILE`).

Only members that a layout can have are known (`oci-layout`, `index.json`, `blobs/sha256/<hex>`), regular and not sparse,
so no name of the archive ever becomes a path. Compressed archives are refused: they have no random access.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pgz.errors import ImageInvalid, ImageNotFound, SourceUnavailable
from p2pgz.registry.layout import read_fully

MAX_MEMBERS = 100_000  # an image has some dozen blobs
_KNOWN = re.compile(r"oci-layout|index\.json|blobs/sha256/[0-9a-f]{64}")


class ArchiveFiles:
    """The files of a layout in a tar archive (see `layout.Files`)."""

    def __init__(self, descriptor: int, members: dict[str, tuple[int, int]]) -> None:
        self._descriptor = descriptor
        self._members = members

    @classmethod
    @contextmanager
    def open(cls, path: Path, name: str) -> Iterator[ArchiveFiles]:
        """Index the archive and keep it open; raises ImageNotFound, ImageInvalid, SourceUnavailable. Blocking."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ImageNotFound(f"{name}: no such file") from error
        except OSError as error:
            raise SourceUnavailable(f"{name}: {error.strerror}") from error
        try:
            if not path.is_file():
                raise ImageInvalid(f"{name}: not a file", hint="oci:DIR is for directories")
            yield cls(descriptor, _index(path, name))
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """All layout files in it."""
        return list(self._members)

    def size(self, name: str) -> int:
        return self._member(name)[1]

    def read(self, name: str, start: int, count: int) -> bytes:
        offset, size = self._member(name)
        return read_fully(self._descriptor, offset + start, max(0, min(count, size - start)))

    def _member(self, name: str) -> tuple[int, int]:
        if name not in self._members:
            raise FileNotFoundError(2, "no such member", name)
        return self._members[name]


def _index(path: Path, name: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each layout file; a later member of the same name wins, as in any tar."""
    members: dict[str, tuple[int, int]] = {}
    end = path.stat().st_size
    count = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                count += 1
                if count > MAX_MEMBERS:
                    raise ImageInvalid(f"{name}: more than {MAX_MEMBERS} members")
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                member_name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse() or not _KNOWN.fullmatch(member_name):
                    continue
                if member.offset_data + member.size > end:
                    raise ImageInvalid(f"{name}: the archive is cut short")
                members[member_name] = member.offset_data, member.size
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise ImageInvalid(
            f"{name}: not a tar archive: {str(error)[:80]}", hint="compressed archives must be unpacked first"
        ) from error
    except OSError as error:
        raise SourceUnavailable(f"{name}: {error.strerror}") from error
    return members
