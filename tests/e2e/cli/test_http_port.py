"""The HTTP port of a real node: what a scraper and a probe get while an image is mounted and read."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import FILES, push_converted
from tests.e2e.cli.running import P2pgz, mounted, until

pytestmark = pytest.mark.root


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.status == 200
        return bytes(answer.read())


def values(text: bytes) -> dict[str, float]:
    """The samples of a scrape."""
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def shown(base: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(fetch(f"{base}status"))
    return document


def test_metrics_and_status_say_where_the_bytes_of_a_mount_came_from(
    p2pgz: P2pgz, registry: RegistryThread, home: Path
) -> None:
    reference = push_converted(p2pgz, home / "image", f"{registry.address}/team/app:1", FILES)
    p2pgz.start_node(
        P2PGZ_FETCH__FILL="false", P2PGZ_PEERS__ENABLED="never", P2PGZ_HTTP__LISTEN="127.0.0.1:0"
    )
    [base] = p2pgz.status()["node"]["http"]
    assert fetch(f"{base}readyz") == b"ready\n"
    before = values(fetch(f"{base}metrics"))
    with mounted(p2pgz, reference, home / "root"):
        name, content = next(iter(FILES.items()))
        assert (home / "root" / name).read_bytes() == content
        # one document serves all who look within half a second: at first it is one from before the mount
        until(lambda: values(fetch(f"{base}metrics"))["p2pgz_mounts"] == 1, "metrics of the mount")
        until(lambda: shown(base)["mounts"][0]["present_bytes"] >= len(content), "the status of the mount")
        after, status = values(fetch(f"{base}metrics")), shown(base)
    [mount] = status["mounts"]
    assert mount["sources"]["registry"] == after['p2pgz_chunk_bytes_total{source="registry"}'] >= len(content)
    assert sum(mount["sources"].values()) == mount["present_bytes"]
    assert after["p2pgz_mounts"] == 1
    assert after['p2pgz_registry_requests_total{code="206"}'] > 0
    waited = 'p2pgz_read_wait_duration_seconds_count{priority="blocked_read"}'
    assert after[waited] > before[waited] == 0
    assert after['p2pgz_chunk_fetch_duration_seconds_count{source="registry"}'] > 0
    assert "node.ready" in {event["event"] for event in json.loads(fetch(f"{base}events"))["events"]}
    assert base in p2pgz.ok("status").out


def test_no_port_where_none_is_wanted(p2pgz: P2pgz) -> None:
    p2pgz.start_node(P2PGZ_HTTP__LISTEN="none", P2PGZ_PEERS__ENABLED="never")
    assert p2pgz.status()["node"]["http"] == []
    p2pgz.stop_node()
    assert "http.listen" in p2pgz.fails(15, "node", "--http", "nonsense", "--no-peers")
