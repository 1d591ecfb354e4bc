"""Images for the tests that need a registry: incompressible files, so that every byte has to travel."""

from __future__ import annotations

import random
from pathlib import Path

from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.cli.running import P2pgz

MIB = 1 << 20


def noise(seed: int, size: int = MIB) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


FILES = {f"data/{number}": noise(number) for number in range(4)}


def push_converted(
    p2pgz: P2pgz, folder: Path, target: str, *layers: dict[str, bytes], options: tuple[str, ...] = ()
) -> str:
    """Convert an image of these layers and push it to a registry on loopback; the target again."""
    layout = Layout(folder).add("plain", *[tar_layer(files) for files in layers])
    p2pgz.ok("convert", "--plain-http", *options, layout, target)
    return target
