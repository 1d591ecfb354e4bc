"""A log that cannot be written: a full disk, a closed terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from p2pgz.telemetry.log import Output, set_up


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_a_full_disk_is_no_error_of_who_logs() -> None:
    program = """
import structlog
from p2pgz.telemetry.log import set_up
set_up("info", text=False)
for _ in range(2000):  # more than any buffer
    structlog.get_logger(component="test").warning("test.event", reason="any")
print("went on")
"""
    with Path("/dev/full").open("wb", buffering=0) as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=True
        )
    assert done.stdout == b"went on\n"


class Disk(io.StringIO):
    """Full until it is not."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_lines_that_were_lost_are_told_of_once_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr(sys, "stderr", disk)
    set_up("info", text=False)
    log = structlog.get_logger(component="test")
    log.info("test.first")
    disk.full = True
    for _ in range(3):
        log.info("test.lost")
    disk.full = False
    log.info("test.after")
    log.info("test.last")
    events = [
        (line["event"], line.get("lost_lines")) for line in map(json.loads, disk.getvalue().splitlines())
    ]
    assert events == [("test.first", None), ("test.after", 3), ("test.last", None)]


def test_a_closed_terminal_is_no_error() -> None:
    file = io.StringIO()
    file.close()
    output = Output(file)
    output.write("a line\n")
    output.flush()
    assert output.lost == 1
