"""The errors of p2pgz, named for what the caller does next.

Every error says what failed, on which object, and what to do. `exit_code` is the status of the command line
(docs/reference/exit-codes.md); `errno_value` is what a reader of a mount gets; `retryable` tells whether the same call may
succeed later without anybody changing anything. Foreign exceptions are mapped to these once, in the adapter that meets them.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Literal

GrpcStatus = Literal[
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
]
"""the status codes of gRPC by which containerd decides what it does next"""


class P2pgzError(Exception):
    """Base of all errors that p2pgz raises on purpose.

    `what` is one line for a person: what failed and where. `hint` says what to do about it, or is empty.
    """

    exit_code: ClassVar[int] = 1
    errno_value: ClassVar[int] = errno.EIO
    retryable: ClassVar[bool] = False

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} ({self.hint})" if self.hint else self.what


class UsageError(P2pgzError):
    """The command was called wrongly: tell the user how to call it."""

    exit_code = 2


class PartlyDone(P2pgzError):
    """Some of what was asked for was done, some was not; the text says which."""

    exit_code = 3


class ImageNotFound(P2pgzError):
    """No such image, tag, layer or file in it."""

    exit_code = 10
    errno_value = errno.ENOENT


class AuthRefused(P2pgzError):
    """The registry refused our credentials, or wants some."""

    exit_code = 11
    errno_value = errno.EACCES


class IntegrityError(P2pgzError):
    """Bytes or documents are not what their digest or format promises."""

    exit_code = 12


class ImageInvalid(IntegrityError):
    """A manifest, config, TOC, footer or layer breaks its format or one of our limits: tell the user."""


class ExportInvalid(IntegrityError):
    """A file of `p2pgz export` or `p2pgz inventory` is damaged, or cut short: copy it or make it again."""


class ChunkCorrupt(IntegrityError):
    """The bytes are not the chunk: blame the source that gave them and ask the next one."""


class ChunkMissing(P2pgzError):
    """This source does not have the chunk: ask the next source."""

    exit_code = 13
    retryable = True


class SourceUnavailable(P2pgzError):
    """A registry or peer does not answer, or answers with an error that may pass: retry later, ask another."""

    exit_code = 13
    retryable = True


class SourceUnreachable(SourceUnavailable):
    """A registry cannot be reached, is silent, or answers with 5xx only: what is known from before may be used instead."""


class PeerFault(SourceUnavailable):
    """A peer broke the protocol or one of our limits: close the connection, it loses its place; ask another source."""


class MountUnavailable(P2pgzError):
    """The kernel, FUSE or the mount point does not allow this mount."""

    exit_code = 14


class ResendUnavailable(MountUnavailable):
    """The kernel cannot give a new file system process the requests that a killed one had read: mount again."""


class ConfigError(P2pgzError):
    """The configuration or an option is wrong: tell the user which key and what would be right."""

    exit_code = 15


class StateError(P2pgzError):
    """The state directory cannot be used: wrong file system, locked by another node, written by another version."""

    exit_code = 15


class StateInUse(StateError):
    """Another node has the state directory, or is just leaving it."""

    retryable = True


class PoolFull(P2pgzError):
    """No room on the disk for what has to be kept, such as the index of a new image: works again once there is room."""

    errno_value = errno.ENOSPC
    retryable = True


class NodeUnavailable(P2pgzError):
    """No node answers on the control socket, or it ended in the middle of a request."""

    retryable = True


class SnapshotError(P2pgzError):
    """What containerd asks of the snapshotter cannot be done: `status` tells it what to do about that."""

    def __init__(self, status: GrpcStatus, what: str, *, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.status = status
