"""The smaller examples: podman's unit, containerd's hosts.toml."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
import pytest

from p2pgz.cli import cli
from p2pgz.registry.hosts import endpoints_for
from p2pgz.registry.options import RegistryOptions

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"

pytestmark = pytest.mark.skipif(not CONFIGS.is_dir(), reason="not part of what is installed")


def test_podmans_unit_starts_what_exists() -> None:
    text = (CONFIGS / "podman" / "p2pgz.container").read_text()
    (words,) = re.findall(r"^Exec=(.+)$", text, re.MULTILINE)
    assert cli.get_command(click.Context(cli), words.split()[0]) is not None
    (dockerfile,) = re.findall(r"-f (\S+)", text)
    assert (ROOT / dockerfile).is_file()
    (state,) = re.findall(r"^Environment=P2PGZ_STATE_DIR=(.+)$", text, re.MULTILINE)
    assert f"Volume={state}:{state}\n" in text
    assert "Volume=/srv/images:/images:rshared\n" in text


def test_the_mirror_is_asked_first_and_the_registry_last(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS / "certs.d", tmp_path, dirs_exist_ok=True)
    found = endpoints_for("docker.io", RegistryOptions(hosts_dir=str(tmp_path)))
    assert [(endpoint.base.host, endpoint.mirror) for endpoint in found] == [
        ("mirror.example", True),
        ("registry-1.docker.io", False),
    ]
