"""The node's metrics: what there is, and how it is read from what the packages count. Written out by `web.scrape`.

Names and labels are stable; labels have few values, never a digest, an image or a peer. docs/reference/http.md lists
METRICS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from p2pgz.core.standing import Fault
from p2pgz.telemetry.histogram import Histogram

SOURCES: Final = ("pool", "peer", "registry")
PRIORITIES: Final = ("blocked_read", "read_ahead", "start_up", "fill")
# what registries answer; anything else by its class
CODES: Final = (
    *(
        "200",
        "201",
        "202",
        "206",
        "301",
        "302",
        "303",
        "307",
        "308",
        "400",
        "401",
        "403",
        "404",
        "408",
        "416",
        "429",
    ),
    *("500", "502", "503", "504", "1xx", "2xx", "3xx", "4xx", "5xx", "none"),
)
LEASE_WAYS: Final = ("fetched", "followed", "direct", "rescued")
POOL_STATES: Final = ("keeping", "full", "failing")


class Measures(NamedTuple):
    """What the node counts, at one moment."""

    status: Mapping[str, Any]
    """the status document"""
    waits: Mapping[str, Histogram]
    chunk_seconds: Mapping[str, Histogram]
    lookup_seconds: Histogram
    flights_shared: int
    corrupt_chunks: Mapping[str, int]
    answers: Counter[int]
    uploads: Mapping[str, int]
    version: str


Sample = tuple[tuple[str, ...], float | Histogram]


class Metric(NamedTuple):
    """One metric. `name` is without the ending that its kind has."""

    name: str
    kind: str
    """counter, gauge or histogram"""
    meaning: str
    labels: Mapping[str, tuple[str, ...]]
    """each with all its values; none listed: one at a time"""
    read: Callable[[Measures], Iterable[Sample]]

    @property
    def full_name(self) -> str:
        """As in PromQL; a histogram's series also end in `_bucket`, `_count` and `_sum`."""
        return f"p2pgz_{self.name}" + ("_total" if self.kind == "counter" else "")


def _at(*path: str) -> Callable[[Measures], Iterable[Sample]]:
    """One number of the status document."""

    def read(measures: Measures) -> Iterable[Sample]:
        value: Any = measures.status
        for name in path:
            value = value[name]
        return [((), float(value or 0))]

    return read


def _each(field: str) -> Callable[[Measures], Iterable[Sample]]:
    """A number of each source."""
    return lambda measures: [((source,), measures.status["sources"][source][field]) for source in SOURCES]


def _many(table: Callable[[Measures], Mapping[str, Any]]) -> Callable[[Measures], Iterable[Sample]]:
    return lambda measures: [((label,), value) for label, value in table(measures).items()]


def _codes(measures: Measures) -> Mapping[str, float]:
    found: Counter[str] = Counter()
    for code, count in measures.answers.items():
        name = str(code) if str(code) in CODES else f"{code // 100}xx" if 100 <= code < 600 else "none"
        found[name] += count
    return dict(found)


def _sum(table: str, field: str) -> Callable[[Measures], Iterable[Sample]]:
    return lambda measures: [((), float(sum(row.get(field) or 0 for row in measures.status[table])))]


def _states(measures: Measures) -> Mapping[str, float]:
    now = measures.status["pool"]["state"]
    return {state: float(state == now) for state in POOL_STATES}


_PLAIN: Final[Mapping[str, tuple[str, ...]]] = {}
_BY_SOURCE: Final = {"source": SOURCES}

