"""The status page in a real browser, of real nodes that give each other an image. `make page` installs what this needs.

With P2PGZ_TEST_IMAGES=DIR the screenshots of the documentation are written there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from p2pgz.cli.demo import roomy_directory
from p2pgz.cli.demo_image import write_layout
from p2pgz.cli.demo_nodes import DemoNode, demo_node, running_registry

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (make page does it)"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (make page does it)"),
]
WAIT_MS = 30_000


class Swarm(NamedTuple):
    seed: DemoNode
    reader: DemoNode
    url: str
    """of the reader's page"""
    reference: str


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    """A seed that has all of an image, another node that has some, and a reader that mounts it."""
    with (
        tempfile.TemporaryDirectory(prefix="p2pgz-page-", dir=roomy_directory()) as name,
        ExitStack() as stack,
    ):
        folder = Path(name)
        registry = stack.enter_context(running_registry(folder / "registry"))
        seed, other, reader = (
            stack.enter_context(demo_node(folder, name)) for name in ("seed", "other", "reader")
        )
        for node, zone in ((seed, "north"), (other, "south"), (reader, "north")):
            (node.folder / "config.toml").write_text(f'version = 1\n[peers]\nzone = "{zone}"\n')
        write_layout(folder / "layout")
        reference = f"{registry.address}/demo/machine:lazy"
        seed("convert", "--json", "--plain-http", f"oci:{folder / 'layout'}:plain", reference)
        seed.join()
        seed("seed", "--plain-http", reference)
        other.join(seed)
        other.read_file(reference)
        reader.join(seed, other)
        reader("mount", "--plain-http", "--no-fill", reference, reader.root)
        [url] = reader.status()["node"]["http"]
        yield Swarm(seed, reader, url, reference)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        yield running.chromium


