"""`p2pgz demo`, as a newcomer runs it: with FUSE, and where there is none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]


def demo(*prefix):
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "p2pgz", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_program_starts_before_most_of_its_image_is_here():
    result = demo()
    assert result["mounted"]
    assert 0 < result["fetched_bytes"] < result["image_bytes"] / 4
    assert 0 < result["mount_seconds"] < result["first_output_seconds"]
    assert result["requests"] > 0


def test_without_fuse_it_reads_instead():
    # a /dev without the fuse device, as in a plain container
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    result = demo("unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh")
    assert not result["mounted"]
    assert result["fetched_bytes"] > 0
