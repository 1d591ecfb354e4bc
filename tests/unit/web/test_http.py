"""The HTTP port as strangers find it: names, methods, bodies, heads, slow and idle clients, too many of them."""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from p2pgz.errors import ConfigError, StateError
from p2pgz.telemetry.histogram import Histogram
from p2pgz.web import http, metrics, scrape, site

STATUS = {
    "node": {
        "uptime_seconds": 3.5,
        "memory_bytes": 1,
        "open_files": 2,
        "tasks": 3,
        "faults": {"corrupt": 1, "slow": 2},
        "faulty_peers": [{}],
        "connections_refused": 0,
        "identity_twins": 0,
        "busy_answers": 4,
    },
    "peers": [{}, {}],
    "config": {"refused": None},
    "cluster": {"members": 3, "deaths": 1},
    "leases": {
        "fetched_chunks": 1,
        "followed_chunks": 2,
        "direct_chunks": 0,
        "rescued_chunks": 0,
        "granted": 5,
    },
    "mounts": [
        {"state": "lazy", "bytes": 100, "present_bytes": 40},
        {"state": "lost", "bytes": 1, "present_bytes": 0},
    ],
    "seeds": [{"state": "waiting", "bytes": None, "present_bytes": 0}],
    "pool": {
        **dict.fromkeys(
            (
                *(
                    "bytes",
                    "chunks",
                    "allocated_bytes",
                    "quota_bytes",
                    "free_bytes",
                    "free_floor_bytes",
                    "pinned_bytes",
                ),
                *(
                    "added_chunks",
                    "evicted_chunks",
                    "evicted_bytes",
                    "eviction_failures",
                    "unkept_chunks",
                    "lost_chunks",
                ),
                *("sync_failures", "scrubbed_bytes", "scrub_wrong_chunks"),
            ),
            7,
        ),
        "state": "full",
    },
    "sources": {
        "pool": {"chunks": 1, "bytes": 10},
        "peer": {"chunks": 2, "bytes": 20, "failures": 1, "wasted_bytes": 5},
        "registry": {"chunks": 3, "bytes": 30, "requests": 9, "wire_bytes": 25},
    },
}


def measures(status=STATUS) -> metrics.Measures:
    waits = Histogram()
    waits.observe(0.2)
    return metrics.Measures(
        status=status,
        waits={"blocked_read": waits},
        chunk_seconds={"peer": Histogram()},
        lookup_seconds=Histogram(),
        flights_shared=6,
        corrupt_chunks={"peer": 1, "registry": 0},
        answers=Counter({206: 5, 0: 1, 418: 2, 999: 1}),
        uploads={"chunks": 1, "raw_bytes": 2, "wire_bytes": 1},
        version="1.2.3",
    )


class FakeNode:
    def __init__(self) -> None:
        self.found: list[str] = []
        self.asked = 0
        self.broken = False

    def status(self):
        self.asked += 1
        if self.broken:
            raise RuntimeError("a bug")
        return STATUS

    def measures(self, status):
        return measures(status)

    def problems(self):
        return self.found

    def events(self, after):
        return [{"n": n} for n in range(1, 4) if n > after]


@asynccontextmanager
async def served(node=None, **options):
    app = site.create_site(node or FakeNode(), site.own_names(["seed.example"]))
    listeners = await http.listen("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http.HttpServer(app, **options).run, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def talk(port: int, request: bytes) -> bytes:
    """Everything that the server says until it closes, or falls silent after a whole answer."""
    with trio.fail_after(20):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with suppress(trio.BrokenResourceError):  # it need not hear us out
                await stream.send_all(request)
            return await everything(stream)


async def everything(stream) -> bytes:
    said = b""
    try:
        while piece := await stream.receive_some():
            said += piece
    except trio.BrokenResourceError:
        pass
    return said


def get(
    path: str, *headers: str, host: str = "localhost", method: str = "GET", version: str = "1.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@pytest.mark.trio
async def test_what_there_is_to_see():
    node = FakeNode()
    async with served(node) as port:
        for path, kind, text in (
            ("/status", b"application/json", b'"uptime_seconds":3.5'),
            ("/events?after=1", b"application/json", b'[{"n":2},{"n":3}]'),
            ("/healthz", b"text/plain", b"alive"),
            ("/readyz", b"text/plain", b"ready"),
            ("/", b"text/html", b"<title>"),
            ("/page.js", b"text/javascript", b"fetch("),
            ("/page.css", b"text/css", b"{"),
            ("/icon.svg", b"image/svg+xml", b"<svg"),
        ):
            answer = await talk(port, get(path))
            assert answer.startswith(b"HTTP/1.1 200"), path
            assert kind in answer
            assert text in answer
            assert b"default-src 'none'" in answer
            assert b"x-content-type-options: nosniff" in answer
        node.found = ["starting"]
        answer = await talk(port, get("/readyz"))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"starting" in answer
        assert (await talk(port, get("/status", method="HEAD"))).endswith(b"\r\n\r\n")


@pytest.mark.trio
async def test_many_pages_look_at_one_status_document():
    node = FakeNode()
    async with served(node) as port:
        before = trio.current_time()
        for _ in range(5):
            await talk(port, get("/status"))
        took = trio.current_time() - before
    assert node.asked <= 1 + took / site.STATUS_AGE_SECONDS


@pytest.mark.trio
@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:4802", "127.0.0.1:1", "10.1.2.3", "[::1]:80", "[fe80::1]", "seed.example."],
)
async def test_our_own_names_and_addresses_are_answered(host):
    async with served() as port:
        assert (await talk(port, get("/healthz", host=host))).startswith(b"HTTP/1.1 200")


@pytest.mark.trio
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "localhost:x",
        "[::1",
        "::1@evil",
        "a" * 300,
    ],
)
async def test_a_foreign_name_is_not_answered(host):
    # DNS rebinding: the page of evil.example now resolves to our address
    async with served() as port:
        answer = await talk(port, get("/status", host=host))
        assert answer.startswith(b"HTTP/1.1 421")
        assert b"uptime" not in answer


