"""The messages that start a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.errors import ImageInvalid, MountUnavailable, P2pgzError, StateError
from p2pgz.mount import setup
from p2pgz.mount.setup import Assembler, Failed, SegmentFiles, SessionOptions


def options(segments: int, **changes: object) -> SessionOptions:
    files = [
        SegmentFiles(
            table_path=f"/state/pool/{n}.chunks",
            data_path=f"/state/p\udc80ol/{n}.seg",
            presence_fd=n,
            presence_count=n * 7,
        )
        for n in range(segments)
    ]
    return SessionOptions(tree_path="/state/t", segments=files, source_name="a/b:c", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("segments", [0, 1, 64, 65, 700])
def test_session_of_any_size_arrives(segments: int) -> None:
    sent = options(
        segments, directory="/mnt", suid=True, context="x", read_deadline_seconds=1.5, socket_path="/run/s"
    )
    datagrams = list(setup.encode_session(sent, with_fds=True))
    assert all(
        len(datagram) <= setup.MESSAGE_BYTES and len(fds) <= setup.FDS_PER_DATAGRAM
        for datagram, fds in datagrams
    )
    assembler = Assembler(with_fds=True)
    *early, last = [assembler.feed(datagram, fds) for datagram, fds in datagrams]
    assert early == [None] * len(early)
    assert last == sent


def test_long_paths_are_spread_over_datagrams() -> None:
    segment = SegmentFiles(table_path="t" * 4000, data_path="d" * 4000, presence_fd=0, presence_count=1)
    sent = SessionOptions(tree_path="/t", segments=[segment] * 60, source_name="a")
    assert (
        max(len(datagram) for datagram, _ in setup.encode_session(sent, with_fds=False))
        <= setup.MESSAGE_BYTES
    )


def test_without_descriptors_segments_have_none() -> None:
    assembler = Assembler(with_fds=False)
    for datagram, fds in setup.encode_session(options(3), with_fds=False):
        found = assembler.feed(datagram, fds)
    assert found is not None
    assert [segment.presence_fd for segment in found.segments] == [-1, -1, -1]


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    yield fds
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_refused_message_closes_all_descriptors(descriptors: list[int]) -> None:
    [part, last] = list(setup.encode_session(options(2), with_fds=True))
    assembler = Assembler(with_fds=True)
    assembler.feed(part[0], descriptors[:2])
    with pytest.raises(StateError):
        assembler.feed(last[0], descriptors[2:])  # the last part has no business with descriptors


def test_missing_descriptors_are_refused() -> None:
    [part, _] = list(setup.encode_session(options(2), with_fds=True))
    with pytest.raises(StateError):
        Assembler(with_fds=True).feed(part[0], [])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_state_error(datagram: bytes) -> None:
    with suppress(StateError):
        Assembler(with_fds=False).feed(datagram, [])


@given(st.data())
def test_changed_messages_are_read_or_refused(data: st.DataObject) -> None:
    for datagram, _ in setup.encode_session(options(3), with_fds=False):
        changed = bytearray(datagram)
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        with suppress(StateError):
            Assembler(with_fds=False).feed(bytes(changed), [])


@pytest.mark.parametrize(
    "error", [StateError("a", hint="b"), MountUnavailable("c"), ImageInvalid("d", hint="e")]
)
def test_errors_cross_the_channel(error: P2pgzError) -> None:
    message = setup.decode(setup.encode_failure(error))
    assert isinstance(message, Failed)
    found = setup.to_error(message)
    assert (type(found), found.what, found.hint) == (type(error), error.what, error.hint)


def test_presence_bitmaps_go_in_order() -> None:
    datagrams = list(setup.encode_presence(options(130).segments))
    messages = [setup.decode(datagram) for datagram, _ in datagrams]
    assert [fd for _, fds in datagrams for fd in fds] == list(range(130))
    assert [message.last for message in messages if isinstance(message, setup.PresencePart)] == [
        False,
        False,
        True,
    ]
    [(empty, fds)] = list(setup.encode_presence([]))
    assert setup.decode(empty) == setup.PresencePart([], True)
    assert fds == []


def test_paths_may_be_path_objects() -> None:
    sent = options(0, socket_path=Path("/run/x.sock"))
    [(datagram, fds)] = list(setup.encode_session(sent, with_fds=True))
    found = Assembler(with_fds=True).feed(datagram, fds)
    assert found is not None
    assert found.socket_path == "/run/x.sock"
