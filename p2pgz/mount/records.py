"""What a node writes down about each mount, so that the next node finds it again: one document per mount, in the index."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from p2pgz.core.digest import Digest
from p2pgz.errors import StateError
from p2pgz.pool.catalog import MountRecord


class MountOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user chose for one mount."""

    directory: str
    suid: bool = False
    dev: bool = False
    context: str = ""
    fill: bool = True
    mode: str = "auto"
    persist: bool = False
    """mount it again after a reboot"""


class MountDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A mount, as far as it must be known to serve it again. Fields may be added; unknown ones are ignored."""

    reference: str
    options: MountOptions
    request: dict[str, Any] = {}
    """how the image's source is reached; the node's, never holds a secret"""
    boot_id: str = ""


def to_record(mount_id: str, manifest: Digest, document: MountDocument) -> MountRecord:
    """The row of the index."""
    return MountRecord(
        id=mount_id,
        directory=document.options.directory,
        manifest=manifest,
        options=msgspec.json.encode(document).decode(),
        since=time.time(),
    )


def from_record(record: MountRecord) -> MountDocument:
    """The document of a row; raises StateError when another version wrote what this one cannot read."""
    try:
        return msgspec.json.decode(record.options, type=MountDocument)
    except msgspec.MsgspecError as error:
        raise StateError(
            f"mount {record.id} at {record.directory}: its record is not understood: {error}"
        ) from error
