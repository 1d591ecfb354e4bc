"""What registries do wrong, and what becomes of it: the right bytes after all, or an error that says what happened."""

import random
import time
from contextlib import aclosing
from email.utils import formatdate

import pytest
import trio

from p2pgz.core import media
from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_MANIFEST, SIZE_UNKNOWN, Descriptor
from p2pgz.core.reference import parse_reference
from p2pgz.errors import AuthRefused, ImageInvalid, ImageNotFound, SourceUnavailable
from p2pgz.registry import source as source_module
from p2pgz.registry import transport
from p2pgz.testing.conformance_source import read_range
from p2pgz.testing.registry_faults import Fault

pytestmark = pytest.mark.trio
DATA = random.Random(5).randbytes(400_000)
TAG = parse_reference("registry.example/team/app:latest")  # sources look at tag and digest only


async def read(source, blob, start=1000, end=300_000):
    with trio.fail_after(10):
        return await read_range(source, blob, start, end)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(on="GET", status=500),
        Fault(on="GET", status=503, times=3),
        Fault(on="GET", status=429),
        Fault(on="GET", drop_after=-1),
        Fault(on="GET", drop_after=0),
        Fault(on="GET", drop_after=100_000, times=3),
        Fault(on="GET", short_by=1234, times=2),
        Fault(on="GET", ignore_range=True),
        Fault(on="GET", piece_bytes=50_000, pause_seconds=0.001),
        Fault(on="GET", headers={"Content-Range": "bytes 1000-299999/*"}),
    ],
    ids=repr,
)
async def test_bytes_are_right_in_spite_of(opened, fault):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(fault)
        assert await read(source, blob) == DATA[1000:300_000]


async def test_broken_body_goes_on_where_it_stopped(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET", drop_after=100_000))
        assert await read(source, blob) == DATA[1000:300_000]
        ranges = [request.headers.get("range") for request in registry.seen("GET", "blobs")]
        assert ranges[0] == "bytes=1000-299999"
        resumed_at = int(ranges[1].removeprefix("bytes=").partition("-")[0])
        assert 1000 < resumed_at <= 101_000
        assert source.stats.retries == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(on="GET", headers={"Content-Range": "bytes 0-298999/400000"}), "asked for bytes 1000-299999"),
        (Fault(on="GET", headers={"Content-Range": "bytes 1000-399999/400000"}), "asked for bytes"),
        (Fault(on="GET", headers={"Content-Range": "bytes 1000-299999/7"}), "asked for bytes"),
        (Fault(on="GET", headers={"Content-Range": "bytes junk"}), "does not say which part"),
        (Fault(on="GET", without=("content-range",)), "does not say which part"),
        (Fault(on="GET", endless=True), "more than the range"),
        (Fault(on="GET", status=416), "beyond its end"),
        (Fault(on="GET", headers={"Content-Encoding": "gzip"}), "encoding"),
        (Fault(on="GET", ignore_range=True, headers={"Content-Type": "text/html"}), "HTML"),
        (Fault(on="GET", ignore_range=True, body=b"x"), "has 1 bytes there"),
        (Fault(on="GET", status=500, times=99), "status 500"),
        (Fault(on="GET", status=418), "status 418"),
        (Fault(on="GET", drop_after=0, times=99), "connection broke"),
        (Fault(on="GET", drop_after=10, times=99), "connection broke"),
        (Fault(on="GET", short_by=299_000, times=99), "body ended"),
        (Fault(on="GET", status=429, headers={"Retry-After": "3600"}), "come back in 3600 s"),
        (Fault(on="GET", redirect="/v2/team/app/blobs/loop", times=99), "circle"),
        (Fault(on="GET", redirect="ftp://elsewhere/x"), "cannot be asked"),
        (Fault(on="GET", redirect="http://name:password@elsewhere/x"), "cannot be asked"),
        (Fault(on="GET", redirect="http://[::1/x"), "cannot be asked"),
    ],
    ids=repr,
)
async def test_error_says_what_is_wrong(opened, fault, says):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(fault)
        with pytest.raises(SourceUnavailable) as caught:
            await read(source, blob)
        assert says in str(caught.value)
        assert "password" not in str(caught.value)
        assert len(registry.requests) <= 10
        fault.times = 0
        assert await read(source, blob, 5, 9) == DATA[5:9]  # the source is not spoilt for the next call


