"""Kernels that cannot do what erofs mode needs: what they say becomes a message with what to do. System calls are stood in
for; kernels that can are in tests/e2e/erofs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from p2pgz.errors import MountUnavailable
from p2pgz.mount import attach
from p2pgz.mount.erofs_mount import make_detached_erofs


def failing(code: int) -> Any:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("call", "code", "hint"),
    [
        ("open_context", errno.ENODEV, "modprobe erofs"),  # no EROFS in this kernel
        ("open_context", errno.EPERM, "--mode tree"),
        (
            "create_and_mount",
            errno.ENOTBLK,
            "does not mount EROFS from files",
        ),  # Linux before 6.12, overlayfs
        ("create_and_mount", errno.EPERM, "CAP_SYS_ADMIN"),
        ("create_and_mount", errno.EINVAL, "--mode tree"),
    ],
)
def test_what_a_kernel_lacks_is_said(
    call: str, code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "open_context", lambda name: os.open(tmp_path, os.O_PATH))
    monkeypatch.setattr(attach, "set_string", lambda *_: None)
    monkeypatch.setattr(attach, "set_flag", lambda *_: None)
    monkeypatch.setattr(attach, "context_messages", lambda fd: "")
    monkeypatch.setattr(attach, call, failing(code))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MountUnavailable) as caught:
        make_detached_erofs(tmp_path / "metadata", [tmp_path / "device"])
    assert hint in (caught.value.hint or "")
    assert os.strerror(code) in caught.value.what
    assert len(os.listdir("/proc/self/fd")) == before
