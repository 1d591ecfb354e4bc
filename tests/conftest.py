"""What all tests share: what this machine can do, what a test may leave behind, and how hypothesis behaves.

A test says what it needs by a marker (`root`, `registry`, `go`, `tools("umoci", ...)`). On a developer's
machine a missing need skips the test and says why. Where `CI` is set, a need that `.ci/setup` installs must
be there: the test fails, since a check that silently never runs is worse than none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
NOT_INSTALLED_BY_SETUP = {
    "go"
}  # a toolchain is not ours to bring; tests that want one stay skipped without it
GOES_AWAY_WITHIN_SECONDS = 5.0  # a process that was told to end may still be ending when its test returns
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if IN_CI else "local")


def pytest_configure() -> None:
    """Hand Ctrl-C on to the processes under test: as a background job we would have inherited that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--not-measured",
        action="store_true",
        help="only what `make coverage` leaves out: slow tests and those of whole processes",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--not-measured"):
        return
    here = Path(__file__).parent

    def is_measured(item: pytest.Item) -> bool:
        top = item.path.relative_to(here).parts[0]
        return top in ("unit", "property") and item.get_closest_marker("slow") is None

    config.hook.pytest_deselected(items=[item for item in items if is_measured(item)])
    items[:] = [item for item in items if not is_measured(item)]


def can_mount() -> str:
    """Empty when this process can make FUSE mounts in its mount namespace, otherwise why not."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror} (modprobe fuse)"
    return ""


def missing_tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return "" if found else f"{name} is not installed (make test as root installs it)"


def unmet_needs(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """The needs of a test that this machine does not meet: name and reason."""
    checks = {
        "root": can_mount,
        "registry": lambda: missing_tool("docker-registry"),
        "go": lambda: missing_tool("go"),
    }
    for name, check in checks.items():
        if item.get_closest_marker(name) and (reason := check()):
            yield name, reason
    for marker in item.iter_markers("tools"):
        for tool in marker.args:
            if reason := missing_tool(tool):
                yield tool, reason


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, reason in unmet_needs(item):
        if IN_CI and name not in NOT_INSTALLED_BY_SETUP:
            pytest.fail(f"{reason}; in CI this is a failure, not a skip", pytrace=False)
        pytest.skip(reason)


def children_of(pid: int) -> set[int]:
    children: set[int] = set()
    with contextlib.suppress(OSError):  # a thread may end while we look
        for task in Path(f"/proc/{pid}/task").iterdir():
            children.update(int(child) for child in (task / "children").read_text().split())
    return children


def descendants() -> set[int]:
    """All processes below this one, orphans included: we are their subreaper."""
    found: set[int] = set()
    new = children_of(os.getpid())
    while new:
        found |= new
        new = {child for pid in new for child in children_of(pid)} - found
    return found


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def counts(pid: int) -> bool:
    """Whether a process left over is a fault; multiprocessing's own tracker lives as long as the session by
    design."""
    return not is_zombie(pid) and "multiprocessing.resource_tracker" not in title(pid)


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
        return f"{pid} ({words or Path(f'/proc/{pid}/comm').read_text().strip()})"
    return str(pid)


def mounts_below(folder: Path) -> set[str]:
    """Mount points below `folder` in this mount namespace, as the kernel spells them."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return {point for point in points if point.startswith(f"{folder}/")}


@pytest.fixture(scope="session")
def adopts_orphans() -> None:
    """Processes whose parent dies become ours, so that a test cannot lose one to init."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(
    request: pytest.FixtureRequest, adopts_orphans: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fails a test that leaves a process running, a zombie or a mount behind, and cleans up after it so that
    the next test starts clean. Fixtures of a wider scope are set up before this one: what they start is
    theirs."""
    folder = tmp_path_factory.getbasetemp()
    processes, mounts = descendants(), mounts_below(folder)
    yield
    deadline = time.monotonic() + GOES_AWAY_WITHIN_SECONDS
    while (left := {pid for pid in descendants() - processes if counts(pid)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    complaints = [f"process {title(pid)} still runs" for pid in sorted(left)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for point in sorted(mounts_below(folder) - mounts, reverse=True):
        complaints.append(f"{point} is still mounted")
        raw = point.encode().decode("unicode_escape").encode("latin-1")  # the kernel writes a space as \\040
        ctypes.CDLL(None).umount2(raw, 2)  # 2 = MNT_DETACH
    for pid in children_of(os.getpid()) - processes:
        with contextlib.suppress(
            ChildProcessError
        ):  # an adopted orphan; a child of subprocess has been waited for
            os.waitpid(pid, 0 if pid in left else os.WNOHANG)
    if complaints:
        pytest.fail("the test left something behind: " + "; ".join(complaints), pytrace=False)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where expensive inputs (built images) are kept between runs: `.cache/` of the tree, ignored by git."""
    folder = Path(os.environ.get("P2PGZ_TEST_CACHE") or Path(__file__).parents[1] / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The test vectors: tests/vectors/README.md says what is what."""
    return Path(__file__).parent / "vectors"
