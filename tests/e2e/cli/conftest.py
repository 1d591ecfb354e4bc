"""The `p2pgz` fixtures: a state directory of its own per test, or one running node for a module that mounts many images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2pgz.errors import StateError
from p2pgz.pool.disk import refuse_unfit_file_system
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.cli.running import P2pgz, mounted

VECTORS = Path(__file__).parents[2] / "vectors"


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a disk that a pool may be on: pytest's own, or else one in /var/tmp."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        refuse_unfit_file_system(folder)
    except StateError:
        with tempfile.TemporaryDirectory(prefix="p2pgz-test-", dir="/var/tmp") as other:
            yield Path(other)
        return
    yield folder


@pytest.fixture
def home(disk: Path) -> Path:
    """A new folder on the disk, for everything of one test."""
    return Path(tempfile.mkdtemp(dir=disk))


@pytest.fixture
def make_p2pgz(home: Path) -> Iterator[Callable[..., P2pgz]]:
    """Further state directories, with further environment."""
    made: list[P2pgz] = []

    def make(name: str = "state", **environment: str) -> P2pgz:
        made.append(P2pgz(home / name, **environment))
        return made[-1]

    yield make
    for p2pgz in made:
        p2pgz.close()


@pytest.fixture
def p2pgz(make_p2pgz: Callable[..., P2pgz]) -> P2pgz:
    """A state directory without a node."""
    return make_p2pgz()


def start_node(folder: Path) -> P2pgz:
    """A running node for several tests."""
    p2pgz = P2pgz(folder / "state")
    p2pgz.start_node()
    # the first mount starts the process that all file systems are forked from: it belongs to the fixture, not to a test
    first = Layout(folder / "first").add("first", tar_layer({"file": b"first"}))
    with mounted(p2pgz, first, folder / "root"):
        pass
    return p2pgz


@pytest.fixture(scope="module")
def shared(disk: Path) -> Iterator[P2pgz]:
    """One running node for the module."""
    p2pgz = start_node(Path(tempfile.mkdtemp(dir=disk)))
    yield p2pgz
    p2pgz.close()


@pytest.fixture
def registry() -> Iterator[RegistryThread]:
    """An OCI registry that can be told to lie."""
    with RegistryThread.running() as registry:
        yield registry
