"""A command without a running node starts one: at the directory that the user meant, or says why it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "P2PGZ_POOL__CHECK_FILESYSTEM": "false",
    "P2PGZ_NODE__EPHEMERAL_LINGER_SECONDS": "0.05",
}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "p2pgz", *arguments]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_relative_state_directory_and_configuration_are_the_callers(tmp_path: Path, vectors: Path) -> None:
    (tmp_path / "own.toml").write_text('version = 1\n[log]\nlevel = "debug"\n')
    done = run(
        tmp_path, "--state-dir", "state", "--config", "own.toml", "ls", f"oci:{vectors / 'image'}:esgz"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state" / "index.db").exists()
    deadline = time.monotonic() + 20
    while (tmp_path / "state" / "api.sock").exists() and time.monotonic() < deadline:
        if "node.idle" in (tmp_path / "state" / "node.log").read_text():
            break
        time.sleep(0.02)


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path, vectors: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(tmp_path, "--state-dir", "file/state", "ls", f"oci:{vectors / 'image'}:esgz")
    assert done.returncode == 15
    assert str(tmp_path / "file" / "state") in done.stderr
    assert "Traceback" not in done.stderr
