"""Reading the kernel's list of mounts."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from p2pgz.mount.umount import MountPoint, parse_mountinfo

LINES = """\
22 28 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
94 28 0:59 / /mnt/a\\040dir\\134x ro,nosuid,nodev shared:50 master:2 - fuse.p2pgz registry.example/a:b ro,user_id=0
95 28 259:70000 / /mnt/b ro - ext4 /dev/nvme0n1p1 ro
"""


def test_mounts_are_found_whatever_their_names() -> None:
    assert list(parse_mountinfo(LINES))[1:] == [
        MountPoint(
            94, os.makedev(0, 59), "/mnt/a dir\\x", "fuse.p2pgz", "registry.example/a:b", "ro,nosuid,nodev"
        ),
        MountPoint(95, os.makedev(259, 70000), "/mnt/b", "ext4", "/dev/nvme0n1p1", "ro"),
    ]


@given(st.text(st.sampled_from("0123456789 :-/\\\nabcx,"), max_size=300))
def test_any_text_is_lines_or_nothing(text: str) -> None:
    for mount in parse_mountinfo(text):
        assert mount.directory is not None
