"""Real images in a real registry, for the whole session. A test that uses them carries `needs_images` of its module:

pytestmark = [pytest.mark.root, pytest.mark.registry, pytest.mark.tools("umoci", "skopeo", "debootstrap", "busybox")]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.e2e import lab_images


@pytest.fixture(scope="session")
def lab_layout(cache_dir: Path) -> Path:
    """OCI layout with the images `small` and `redis` (plain gzip layers); built once, half a minute."""
    return lab_images.image_layout(cache_dir)


@pytest.fixture(scope="session")
def lab_registry(lab_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """Debian's docker-registry, plain HTTP, holding `lab/small:gz` and `lab/redis:gz`."""
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        for name in (lab_images.SMALL, lab_images.REDIS):
            lab_images.push(lab_layout, name, f"{registry.address}/lab/{name}:gz")
        yield registry


@pytest.fixture(scope="session")
def unpacked(lab_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The root file systems of both images as umoci unpacks them: what a mount must look like. Not to be written to."""
    return {
        name: lab_images.unpack(lab_layout, name, tmp_path_factory.mktemp("unpacked") / name)
        for name in (lab_images.SMALL, lab_images.REDIS)
    }
