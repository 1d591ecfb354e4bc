"""The registry that other tests rely on: it answers, it keeps what it has over a restart, and it ends."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import RunningRegistry, docker_registry, running_registry

pytestmark = pytest.mark.registry


def get(address: str, path: str = "/v2/_catalog") -> bytes:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
        return answer.read()


def test_an_empty_registry_answers_and_ends_with_the_block(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "registry") as address:
        assert b'"repositories":[]' in get(address)
    with pytest.raises(OSError, match="refused"):
        get(address)


def test_two_registries_do_not_share_a_port(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "one") as one, docker_registry(tmp_path / "two") as two:
        assert one != two


def test_a_restarted_registry_keeps_its_port_and_counts_requests(tmp_path: Path) -> None:
    with running_registry(tmp_path) as registry:
        before = registry.address
        registry.stop()
        with pytest.raises(OSError, match="refused"):
            get(before)
        registry.start()
        assert registry.address == before
        get(before)
    assert any("/v2/_catalog" in line for line in registry.requests())


def test_a_binary_that_ends_at_once_is_reported_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        RunningRegistry(tmp_path, binary="false").start()