async def test_endless_redirects_end(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults += [Fault(on="GET", redirect=f"/v2/x/blobs/{n}") for n in range(20)]
        with pytest.raises(SourceUnavailable, match="more than 8 times"):
            await read(source, blob)


async def test_registry_without_ranges_is_not_read_for_gigabytes(opened, monkeypatch, caplog):
    monkeypatch.setattr(source_module, "MAX_SKIP_BYTES", 100_000)
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET", ignore_range=True, times=99))
        assert await read(source, blob, 0, 1000) == DATA[:1000]
        assert await read(source, blob, 99_000, 101_000) == DATA[99_000:101_000]
        with pytest.raises(SourceUnavailable, match="does not answer ranges"):
            await read(source, blob, 300_000, 300_001)


async def test_silent_registry_is_given_up(opened, monkeypatch):
    monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.05)
    from p2pgz.registry import client

    monkeypatch.setattr(client.Wish, "__init__", _with_silence(client.Wish.__init__, 0.05))
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET", silent=True))
        assert await read(source, blob) == DATA[1000:300_000]
        registry.faults.append(Fault(on="GET", silent=True, times=99))
        with pytest.raises(SourceUnavailable, match="silent"):
            await read(source, blob)


def _with_silence(original, seconds):
    return lambda self, **fields: original(self, **fields, silence_seconds=seconds)


async def test_slow_body_can_be_left_at_any_time(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET", piece_bytes=1000, pause_seconds=0.01))
        with trio.move_on_after(0.05) as scope:
            await read(source, blob)
        assert scope.cancelled_caught


async def test_retry_after_is_honoured(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET", status=429, headers={"Retry-After": "1"}))
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, source, blob, 0, 10)
            await trio.sleep(0.2)
            nursery.start_soon(read, source, blob, 10, 20)  # is held back, too
        assert trio.current_time() - started >= 0.9
        assert len(registry.requests) == 3


async def test_retry_after_may_be_a_date(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        late = formatdate(time.time() + 3600, usegmt=True)
        registry.faults.append(Fault(on="GET", status=503, headers={"Retry-After": late}))
        with pytest.raises(SourceUnavailable, match="come back"):
            await read(source, blob)


# tags and documents


async def test_tag_costs_one_head_and_a_digest_nothing(opened):
    async with opened() as (registry, source):
        image = registry.store.add_image("team/app", [b"layer"])
        assert await source.resolve(TAG) == image
        assert [request.method for request in registry.requests] == ["HEAD"]
        by_digest = await source.resolve(TAG.with_digest(image.digest))
        assert by_digest == Descriptor(media_type="", digest=image.digest, size=SIZE_UNKNOWN)
        assert len(registry.requests) == 1
        assert Digest.of(await source.document(by_digest)) == image.digest


@pytest.mark.parametrize(
    "fault",
    [
        Fault(on="HEAD", no_head=True),
        Fault(on="HEAD", without=("docker-content-digest",)),
        Fault(on="HEAD", headers={"Docker-Content-Digest": "md5:1"}),
        Fault(on="HEAD", headers={"Content-Type": "text/plain"}),
    ],
    ids=repr,
)
async def test_tag_is_resolved_by_get_where_head_says_too_little(opened, fault):
    async with opened() as (registry, source):
        image = registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(fault)
        assert await source.resolve(TAG) == image


async def test_wrong_digest_header_is_refused(opened):
    async with opened() as (registry, source):
        registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(Fault(on="HEAD", no_head=True))
        registry.faults.append(Fault(on="GET", headers={"Docker-Content-Digest": str(Digest.of(b"other"))}))
        with pytest.raises(ImageInvalid, match="the registry says"):
            await source.resolve(TAG)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault(on="GET", body=b"x" * 9), ImageInvalid, "has 9 bytes"),
        (Fault(on="GET", endless=True), ImageInvalid, "longer than"),
        (
            Fault(on="GET", body=b"<html>", headers={"Content-Type": "text/html; x=y"}),
            SourceUnavailable,
            "HTML",
        ),
        (Fault(on="GET", headers={"Content-Encoding": "gzip"}), SourceUnavailable, "encoding"),
        (Fault(on="GET", status=404), ImageNotFound, "as ordered"),
        (Fault(on="GET", status=403), AuthRefused, "denied"),
        (Fault(on="GET", status=401, headers={"WWW-Authenticate": "Negotiate"}), AuthRefused, "kind"),
    ],
    ids=repr,
)
async def test_bad_document_is_refused(opened, fault, error, says):
    async with opened() as (registry, source):
        image = registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(fault)
        with trio.fail_after(5), pytest.raises(error) as caught:
            await source.document(image)
        assert says in str(caught.value)