@pytest.fixture
def page(engine: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong: no script error, nothing that the content policy stops, nothing loaded from
    elsewhere."""
    # one for each test: it starts further processes as it likes
    browser = engine.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme="light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    said: list[str] = []
    asked: list[str] = []
    page.on(
        "console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    browser.close()
    assert [text for text in said if "ERR_CONNECTION_REFUSED" not in text] == []
    assert {url.split("/")[2].partition(":")[0] for url in asked if url.startswith("http")} <= {"127.0.0.1"}


def keep_image(page: Any, name: str) -> None:
    folder = os.environ.get("P2PGZ_TEST_IMAGES")
    if folder:
        page.screenshot(path=str(Path(folder) / name), full_page=True)


def read_large_files(root: Path, wanted: int) -> None:
    """Read files of a mount, the largest first, so many bytes."""
    paths = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    by_size = {
        path.lstat().st_size: path for path in paths if not path.is_symlink()
    }  # copies are one file in the pool
    for _, path in sorted(by_size.items(), reverse=True):
        wanted -= len(path.read_bytes())
        if wanted < 0:
            return


def test_it_shows_who_supplied_what_as_it_happens(swarm: Swarm, page: Any) -> None:
    page.goto(swarm.url)
    page.wait_for_selector("#live.on")
    assert swarm.reference in page.inner_text("#mount-list")
    assert str(swarm.reader.root) in page.inner_text("#mount-list")
    bar = page.locator("#mount-list svg[role=progressbar]")
    first = int(bar.get_attribute("aria-valuenow"))
    read_large_files(swarm.reader.root, 12 << 20)
    page.wait_for_function(
        "before => document.querySelector('#mount-list svg').getAttribute('aria-valuenow') > before + 5",
        arg=first,
    )
    page.wait_for_function("document.querySelector('#from-peer').textContent.includes('MiB')")
    status = swarm.reader.status()
    assert status["sources"]["peer"]["bytes"] > 0
    # each peer has a row, with its whole name in the title, and a place on the map
    ids = {peer["peer_id"] for peer in status["peers"]}
    page.wait_for_function(
        "count => document.querySelectorAll('#peers tbody tr').length === count", arg=len(ids)
    )
    assert {code.get_attribute("title") for code in page.locator("#peers code").all()} == ids
    assert page.locator("#map circle.peer").count() == len(ids)
    page.wait_for_function(
        "/3 members .north: 2, south: 1./.test(document.querySelector('#cluster-line').textContent)"
    )
    zones = {row.inner_text() for row in page.locator("#peers td[data-label=Zone]").all()}
    assert zones == {"north", "south"}
    assert "keeping" in page.inner_text("#pool-state")
    assert page.locator("#events li").count() > 3
    assert "node.ready" in page.inner_text("#events")
    if "P2PGZ_TEST_IMAGES" in os.environ:  # some more points of the curve
        for wanted in (14 << 20, 16 << 20, 18 << 20):
            read_large_files(swarm.reader.root, wanted)
            page.wait_for_timeout(2000)
    keep_image(page, "status-page.png")


def test_it_says_when_the_node_is_gone_and_goes_on_when_it_is_back(swarm: Swarm, page: Any) -> None:
    page.goto(swarm.url)
    page.wait_for_selector("#live.on")
    page.route("**/status", lambda route: route.abort("connectionrefused"))
    page.wait_for_selector("#live.off")
    assert page.inner_text("#live") == "no answer"
    assert swarm.reference in page.inner_text("#mount-list"), "what was known last stays"
    page.unroute("**/status")
    page.wait_for_selector("#live.on")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(swarm: Swarm, page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(swarm.url)
    page.wait_for_selector("#live.on")
    page.wait_for_selector("#peers tbody tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("sources", "swarm", "mounts", "seeds", "pool", "log"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert (
        page.locator("#peers td").first.evaluate("cell => getComputedStyle(cell, '::before').content")
        == '"Peer"'
    )
    keep_image(page, "status-page-phone.png")


def test_the_keyboard_reaches_everything(swarm: Swarm, page: Any) -> None:
    page.goto(swarm.url)
    page.wait_for_selector("#live.on")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "(e => e.id || e.getAttribute('aria-label') || e.getAttribute('href'))(document.activeElement)"
            )
        )
    assert {"pause", "level", "Peers", "Events, newest first", "#swarm", "#log", "/metrics"} <= seen
    page.keyboard.press("p")
    page.wait_for_function("document.querySelector('#live').textContent === 'paused'")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    page.keyboard.press("p")
    page.wait_for_selector("#live.on")
    page.focus("#level")
    page.select_option("#level", "warning")
    assert "node.ready" not in page.inner_text("#events")


def test_names_of_others_are_text(swarm: Swarm, page: Any) -> None:
    """A peer, an image or a log line may be called whatever it likes."""
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"

    def lie(route: Any) -> None:
        with urllib.request.urlopen(f"{swarm.url}status", timeout=20) as answer:
            status = json.load(answer)
        status["mounts"][0] |= {"ref": evil, "dir": evil, "state": "lost", "error": evil}
        status["peers"] = [{**peer, "peer_id": evil, "zone": evil} for peer in status["peers"]]
        status["seeds"] = [
            {"ref": evil, "state": evil, "error": evil, "bytes": 5, "present_bytes": 1, "digest": None}
        ]
        status["pool"] |= {"path": evil, "state": "failing", "error": evil}
        status["config"]["refused"] = evil
        route.fulfill(json=status)

    page.route("**/status", lie)
    page.goto(swarm.url)
    page.wait_for_selector("#live.on")
    assert evil in page.inner_text("#mount-list")
    assert evil in page.inner_text("#alert")
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "p2pgz"


def test_dark_mode_is_readable(swarm: Swarm, page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto(swarm.url)
    page.wait_for_selector("#live.on")
    dark = "e => getComputedStyle(e).backgroundColor.match(/\\d+/g).slice(0, 3).every(part => part < 60)"
    assert page.locator("body").evaluate(dark)