@pytest.mark.trio
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
async def test_nothing_can_be_changed(method):
    async with served() as port:
        for path in ("/status", "/v1/mounts", "/v1/pool/gc"):
            answer = await talk(
                port, get(path, "Origin: http://evil.example", "Content-Length: 0", method=method)
            )
            assert answer.startswith(b"HTTP/1.1 405"), answer
            assert b"access-control-allow" not in answer.lower()


@pytest.mark.trio
@pytest.mark.parametrize(
    "path",
    [
        *(
            "/../../etc/passwd",
            "/..%2f..%2fetc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//etc/passwd",
            "/static/../page.js",
        ),
        *(
            "/page.js%00.html",
            "/\\..\\etc",
            "/%ff%fe",
            "/page.js/",
            "http://evil.example/status",
            "/v1/status",
            "/%",
        ),
    ],
)
async def test_hostile_paths_find_nothing(path):
    async with served() as port:
        answer = await talk(port, get(path))
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400", b"HTTP/1.1 307")), answer
        assert b"root:" not in answer


@pytest.mark.trio
async def test_two_hosts_a_body_and_a_bad_number_are_refused():
    async with served() as port:
        large = b"x" * 3_000_000  # nobody reads it
        assert (await talk(port, get("/", f"Content-Length: {len(large)}") + large))[9:12] in (b"413", b"")
        assert (await talk(port, get("/", "Host: evil.example")))[9:12] in (b"421", b"400")
        assert (await talk(port, get("/", "Content-Length: 3") + b"abc"))[9:12] == b"413"
        assert (await talk(port, get("/", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n"))[9:12] == b"413"
        assert (await talk(port, get("/events?after=-1")))[9:12] == b"400"
        assert (await talk(port, get("/events?after=" + "9" * 40)))[9:12] == b"400"


@pytest.mark.trio
async def test_a_huge_head_ends_the_connection():
    async with served() as port:
        answer = await talk(
            port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (4 * http.HEAD_MAX_BYTES)
        )
        assert answer[:12] in (b"", b"HTTP/1.1 431", b"HTTP/1.1 400")
        assert (await talk(port, get("/healthz"))).startswith(b"HTTP/1.1 200")


@pytest.mark.trio
@pytest.mark.parametrize(
    "opening",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        get("/status", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n\x00\x00garbage\r\n\r\n",
    ],
)
async def test_other_protocols_are_not_spoken(opening):
    async with served() as port:
        answer = await talk(port, opening)
        assert b"uptime" not in answer
        assert (await talk(port, get("/healthz"))).startswith(b"HTTP/1.1 200")


@pytest.mark.trio
async def test_a_websocket_is_refused():
    async with served() as port:
        upgrade = (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert (await talk(port, upgrade)).startswith(b"HTTP/1.1 403")


async def trickle(stream) -> None:
    while True:  # each byte comes in time; the head never ends
        await stream.send_all(b"G")
        await trio.sleep(0.05)


@pytest.mark.trio
async def test_clients_that_trickle_or_say_nothing_are_left(monkeypatch):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    async with served() as port:
        assert await talk(port, b"") == b""
        with trio.fail_after(20):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            with pytest.raises(trio.BrokenResourceError):
                await trickle(stream)
            await stream.aclose()


@pytest.mark.trio
async def test_an_idle_connection_is_kept_for_a_further_request_and_then_left(monkeypatch):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.5)
    async with served() as port:
        with trio.fail_after(20):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            for _ in range(3):
                await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                said = b""
                while not said.endswith(b"alive\n"):
                    said += await stream.receive_some()
            assert await everything(stream) == b""
            await stream.aclose()


@pytest.mark.trio
async def test_a_client_that_does_not_read_is_left(monkeypatch):
    monkeypatch.setattr(http, "SEND_SECONDS", 0.3)
    node = FakeNode()
    monkeypatch.setattr(node, "status", lambda: {**STATUS, "large": "x" * 20_000_000})
    async with served(node) as port:
        with trio.fail_after(30):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(get("/status"))
            await trio.sleep(1.0)  # what is tested is that the server's patience ends meanwhile
            assert len(await everything(stream)) < 20_000_000
            await stream.aclose()


@pytest.mark.trio
async def test_the_connection_that_is_idle_for_longest_makes_room():
    async with served(connections_max=3) as port:
        with trio.fail_after(20):
            silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
            assert (await talk(port, get("/healthz"))).startswith(b"HTTP/1.1 200")
            assert await everything(silent[0]) == b""
            for stream in silent:
                await stream.aclose()


@pytest.mark.trio
async def test_a_bug_costs_one_answer():
    node = FakeNode()
    node.broken = True
    async with served(node) as port:
        assert (await talk(port, get("/status"))).startswith(b"HTTP/1.1 500")
        node.broken = False
        assert (await talk(port, get("/status"))).startswith(b"HTTP/1.1 200")


@pytest.mark.trio
async def test_where_it_listens():
    async with http.listening("[::1]:0") as listeners:
        assert [url for url in http.addresses(listeners) if url.startswith("http://[::1]:")]
    async with http.listening(":0") as listeners:
        assert any(url.startswith("http://127.0.0.1:") for url in http.addresses(listeners))
    async with http.listening("auto") as one, http.listening("auto") as other:
        [url] = http.addresses(one)
        assert http.addresses(other) != [url]  # several nodes on one machine
        with pytest.raises(StateError, match="cannot be had"):
            await http.listen(url.removeprefix("http://").rstrip("/"))


@pytest.mark.parametrize(
    "text", ["", "4802", "localhost", "localhost:http", "127.0.0.1:70000", "::1:80", "host:-1"]
)
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"http\.listen"):
        http.parse_listen(text)
    assert http.parse_listen("[::1]:80") == ("::1", 80)


# --- metrics


def test_a_scrape_in_both_formats():
    text, media_type = scrape.render(measures(), "text/plain")
    assert media_type.startswith("text/plain")
    assert b'p2pgz_registry_requests_total{code="206"} 5.0' in text
    assert b'p2pgz_registry_requests_total{code="4xx"} 2.0' in text
    assert b'p2pgz_registry_requests_total{code="none"} 2.0' in text
    assert b'p2pgz_read_wait_duration_seconds_bucket{le="0.25",priority="blocked_read"} 1.0' in text
    assert b'p2pgz_pool_state{state="full"} 1.0' in text
    text, media_type = scrape.render(measures(), "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert media_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_every_label_value_of_a_scrape_is_listed_and_there_are_few():
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    known = {metric.full_name: metric for metric in metrics.METRICS}
    assert len(known) == len(metrics.METRICS)
    text, _ = scrape.render(measures(), "application/openmetrics-text; version=1.0.0")
    families = list(text_string_to_metric_families(text.decode()))
    assert len(families) == len(known)
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        metric = known[name]
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label == "le":
                    continue
                assert label in metric.labels, name
                assert value in metric.labels[label] or not metric.labels[label], (name, label, value)
    assert max(len(values) for metric in known.values() for values in metric.labels.values()) < 32
    forbidden = {"digest", "image", "layer", "peer", "peer_id", "reference", "repository", "path"}
    assert not any(forbidden & metric.labels.keys() for metric in known.values())


def test_names_follow_the_conventions():
    for metric in metrics.METRICS:
        assert metric.kind in {"counter", "gauge", "histogram"}
        assert metric.meaning
        assert not metric.name.endswith("_total"), "the kind says so"
        if metric.kind == "histogram":
            assert metric.name.endswith("_seconds")
        if any(word in metric.name for word in ("milliseconds", "_ms", "_mb", "_kb")):
            raise AssertionError(f"{metric.name}: seconds and bytes")
