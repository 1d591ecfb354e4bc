"""An image carried in a file, by real commands between two nodes: one has a registry, the other has nobody.

What a file may be like is tested by `tests/unit/image/test_exports.py`, inventories by the how-to about air gaps.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import FILES, push_converted
from tests.e2e.cli.running import P2pgz, mounted, until

pytestmark = pytest.mark.root


def test_a_host_without_a_registry_takes_an_image_whole_or_not_at_all(
    make_p2pgz: Callable[..., P2pgz], home: Path
) -> None:
    connected, alone = make_p2pgz("connected"), make_p2pgz("alone")
    file = home / "app.export"
    with RegistryThread.running() as registry:
        reference = push_converted(connected, home / "layout", f"{registry.address}/team/app:1", FILES)
        connected.ok("export", "--plain-http", reference, "-o", file)
    assert sorted(path.name for path in home.glob("*.export*")) == ["app.export"]  # no partial one
    data = file.read_bytes()
    alone.start_node()

    # interrupted: the command is killed when the node has taken in half
    with subprocess.Popen(
        alone.command("import", "-"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=alone.environment
    ) as process:
        assert process.stdin is not None
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        owners = until(lambda: [pin["owner"] for pin in alone.status()["pool"]["pins"]], "the first chunks")
        assert owners == ["import"]
        process.send_signal(signal.SIGKILL)
    until(lambda: alone.status()["pool"]["pins"] == [], "the end of the import")
    # cut short
    (home / "half").write_bytes(data[: len(data) // 2])
    assert "copy it again" in alone.fails(12, "import", home / "half")
    alone.fails(13, "ls", reference, "/")
    assert alone.ask("POST", "/v1/import", {"name": "no file"})[-1]["type"] == "ConfigError"

    digest = alone.ok("import", file, "--json").json()["digest"]
    repository = reference.rpartition(":")[0]
    for name in (reference, f"{repository}@{digest}"):
        with mounted(alone, name, home / "root") as shown:
            assert ("cannot be reached" in shown.err) == (name == reference)
            for path, contents in FILES.items():
                assert (home / "root" / path).read_bytes() == contents
    status = alone.status()
    assert [pin["digest"] for pin in status["pool"]["pins"]] == [digest]
    assert status["sources"]["registry"]["bytes"] == 0
