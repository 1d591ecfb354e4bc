"""The node's decisions about erofs mode: whether this host may use it, and what each mount gets.

Called by whoever starts mounts. The answer of the self-test holds for one boot and is kept in the run directory; an image
that EROFS cannot express, or a mount that fails, falls back to tree mode unless the user asked for erofs by name.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.errors import MountUnavailable, P2pgzError, PoolFull, StateError
from p2pgz.image.erofs import FORMAT_VERSION, write_metadata
from p2pgz.image.opened import OpenImage
from p2pgz.image.treefile import TreeFile
from p2pgz.mount.hosting import ErofsPart
from p2pgz.mount.segment_client import SegmentClient
from p2pgz.mount.session import Ensure, FsSession, Observe, SessionOptions
from p2pgz.mount.umount import EROFS_SUFFIX
from p2pgz.pool.disk import TEMPORARY_SUFFIX
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="mount")

RESULT_NAME: Final = "erofs-self-test.json"
NOT_ROOT: Final = "only root can mount EROFS"
ASKED_FOR_TREE: Final = "asked for"
NO_RESEND: Final = "without mount.resend an erofs mount cannot survive the loss of its process"


class Decision(NamedTuple):
    """Whether a mount is to be in erofs mode, and why not."""

    erofs: bool
    reason: str


class _Result(msgspec.Struct, frozen=True):
    """The self-test's answer, as kept in the run directory."""

    boot_id: str
    kernel: str
    passed: bool
    reason: str


