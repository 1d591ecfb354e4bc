"""`p2pgz demo`, as a newcomer runs it: with FUSE, where there is none, and when it is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]
DEMO = [sys.executable, "-m", "p2pgz", "demo"]


def demo(*prefix: str) -> dict[str, Any]:
    done = subprocess.run(
        [*prefix, *DEMO, "--json"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_who_supplied_what(result: dict[str, Any]) -> None:
    first, seed, second, third = result["nodes"]
    assert [node["name"] for node in result["nodes"]] == ["node 1", "seed", "node 2", "node 3"]
    assert first["registry_bytes"] > 0
    assert first["peer_bytes"] == 0
    # what node 1 had read, the seed need not ask the registry for
    assert 0 < seed["registry_bytes"] < result["image_bytes"]
    assert seed["peer_bytes"] > 0
    # the tag is looked up; on a busy machine a peer may be slower than the registry now and then
    assert second["registry_requests"] >= 1
    assert second["registry_bytes"] < first["registry_bytes"] / 4
    assert third["registry_bytes"] == 0
    assert second["peer_bytes"] > 0
    assert third["peer_bytes"] > 0
    assert all(node["first_output_seconds"] > 0 for node in (first, second, third))


def test_a_program_starts_before_its_image_is_here_and_the_nodes_stay_to_be_looked_at() -> None:
    process = subprocess.Popen(
        [*DEMO, "--json", "--stay"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        result = json.loads(process.stdout.readline() or "{}")
        said = ""
        for line in process.stderr:
            said += line
            if "the same in a terminal" in line:
                break
        assert result["mounted"], said
        assert 0 < result["fetched_bytes"] < result["image_bytes"] / 4
        assert 0 < result["mount_seconds"] < result["first_output_seconds"]
        assert result["requests"] > 0
        check_who_supplied_what(result)
        check_things_to_try(said)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def check_things_to_try(said: str) -> None:
    [url] = re.findall(r"open (http://\S+) in a browser", said)
    with urllib.request.urlopen(url, timeout=20) as page:
        assert b"<title>p2pgz" in page.read()
    [why] = re.findall(r"2\. .*(--state-dir .+)", said)
    told = subprocess.run([*DEMO[:-1], *why.split()], capture_output=True, text=True, timeout=60, check=True)
    assert "peer" in told.stdout


def test_without_fuse_it_reads_instead() -> None:
    # a /dev without the fuse device, as in a plain container; nor is there a registry but the built-in one
    hide = (
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
        ' && for found in $(command -v docker-registry); do mount --bind /dev/null "$found"; done'
    )
    result = demo("unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh")
    assert not result["mounted"]
    assert result["fetched_bytes"] > 0
    assert result["registry"] == "the built-in registry"
    check_who_supplied_what(result)


def test_when_interrupted_it_leaves_nothing_behind() -> None:
    before = set(Path("/var/tmp").glob("p2pgz-demo-*"))
    with subprocess.Popen(DEMO, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("a seed starts"):
                process.send_signal(signal.SIGTERM)
                break
        assert "interrupted" in process.stderr.read()
    assert process.returncode == 130
    assert set(Path("/var/tmp").glob("p2pgz-demo-*")) <= before
