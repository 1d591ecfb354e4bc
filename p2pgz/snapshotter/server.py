"""The service as gRPC on a unix socket, for containerd's `proxy_plugins`.

Called by `p2pgz snapshotter`. Only root may connect: who may ask for mounts here owns the host. Messages in, messages out;
what they mean is the service's. The socket of a server that is gone is replaced, one that is served is not.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from p2pgz.errors import SnapshotError, StateError, StateInUse
from p2pgz.snapshotter.lowers import Mount
from p2pgz.snapshotter.pb import snapshots_pb2 as pb
from p2pgz.snapshotter.records import Kind, Snapshot
from p2pgz.snapshotter.service import Snapshotter

log = structlog.get_logger(component="snapshotter")

SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"
# A thread waits while an image is opened: as many as images that containerd pulls at a time, and some for everything else
THREADS: Final = 32
# Requests carry labels; containerd's own limit of a message is 16 MiB
MESSAGE_MAX_BYTES: Final = 16 << 20
LIST_PAGE: Final = 100
STOP_SECONDS: Final = 5.0
# sun_path, unix(7)
UNIX_PATH_MAX_BYTES: Final = 107
KINDS: Final[dict[Kind, pb.Kind]] = {"view": pb.VIEW, "active": pb.ACTIVE, "committed": pb.COMMITTED}

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Servicer:
    """One method for each of the service's."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def prepare(self, request: pb.PrepareSnapshotRequest) -> pb.PrepareSnapshotResponse:
        made = self._snapshotter.prepare(request.key, request.parent, request.labels)
        return pb.PrepareSnapshotResponse(mounts=map(_mount, made))

    def view(self, request: pb.ViewSnapshotRequest) -> pb.ViewSnapshotResponse:
        made = self._snapshotter.view(request.key, request.parent, request.labels)
        return pb.ViewSnapshotResponse(mounts=map(_mount, made))

    def mounts(self, request: pb.MountsRequest) -> pb.MountsResponse:
        return pb.MountsResponse(mounts=map(_mount, self._snapshotter.mounts(request.key)))

    def commit(self, request: pb.CommitSnapshotRequest) -> Empty:
        self._snapshotter.commit(request.name, request.key, request.labels, request.parent)
        return Empty()

    def remove(self, request: pb.RemoveSnapshotRequest) -> Empty:
        self._snapshotter.remove(request.key)
        return Empty()

    def stat(self, request: pb.StatSnapshotRequest) -> pb.StatSnapshotResponse:
        return pb.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def update(self, request: pb.UpdateSnapshotRequest) -> pb.UpdateSnapshotResponse:
        info = request.info
        updated = self._snapshotter.update(info.name, info.labels, list(request.update_mask.paths))
        return pb.UpdateSnapshotResponse(info=_info(updated))

    def list(self, request: pb.ListSnapshotsRequest) -> Iterator[pb.ListSnapshotsResponse]:
        found = self._snapshotter.walk(list(request.filters))
        for start in range(0, len(found), LIST_PAGE):
            yield pb.ListSnapshotsResponse(info=map(_info, found[start : start + LIST_PAGE]))

    def usage(self, request: pb.UsageRequest) -> pb.UsageResponse:
        usage = self._snapshotter.usage(request.key)
        return pb.UsageResponse(size=usage.bytes, inodes=usage.inodes)

    def cleanup(self, _: pb.CleanupRequest) -> Empty:
        self._snapshotter.cleanup()
        return Empty()


def _mount(mount: Mount) -> pb.Mount:
    return pb.Mount(type=mount.type, source=mount.source, options=mount.options)


def _info(snapshot: Snapshot) -> pb.Info:
    created, updated = Timestamp(), Timestamp()
    created.FromNanoseconds(snapshot.created_ns)
    updated.FromNanoseconds(snapshot.updated_ns)
    return pb.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=KINDS[snapshot.kind],
        created_at=created,
        updated_at=updated,
        labels=snapshot.labels,
    )


def _refuse(context: grpc.ServicerContext, error: SnapshotError) -> Any:
    return context.abort(getattr(grpc.StatusCode, error.status), str(error))


def _answering(method: Callable[[Request], Answer]) -> Callable[[Request, grpc.ServicerContext], Answer]:
    """The method with its errors as statuses; a bug ends the call only, and grpc logs it."""

    def answer(request: Request, context: grpc.ServicerContext) -> Answer:
        try:
            return method(request)
        except SnapshotError as error:
            return _refuse(context, error)  # type: ignore[no-any-return]

    return answer


def _streaming(
    method: Callable[[Request], Iterator[Answer]],
) -> Callable[[Request, grpc.ServicerContext], Iterator[Answer]]:
    def answer(request: Request, context: grpc.ServicerContext) -> Iterator[Answer]:
        try:
            yield from method(request)
        except SnapshotError as error:
            _refuse(context, error)

    return answer


def _handlers(servicer: Servicer) -> grpc.GenericRpcHandler:
    methods: dict[str, grpc.RpcMethodHandler] = {}
    for name, description in pb.DESCRIPTOR.services_by_name["Snapshots"].methods_by_name.items():
        method = getattr(servicer, name.lower())
        request_type = getattr(pb, description.input_type.name)
        streams = name == "List"
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        methods[name] = make(
            _streaming(method) if streams else _answering(method),
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(SERVICE, methods)


@contextmanager
def served(snapshotter: Snapshotter, address: Path) -> Iterator[grpc.Server]:
    """Serve on a unix socket until the block ends; requests in progress get STOP_SECONDS. Raises StateError."""
    check_address(address)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="snapshots")
    server = grpc.server(
        pool,
        options=[
            ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
            ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
        ],
    )
    server.add_generic_rpc_handlers((_handlers(Servicer(snapshotter)),))
    old = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{address}")
        server.start()
    except RuntimeError as error:
        raise StateError(f"{address}: cannot listen", hint="is its directory writable?") from error
    finally:
        os.umask(old)
    try:
        yield server
    finally:
        server.stop(STOP_SECONDS).wait()
        pool.shutdown(wait=False, cancel_futures=True)
        address.unlink(missing_ok=True)


def check_address(address: Path) -> None:
    """Make room for a socket: what a dead server left is removed. Raises StateInUse or StateError."""
    if len(os.fsencode(address)) > UNIX_PATH_MAX_BYTES:
        raise StateError(f"{address}: longer than the {UNIX_PATH_MAX_BYTES} bytes of a socket's name")
    try:
        address.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not address.exists() and not address.is_symlink():
            return
        if not address.is_socket():
            raise StateError(
                f"{address}: there is something else there", hint="remove it, or choose another name"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            try:
                probe.connect(str(address))
            except ConnectionRefusedError:
                address.unlink(missing_ok=True)
                return
    except OSError as error:
        raise StateError(f"{address}: {error.strerror or error}") from error
    raise StateInUse(f"{address}: another snapshotter listens there", hint="stop it first")