async def test_document_with_other_bytes_of_the_same_length_is_refused(opened):
    async with opened() as (registry, source):
        image = registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(Fault(on="GET", body=b" " * image.size))
        with pytest.raises(ImageInvalid, match="have the digest"):
            await source.document(image)


async def test_document_is_asked_for_again_when_it_breaks_off(opened):
    async with opened() as (registry, source):
        image = registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(Fault(on="GET", drop_after=10, times=2))
        assert Digest.of(await source.document(image)) == image.digest


async def test_huge_documents_are_not_even_asked_for(opened):
    async with opened() as (registry, source):
        for media_type, size in (
            (OCI_MANIFEST, media.MAX_MANIFEST_BYTES),
            ("x", source_module.MAX_DOCUMENT_BYTES),
        ):
            with pytest.raises(ImageInvalid, match="limit"):
                await source.document(Descriptor(media_type=media_type, digest=Digest.of(b""), size=size + 1))
        assert registry.requests == []


# storage behind redirects


async def test_ranges_go_straight_to_storage_after_the_first(opened):
    async with opened() as (registry, source):
        registry.storage = True
        blob = registry.store.add_blob("team/app", DATA)
        for start in (0, 1000, 5000):
            assert await read(source, blob, start, start + 10) == DATA[start : start + 10]
        assert len(registry.seen("GET", server="registry")) == 1
        assert len(registry.seen("GET", server="storage")) == 3


async def test_expired_signature_sends_us_back_to_the_registry(opened):
    async with opened() as (registry, source):
        registry.storage = True
        blob = registry.store.add_blob("team/app", DATA)
        assert await read(source, blob, 0, 10) == DATA[:10]
        registry.expire_signatures()
        assert await read(source, blob, 10, 20) == DATA[10:20]
        assert [request.status for request in registry.seen(server="storage")] == [206, 403, 206]


async def test_signature_that_expires_on_the_way_is_replaced(opened):
    async with opened() as (registry, source):
        registry.storage = True
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET /data", status=403, times=2))
        assert await read(source, blob, 0, 10) == DATA[:10]


async def test_dead_storage_sends_us_back_to_the_registry(opened):
    async with opened() as (registry, source):
        registry.storage = True
        blob = registry.store.add_blob("team/app", DATA)
        assert await read(source, blob, 0, 10) == DATA[:10]
        registry.storage = False
        registry.faults.append(Fault(on="GET /data", drop_after=-1, times=99))
        assert await read(source, blob, 10, 20) == DATA[10:20]


async def test_signed_urls_show_in_no_error(opened):
    async with opened() as (registry, source):
        registry.storage = True
        blob = registry.store.add_blob("team/app", DATA)
        registry.faults.append(Fault(on="GET /data", status=500, times=99))
        with pytest.raises(SourceUnavailable) as caught:
            await read(source, blob)
        error = caught.value
        while error is not None:
            assert "signature" not in repr(error) + str(error)
            error = error.__cause__ or error.__context__


async def test_connections_are_kept(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        for start in range(0, 100_000, 10_000):
            await read(source, blob, start, start + 10_000)
        pool = source._client._ways[0].transport._pools.get(False)
        assert len(pool.connections) == 1
        assert source.stats.requests == 10
        assert source.stats.received_bytes == 100_000


async def test_generator_may_be_closed_half_way(opened):
    async with opened() as (registry, source):
        blob = registry.store.add_blob("team/app", DATA)
        async with aclosing(source._stream(blob, 0, blob.size)) as pieces:
            assert DATA.startswith(await anext(pieces))
