"""What a node writes down about a mount, and the small decisions behind taking mounts over."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pgz.cli.node import _restart_arguments
from p2pgz.core.digest import Digest
from p2pgz.errors import ResendUnavailable, StateError
from p2pgz.mount import kernel, relink, setup
from p2pgz.mount.records import MountDocument, MountOptions, from_record, to_record
from p2pgz.pool.catalog import MountRecord

DIGEST = Digest.of(b"a manifest")


def test_record_comes_back_as_it_was() -> None:
    document = MountDocument(
        reference="registry.example/a:1",
        options=MountOptions(directory="/mnt/ä", persist=True, fill=False),
        request={"plain_http": True},
        boot_id="b",
    )
    record = to_record("00ff", DIGEST, document)
    assert (record.id, record.directory, record.manifest) == ("00ff", "/mnt/ä", DIGEST)
    assert from_record(record) == document


def test_record_of_a_later_version_is_read_and_nonsense_is_named() -> None:
    def record(options: str) -> MountRecord:
        return MountRecord(id="1", directory="/mnt", manifest=DIGEST, options=options, since=0.0)

    later = '{"reference": "r", "options": {"directory": "/mnt", "colour": "red"}, "more": 1}'
    assert from_record(record(later)).options.directory == "/mnt"
    for text in ("", "{}", "[]", '{"reference": 1, "options": {}}'):
        with pytest.raises(StateError, match="/mnt"):
            from_record(record(text))


def test_socket_names_say_which_mount_they_serve() -> None:
    assert relink.mount_id_of(Path("/run") / relink.socket_name("00ff", "ab12")) == "00ff"
    for name in ("fs-00ff.sock", "holder.sock", "fs--1.sock", "fs-xy-1.sock"):
        assert relink.mount_id_of(Path(name)) == ""


@pytest.mark.parametrize(
    ("release", "works"),
    [
        ("6.18.44-fc", True),
        ("6.9.4", True),
        ("7.0", True),
        ("6.9.3-arch1", False),
        ("6.9", False),
        ("5.15.0-91-generic", False),
    ],
)
def test_resend_is_used_where_the_kernel_is_right(
    release: str, works: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel, "_release", lambda: release)
    with (tmp_path / "device").open("wb") as device:
        if works:
            kernel.resend(device.fileno())
        else:
            with pytest.raises(ResendUnavailable, match="cannot send requests again"):
                kernel.resend(device.fileno())
    assert (tmp_path / "device").stat().st_size == (kernel.OUT_HEADER.size if works else 0)


def test_error_that_asks_for_a_new_mount_keeps_its_class_on_the_way() -> None:
    failed = setup.decode(setup.encode_failure(kernel.no_resend()))
    assert isinstance(failed, setup.Failed)
    assert type(setup.to_error(failed)) is ResendUnavailable


def test_restarted_node_keeps_its_command_line_but_for_what_belonged_to_one_start() -> None:
    line = ["-m", "p2pgz", "--state-dir", "/s", "node", "--ephemeral", "--ready-fd", "5"]
    again = ["-m", "p2pgz", "--state-dir", "/s", "node", "--ephemeral", "--replace-fs"]
    assert _restart_arguments(line) == again
    assert _restart_arguments(again) == again
    assert _restart_arguments([*line[:-2], "--ready-fd=5"]) == again
