"""`p2pgz bench` as a process: each part of it on a small image, the picture, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.cli.images import noise
from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.cli.running import P2pgz

pytestmark = [pytest.mark.root, pytest.mark.slow]

USAGE, NOT_FOUND = 2, 10
FILES = {f"d{n % 3}/file{n}": noise(n, 20_000) for n in range(12)}


@pytest.fixture(scope="module")
def image(disk: Path) -> str:
    return Layout(disk / "bench").add("one", tar_layer(FILES))


def left_over(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith("p2pgz-bench-")]


def test_starts_and_reads_are_measured_and_nothing_is_left(
    p2pgz: P2pgz, image: str, home: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "bench.png"
    done = p2pgz.ok(
        "bench", image, "--runs", "1", "--only", "start", "--only", "reads", "--directory", home, "--json",
        "--plot", picture, timeout=120,
    )  # fmt: skip
    result = done.json()
    size = sum(map(len, FILES.values()))
    start = result["start"]
    assert list(start) == ["registry", "peer", "both"]
    assert start["registry"]["peer_bytes"] == 0
    assert start["peer"]["registry_bytes"] == 0
    assert start["peer"]["peer_bytes"] >= size
    assert all(row["ready_seconds"]["median"] >= row["mount_seconds"]["median"] > 0 for row in start.values())
    assert {(row["kind"], row["cold"]) for row in result["reads"]} >= {("tree", False), ("random", True)}
    assert all(row["ratio"] > 0 for row in result["reads"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert left_over(home) == []
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(home) in line]


def test_stages_alone_need_no_image(p2pgz: P2pgz, home: Path) -> None:
    said = p2pgz.ok("bench", "--directory", home).out
    for stage in ("inflate gzip", "sha256", "TLS", "write"):
        assert stage in said
    assert left_over(home) == []


def test_program_without_the_marker_is_an_error_that_shows_its_output(
    p2pgz: P2pgz, image: str, home: Path
) -> None:
    said = p2pgz.fails(
        1, "bench", image, "--run", "x", "--until", "ready", "--only", "start", "--runs", "1",
        "--directory", home, timeout=120,
    )  # fmt: skip
    assert "did not print 'ready'" in said
    assert left_over(home) == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--only", "reads"], "measured with an image"),
        (["oci:nowhere", "--until", "x"], "goes with --run"),
        (["--directory", "/nowhere"], "no such folder"),
        (["--plot", "bench.pdf"], "must end in .png"),
        (["--plot", "/nowhere/bench.png"], "no folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    p2pgz: P2pgz, words: list[str], why: str
) -> None:
    assert why in p2pgz.fails(USAGE, "bench", *words)


def test_image_that_is_not_there(p2pgz: P2pgz, home: Path) -> None:
    p2pgz.fails(NOT_FOUND, "bench", f"oci:{home}:absent", "--only", "start", "--directory", home)
    assert left_over(home) == []