METRICS: Final = (
    Metric(
        "build_info",
        "gauge",
        "1, with the version of p2pgz as label",
        {"version": ()},
        lambda m: [((m.version,), 1.0)],
    ),
    Metric("uptime_seconds", "gauge", "time since the node started", _PLAIN, _at("node", "uptime_seconds")),
    Metric(
        "memory_bytes",
        "gauge",
        "memory of the node's process without pages of files",
        _PLAIN,
        _at("node", "memory_bytes"),
    ),
    Metric("open_files", "gauge", "its descriptors", _PLAIN, _at("node", "open_files")),
    Metric("tasks", "gauge", "tasks of its event loop", _PLAIN, _at("node", "tasks")),
    # where bytes come from
    Metric("chunks", "counter", "chunks that each source supplied, verified", _BY_SOURCE, _each("chunks")),
    Metric("chunk_bytes", "counter", "their uncompressed bytes", _BY_SOURCE, _each("bytes")),
    Metric(
        "chunk_fetch_duration_seconds",
        "histogram",
        "from the moment a chunk was asked for first until it was here",
        _BY_SOURCE,
        _many(lambda m: m.chunk_seconds),
    ),
    Metric(
        "chunk_verify_failures",
        "counter",
        "chunks whose bytes had another digest, by who gave them",
        {"source": ("peer", "registry")},
        _many(lambda m: m.corrupt_chunks),
    ),
    Metric(
        "read_wait_duration_seconds",
        "histogram",
        "how long those waited who needed chunks that were not here: reads of mounts and of commands",
        {"priority": PRIORITIES},
        _many(lambda m: m.waits),
    ),
    Metric(
        "flights_shared",
        "counter",
        "chunks asked for that were on their way already",
        _PLAIN,
        lambda m: [((), m.flights_shared)],
    ),
    Metric(
        "registry_requests",
        "counter",
        "HTTP requests to registries, token services and storage, by their answer's status; `none`: no answer",
        {"code": CODES},
        _many(_codes),
    ),
    Metric(
        "registry_received_bytes",
        "counter",
        "bytes of the bodies of answers",
        _PLAIN,
        _at("sources", "registry", "wire_bytes"),
    ),
    # peers
    Metric(
        "peers_connected",
        "gauge",
        "open connections to peers",
        _PLAIN,
        lambda m: [((), len(m.status["peers"]))],
    ),
    Metric(
        "peers_out",
        "gauge",
        "peers that have lost their place for now",
        _PLAIN,
        lambda m: [((), len(m.status["node"]["faulty_peers"]))],
    ),
    Metric(
        "peer_faults",
        "counter",
        "what peers did wrong",
        {"fault": tuple(map(str, Fault))},
        _many(lambda m: m.status["node"]["faults"]),
    ),
    Metric(
        "peer_request_failures",
        "counter",
        "requests to peers that ended without all they asked for",
        _PLAIN,
        _at("sources", "peer", "failures"),
    ),
    Metric(
        "peer_wasted_bytes",
        "counter",
        "bytes of peers that came although they were here already",
        _PLAIN,
        _at("sources", "peer", "wasted_bytes"),
    ),
    Metric(
        "peer_connections_refused",
        "counter",
        "connections of peers that found no room",
        _PLAIN,
        _at("node", "connections_refused"),
    ),
    Metric(
        "identity_twins",
        "counter",
        "how often another host answered with this node's identity",
        _PLAIN,
        _at("node", "identity_twins"),
    ),
    Metric("upload_chunks", "counter", "chunks sent to peers", _PLAIN, lambda m: [((), m.uploads["chunks"])]),
    Metric(
        "upload_bytes",
        "counter",
        "bytes of chunks sent to peers, as they went over the wire",
        _PLAIN,
        lambda m: [((), m.uploads["wire_bytes"])],
    ),
    Metric(
        "upload_uncompressed_bytes",
        "counter",
        "the same before compression",
        _PLAIN,
        lambda m: [((), m.uploads["raw_bytes"])],
    ),
    Metric(
        "upload_busy_answers",
        "counter",
        "requests of peers that were answered BUSY",
        _PLAIN,
        _at("node", "busy_answers"),
    ),
    Metric(
        "dht_lookup_duration_seconds",
        "histogram",
        "looks for providers in the DHT",
        _PLAIN,
        lambda m: [((), m.lookup_seconds)],
    ),
    # mounts and seeds
    Metric(
        "cluster_members",
        "gauge",
        "nodes of the cluster, as far as this one knows",
        _PLAIN,
        _at("cluster", "members"),
    ),
    Metric("cluster_deaths", "counter", "members that were found dead", _PLAIN, _at("cluster", "deaths")),
    Metric(
        "lease_chunks",
        "counter",
        "chunks that were asked for by lease: `fetched` from the registry for all, `followed` from the node that got them, "
        "`direct` from the registry all the same, `rescued` by another node",
        {"how": LEASE_WAYS},
        _many(lambda m: {how: m.status["leases"][f"{how}_chunks"] for how in LEASE_WAYS}),
    ),
    Metric("leases_granted", "counter", "leases that this node granted", _PLAIN, _at("leases", "granted")),
    Metric("mounts", "gauge", "images that are mounted", _PLAIN, lambda m: [((), len(m.status["mounts"]))]),
    Metric(
        "mounts_lost",
        "gauge",
        "mounts that nobody serves any more",
        _PLAIN,
        lambda m: [((), sum(row["state"] == "lost" for row in m.status["mounts"]))],
    ),
    Metric(
        "mount_bytes", "gauge", "uncompressed bytes of the mounted images", _PLAIN, _sum("mounts", "bytes")
    ),
    Metric(
        "mount_present_bytes", "gauge", "how many of them are here", _PLAIN, _sum("mounts", "present_bytes")
    ),
    Metric(
        "seeds",
        "gauge",
        "images that are kept whole for others",
        _PLAIN,
        lambda m: [((), len(m.status["seeds"]))],
    ),
    Metric(
        "seeds_waiting",
        "gauge",
        "seeds that wait after an error",
        _PLAIN,
        lambda m: [((), sum(row["state"] == "waiting" for row in m.status["seeds"]))],
    ),
    Metric("seed_bytes", "gauge", "uncompressed bytes of the seeds", _PLAIN, _sum("seeds", "bytes")),
    Metric(
        "seed_present_bytes", "gauge", "how many of them are here", _PLAIN, _sum("seeds", "present_bytes")
    ),
    # the pool
    Metric("pool_bytes", "gauge", "durable chunk bytes in the pool", _PLAIN, _at("pool", "bytes")),
    Metric("pool_chunks", "gauge", "durable chunks in the pool", _PLAIN, _at("pool", "chunks")),
    Metric(
        "pool_allocated_bytes",
        "gauge",
        "what the pool takes on the disk",
        _PLAIN,
        _at("pool", "allocated_bytes"),
    ),
    Metric(
        "pool_quota_bytes", "gauge", "most that it may take; 0: no limit", _PLAIN, _at("pool", "quota_bytes")
    ),
    Metric("pool_free_bytes", "gauge", "free on its file system", _PLAIN, _at("pool", "free_bytes")),
    Metric(
        "pool_free_floor_bytes",
        "gauge",
        "the pool shrinks while less than this is free",
        _PLAIN,
        _at("pool", "free_floor_bytes"),
    ),
    Metric("pool_pinned_bytes", "gauge", "chunk bytes that may not go", _PLAIN, _at("pool", "pinned_bytes")),
    Metric(
        "pool_state", "gauge", "1 for the state that the pool is in", {"state": POOL_STATES}, _many(_states)
    ),
    Metric("pool_added_chunks", "counter", "chunks added", _PLAIN, _at("pool", "added_chunks")),
    Metric("pool_evictions", "counter", "chunks evicted", _PLAIN, _at("pool", "evicted_chunks")),
    Metric("pool_evicted_bytes", "counter", "their bytes", _PLAIN, _at("pool", "evicted_bytes")),
    Metric(
        "pool_eviction_failures",
        "counter",
        "segments that had to be left alone",
        _PLAIN,
        _at("pool", "eviction_failures"),
    ),
    Metric(
        "pool_unkept_chunks",
        "counter",
        "chunks that were served without being kept",
        _PLAIN,
        _at("pool", "unkept_chunks"),
    ),
    Metric(
        "pool_lost_chunks",
        "counter",
        "chunks on record that were not what they should be",
        _PLAIN,
        _at("pool", "lost_chunks"),
    ),
    Metric(
        "pool_sync_failures",
        "counter",
        "writes that the disk refused to keep",
        _PLAIN,
        _at("pool", "sync_failures"),
    ),
    Metric(
        "pool_scrubbed_bytes",
        "counter",
        "bytes read from the disk and checked",
        _PLAIN,
        _at("pool", "scrubbed_bytes"),
    ),
    Metric(
        "pool_scrub_wrong_chunks",
        "counter",
        "chunks that had changed on the disk",
        _PLAIN,
        _at("pool", "scrub_wrong_chunks"),
    ),
    Metric(
        "config_refused",
        "gauge",
        "1: the configuration that was read last is not in effect",
        _PLAIN,
        lambda m: [((), float(m.status["config"]["refused"] is not None))],
    ),
)
