"""Whether the machine goes down, as systemd says."""

from __future__ import annotations

from pathlib import Path

import trio


async def system_is_stopping() -> bool:
    """Whether this machine is being shut down: its unmounts are not what the user wants for the next boot."""
    if not Path("/run/systemd/system").is_dir():
        return False
    try:
        done = await trio.run_process(
            ["systemctl", "is-system-running"], capture_stdout=True, capture_stderr=True, check=False
        )
    except OSError:
        return False
    return done.stdout.strip() == b"stopping"
