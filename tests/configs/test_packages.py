"""What the packages are made of is there, and their scripts can be run."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from p2pgz.config import load
from p2pgz.directories import SYSTEM_CONFIG

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "configs" / "packages"

pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason="not part of what is installed")


def test_all_files_of_the_packages_are_there() -> None:
    document = yaml.safe_load((PACKAGES / "nfpm.yaml").read_text())
    built = {"${PACKAGE_ROOT}/opt/p2pgz", "${PACKAGE_ROOT}/usr", "/opt/p2pgz/bin/p2pgz"}
    sources = [entry["src"] for entry in document["contents"]] + list(document["scripts"].values())
    assert [src for src in sources if src not in built and not (ROOT / src).exists()] == []
    places = {entry["dst"] for entry in document["contents"]}
    assert str(SYSTEM_CONFIG) in places
    (environment,) = {entry["src"] for entry in document["contents"] if entry["dst"] == "/etc/default/p2pgz"}
    unit = (ROOT / "configs" / "systemd" / "p2pgz.service").read_text()
    assert "EnvironmentFile=-/etc/default/p2pgz" in unit
    assert (ROOT / environment).is_file()


def test_the_configuration_that_is_installed_is_right() -> None:
    path = PACKAGES / "config.toml"
    assert (
        load(path, {}).config == load(None, {}).config
    )  # nothing is set, but what it suggests is right, too
    suggested = "".join(
        line.removeprefix("# ")
        for line in path.read_text().splitlines(keepends=True)
        if " = " in line or "[" in line
    )
    assert tomllib.loads(suggested)["peers"]["cluster_key_file"].startswith("/etc/p2pgz/")


@pytest.mark.parametrize("path", sorted(PACKAGES.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_sound(path: Path) -> None:
    subprocess.run(["sh", "-n", path], check=True)
    text = path.read_text()
    assert text.startswith("#!/bin/sh\n")
    assert "\nset -e\n" in text
    assert path.stat().st_mode & 0o111
