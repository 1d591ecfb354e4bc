"""containerd's own conformance suite for snapshotters, run on ours by a small Go program; `make containerd` asks for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "snapshots_suite"
TESTS = 21  # of containerd 2.2

pytestmark = [
    pytest.mark.root,
    pytest.mark.go,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get("P2PGZ_TEST_CONTAINERD"), reason="builds containerd's packages: `make containerd`"
    ),
]


def test_containerd_finds_nothing_wrong(cache_dir: Path) -> None:
    program = cache_dir / "snapshots_suite"
    subprocess.run(["go", "test", "-c", "-o", program, "."], cwd=SOURCE, check=True, timeout=600)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="p2pgz-s-") as folder:
        script = Path(folder, "p2pgz")
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m p2pgz "$@"\n')
        script.chmod(0o755)
        done = subprocess.run(
            [program, "-test.v", "-test.root", "-test.parallel", "2"],
            env={**os.environ, "TMPDIR": folder, "P2PGZ": str(script), "P2PGZ_CONTAINERD_SOCKETS": folder},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
        )
    passed = re.findall(r"^ +--- PASS: (\S+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert len(passed) == TESTS
