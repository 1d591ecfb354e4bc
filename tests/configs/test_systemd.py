"""The units are what systemd understands, and start the command that exists with what it understands."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from p2pgz.cli import cli
from p2pgz.directories import run_dir, state_dir

UNITS = Path(__file__).parents[2] / "configs" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))

pytestmark = pytest.mark.skipif(not UNITS.is_dir(), reason="the units are not part of what is installed")


def needs(tool: str) -> pytest.MarkDecorator:
    """Not of `.ci/setup`: a machine without systemd stays so."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed (systemd)")


def directives(path: Path) -> dict[str, str]:
    """The [Service] section; of a directive that is given several times the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd tells Upper from lower
    parser.read(path)
    return dict(parser["Service"])


@needs("systemd-analyze")
@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_systemd_understands_the_unit(path: Path, tmp_path: Path) -> None:
    unit = path.read_text()
    assert "/usr/bin/p2pgz" in unit
    copy = tmp_path / path.name
    copy.write_text(unit.replace("/usr/bin/p2pgz", "/bin/true"))  # it looks whether the program is there
    if path.name == "p2pgz.service":
        drop_in = tmp_path / f"{path.name}.d" / "confined.conf"
        drop_in.parent.mkdir()
        drop_in.write_text((UNITS / "confined.conf").read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", copy],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_the_command_and_its_options_exist(path: Path) -> None:
    words = shlex.split(directives(path)["ExecStart"])
    assert words[0] == "/usr/bin/p2pgz"
    context = click.Context(cli)
    command = cli.get_command(context, words[1])
    assert command is not None
    command.make_context(words[1], words[2:], parent=context, resilient_parsing=True)


def test_the_snapshotter_comes_between_node_and_containerd() -> None:
    text = (UNITS / "p2pgz-snapshotter.service").read_text()
    assert "After=p2pgz.service\n" in text
    assert "Before=containerd.service\n" in text
    assert "Requires=" not in text  # a restart of the node would end it
    assert directives(UNITS / "p2pgz-snapshotter.service")["Type"] == "notify"


NODES = [path for path in SERVICES if "snapshotter" not in path.name]


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_what_survives_and_what_is_watched(path: Path) -> None:
    """The rules of docs/explanation/surviving.md: holder and file systems live on, and systemd keeps their descriptors."""
    service = directives(path)
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "all"  # the holder stores descriptors, and is not the main process
    assert service["KillMode"] == "process"
    assert service["SendSIGKILL"] == "no"
    assert int(service["FileDescriptorStoreMax"]) >= 128
    assert int(service["WatchdogSec"]) >= 30
    if path.name == "p2pgz.service":
        assert service["RuntimeDirectoryPreserve"] == "yes"
        assert f"/var/lib/{service['StateDirectory']}" == str(state_dir(None, {}, root=True))
        assert f"/run/{service['RuntimeDirectory']}" == str(run_dir(None, {}, root=True))


def test_who_mounts_keeps_the_mount_namespace_of_the_host() -> None:
    """Each of these would hide `[[mounts]]` from the host; they are for the drop-in, which says so."""
    hiding = {
        "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectKernelTunables",
        "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset", "ReadWritePaths",
        "ReadOnlyPaths", "InaccessiblePaths", "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "RootDirectory",
        "RootImage", "MountFlags", "DynamicUser",
    }  # fmt: skip
    for name in ("p2pgz.service", "p2pgz-snapshotter.service"):
        assert not hiding & directives(UNITS / name).keys()
    assert hiding & directives(UNITS / "confined.conf").keys()


@needs("systemd-tmpfiles")
def test_the_directories_are_made_for_the_owner_alone(tmp_path: Path) -> None:
    subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "tmpfiles.conf"],
        check=True,
        timeout=60,
    )
    for made in ("var/lib/p2pgz", "run/p2pgz"):
        assert (tmp_path / made).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_the_command(shell: str) -> None:
    """What the packages ship; the script asks the command itself, so it never gets out of date."""
    environment = {"_P2PGZ_COMPLETE": f"{shell}_source", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "p2pgz"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert re.search(rf"_P2PGZ_COMPLETE={shell}_complete", done.stdout)