class ErofsMode:
    """Everything about erofs mode that outlives a mount."""

    def __init__(
        self,
        client: SegmentClient,
        pool: Pool,
        run_path: Path,
        scratch_path: Path,
        boot_id: str,
        *,
        resend: bool = True,
    ) -> None:
        """`scratch_path` is on the disk where metadata is kept: what cannot hold it fails the self-test."""
        self.client = client
        self._resend = resend
        self.roster = client.roster
        self._pool = pool
        self._result_path = run_path / RESULT_NAME
        self._scratch_path = scratch_path
        self._boot_id = boot_id
        self._decision: Decision | None = None
        self._testing = trio.Lock()
        self._writing: dict[Path, trio.Lock] = {}

    async def decide(self, mode: str) -> Decision:
        """For `--mode auto`, `tree` or `erofs`; raises MountUnavailable when erofs is a must and cannot be."""
        if mode == "tree":
            return Decision(False, ASKED_FOR_TREE)
        if mode == "auto" and not self._resend:
            return Decision(False, NO_RESEND)
        async with self._testing:
            decision = self._decision or await self._find_out()
        if not decision.erofs and mode == "erofs":
            raise MountUnavailable(
                f"erofs mode cannot be used on this host: {decision.reason}", hint="use --mode tree"
            )
        return decision

    async def prepare(self, mode: str) -> None:
        """Begin what a mount will need, while its image is being opened. Failures show when it is mounted."""
        with suppress(P2pgzError):
            if (await self.decide(mode)).erofs:
                await self.client.prepare()

    async def _find_out(self) -> Decision:
        """Remembers the answer, unless the next mount may get another one."""
        if os.geteuid() != 0:
            return Decision(False, NOT_ROOT)
        kernel = os.uname().release
        try:
            kept = msgspec.json.decode(self._result_path.read_bytes(), type=_Result)
            if (kept.boot_id, kept.kernel) == (self._boot_id, kernel):
                self._decision = Decision(kept.passed, kept.reason)
                return self._decision
        except (OSError, msgspec.MsgspecError):
            pass
        with suppress(OSError):  # the test will say it
            self._scratch_path.mkdir(mode=0o700, exist_ok=True)
        tested = await self.client.self_test(self._scratch_path)
        if not tested.conclusive:
            log.warning("erofs.not_tested", reason=tested.reason, effect="this mount is in tree mode")
            return Decision(False, tested.reason)
        self._decision = Decision(tested.passed, tested.reason)
        result = _Result(self._boot_id, kernel, tested.passed, tested.reason)
        log.info("erofs.self_test", passed=tested.passed, reason=tested.reason, kernel=kernel)
        try:
            temporary = self._result_path.with_suffix(".tmp")
            temporary.write_bytes(msgspec.json.encode(result))
            temporary.replace(self._result_path)
        except OSError as error:  # then it is made again
            log.warning("erofs.result_not_kept", reason=str(error))
        return self._decision

    async def start(
        self, image: OpenImage, options: SessionOptions, ensure: Ensure, observe: Observe
    ) -> FsSession:
        """Mount an image; raises StateError when EROFS cannot express it, MountUnavailable when the kernel refuses."""
        metadata_path = await self._metadata(image)
        native = await self._mark_native(image.segments)
        complete = len(native) == len(image.segments)
        opening = ErofsPart(os.fsencode(metadata_path), native, complete)
        try:
            return await self.client.start_session(opening, options, ensure, observe)
        except BaseException:
            self.forget(options.hold_id)  # of a host that was killed while it made the mount
            raise

    def is_hosted(self, mount_id: str) -> bool:
        """Whether a mount is in erofs mode and has not ended."""
        return self.client.record_of(mount_id) is not None

    def hosted(self, held: Collection[str]) -> set[str]:
        """The mounts in erofs mode of which the holder has the connection."""
        return {mount_id for mount_id, record in self.client.records().items() if record.host in held}

    def forget(self, mount_id: str) -> None:
        """A mount cannot be served any more."""
        self.client.forget(mount_id)

    async def resume(
        self, mount_id: str, options: SessionOptions, ensure: Ensure, observe: Observe
    ) -> FsSession:
        """Another host for a mount; raises MountUnavailable, or StateError when that can never be."""
        record = self.client.record_of(mount_id)
        if record is None:
            raise MountUnavailable("the mount is gone")
        try:
            return await self.client.resume_session(record, options, ensure, observe)
        except StateError:
            self.client.forget(mount_id)
            raise

    async def retire(self, mount_id: str, pid: int) -> None:
        """End the host of a mount if it is this process."""
        record = self.client.record_of(mount_id)
        if record is not None:
            await self.client.retire(record, pid)

    async def _metadata(self, image: OpenImage) -> Path:
        """The EROFS file of an image's tree, written when it is needed for the first time."""
        changed = image.tree_path.stat().st_mtime_ns  # a tree that was built anew may refer to other segments
        stem = image.tree_path.stem
        # the kernel trusts it, and it is not synced: one that a power failure may have torn has the name of another boot
        boot = Digest.of(self._boot_id.encode()).hex[:8]
        path = image.tree_path.with_name(f"{stem}.{FORMAT_VERSION}.{changed:x}.{boot}{EROFS_SUFFIX}")
        async with self._writing.setdefault(path, trio.Lock()):
            if not path.exists():
                try:
                    await trio.to_thread.run_sync(_write, image.tree, path)
                except OSError as error:
                    raise PoolFull(
                        f"{path}: {error.strerror}", hint="free some space in the state directory"
                    ) from error
                for old in path.parent.glob(f"{stem}.*{EROFS_SUFFIX}"):
                    if old != path:
                        old.unlink(missing_ok=True)  # mounts of it keep the file
        self._writing.pop(path, None)
        return path

    async def _mark_native(self, segments: Sequence[Segment]) -> list[int]:
        """The segments that are complete: the kernel reads those by itself from now on, so the pool never punches them."""
        native = []
        for n, segment in enumerate(segments):
            if not _is_complete(segment):
                continue
            if not segment.native_served:
                await self._pool.mark_native(segment)
            if _is_complete(segment):  # a removal may have begun before the mark
                native.append(n)
        return native


def _write(tree: TreeFile, path: Path) -> None:
    temporary = path.with_suffix(TEMPORARY_SUFFIX)
    temporary.write_bytes(write_metadata(tree))
    temporary.replace(path)


def _is_complete(segment: Segment) -> bool:
    count = segment.table.chunk_count
    return count > 0 and segment.presence.present_count() == count
