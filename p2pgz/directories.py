"""Where a node keeps things on this host: state directory, sockets, configuration file; and which boot this is.

Called by commands and the node at start. Nothing here reads a configuration: the directories say where it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from p2pgz.errors import ConfigError

SYSTEM_CONFIG = Path("/etc/p2pgz/config.toml")


def default_path(environment: Mapping[str, str], *, root: bool) -> Path:
    """Where the file is looked for when no flag names one."""
    if root:
        return SYSTEM_CONFIG
    home = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "/")) / ".config")
    return Path(home) / "p2pgz" / "config.toml"


def state_dir(flag: str | None, environment: Mapping[str, str], *, root: bool) -> Path:
    """The state directory that selects a node: flag, `P2PGZ_STATE_DIR`, then the system's or the user's default."""
    if chosen := flag or environment.get("P2PGZ_STATE_DIR"):
        return Path(chosen).absolute()
    if root:
        return Path("/var/lib/p2pgz")
    home = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/")) / ".local" / "state")
    return Path(home) / "p2pgz"


def run_dir(flag: str | None, environment: Mapping[str, str], *, root: bool) -> Path:
    """Where the sockets are: the state directory when one is named, otherwise the run-time directory."""
    if flag or environment.get("P2PGZ_STATE_DIR"):
        return state_dir(flag, environment, root=root)
    if root:
        return Path("/run/p2pgz")
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "p2pgz"
    return state_dir(flag, environment, root=root)


def is_root() -> bool:
    """Whether this process may do what only root may: the default of paths and mounts depends on it."""
    return os.geteuid() == 0


def boot_id() -> str:
    """Names this boot of the machine: what was verified in another one is verified again."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def prepare_directories(state_path: Path, run_path: Path) -> None:
    """Make the directories, for the owner only; raises ConfigError that says which one cannot be made."""
    for path in (state_path, run_path):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be made: {error.strerror}", hint="choose another one with --state-dir"
            ) from error
