"""Pushing: retries with a new pass over the bytes, mounting, and what the registry stored is checked."""

import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_MANIFEST
from p2pgz.core.reference import parse_reference
from p2pgz.errors import AuthRefused, ImageInvalid, SourceUnavailable
from p2pgz.registry import RegistryOptions, open_sink
from p2pgz.testing.conformance_source import SampleImage, describe, push_sample
from p2pgz.testing.fake_registry import FakeRegistry
from p2pgz.testing.registry_faults import Fault

pytestmark = pytest.mark.trio
DATA = bytes(range(256)) * 4000
BLOB = describe(DATA, "x")


class Passes:
    """Counts the passes over the blob."""

    def __init__(self, data=DATA):
        self.count = 0
        self.data = data

    async def read(self):
        self.count += 1
        for at in range(0, len(self.data), 50_000):
            await trio.lowlevel.checkpoint()
            yield self.data[at : at + 50_000]


@pytest.fixture
async def place(quick):
    async with FakeRegistry.open() as registry:
        reference = parse_reference(f"{registry.address}/team/app:v1")
        async with open_sink(reference, RegistryOptions(plain_http=True), retry=quick) as sink:
            yield registry, sink, reference


@pytest.mark.parametrize(
    "fault",
    [
        Fault(on="POST", status=503, times=2),
        Fault(on="PUT", status=500, times=2),
        Fault(on="PUT", status=404),
        Fault(on="PUT", drop_after=-1),
        Fault(on="POST", drop_after=0),
    ],
    ids=repr,
)
async def test_failed_upload_is_done_again(place, fault):
    registry, sink, _ = place
    registry.faults.append(fault)
    passes = Passes()
    with trio.fail_after(5):
        await sink.put_blob(BLOB, passes.read)
    assert registry.store.blob("team/app", BLOB.digest) == DATA
    assert passes.count >= 1
    assert sink.stats.sent_bytes >= len(DATA)


async def test_upload_that_never_works_ends(place):
    registry, sink, _ = place
    registry.faults.append(Fault(on="PUT", status=500, times=99))
    with trio.fail_after(5), pytest.raises(SourceUnavailable, match="status 500"):
        await sink.put_blob(BLOB, Passes().read)


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", b""])
async def test_blob_of_another_size_is_refused(place, data):
    registry, sink, _ = place
    with pytest.raises(ImageInvalid, match="descriptor says"):
        await sink.put_blob(BLOB, Passes(data).read)
    assert registry.store.blob("team/app", BLOB.digest) is None


async def test_blob_is_mounted_from_another_repository(quick):
    async with FakeRegistry.open() as registry:
        registry.auth, registry.users = "bearer", {"me": "s3cret"}
        registry.store.add_blob("team/base", DATA)
        reference = parse_reference(f"{registry.address}/team/app:v1")
        options = RegistryOptions(plain_http=True, user="me:s3cret")
        async with open_sink(reference, options, mount_from="team/base", retry=quick) as sink:
            passes = Passes()
            await sink.put_blob(BLOB, passes.read)
            assert passes.count == 0
            other = describe(b"other", "x")
            await sink.put_blob(other, Passes(b"other").read)
            assert await sink.has_blob(str(other.digest))


async def test_pull_only_account_is_refused(quick):
    async with FakeRegistry.open() as registry:
        registry.auth, registry.anonymous_pull = "bearer", True
        reference = parse_reference(f"{registry.address}/team/app:v1")
        async with open_sink(reference, RegistryOptions(plain_http=True), retry=quick) as sink:
            with pytest.raises(AuthRefused):
                await sink.put_blob(BLOB, Passes().read)


async def test_manifest_with_missing_blobs_is_refused_by_the_registry(place):
    _, sink, reference = place
    with pytest.raises(SourceUnavailable, match="MANIFEST_BLOB_UNKNOWN"):
        await sink.put_document(SampleImage().manifest, OCI_MANIFEST, reference)


async def test_registry_that_stores_another_manifest_is_caught(place):
    registry, sink, reference = place
    registry.faults.append(
        Fault(on="PUT /v2/team/app/manifests", headers={"Docker-Content-Digest": str(Digest.of(b"?"))})
    )
    with pytest.raises(ImageInvalid, match="stored"):
        await sink.put_document(b'{"layers": []}', OCI_MANIFEST, reference)


async def test_untagged_documents_are_stored_by_digest(place):
    registry, sink, _ = place
    stored = await sink.put_document(b'{"layers": []}', OCI_MANIFEST, None)
    assert stored.digest in registry.store.manifests["team/app"]
    assert registry.store.tags == {}


async def test_upload_elsewhere_gets_no_credentials(quick):
    async with FakeRegistry.open() as registry, FakeRegistry.open() as elsewhere:
        registry.auth, registry.users = "basic", {"me": "s3cret"}
        reference = parse_reference(f"{registry.address}/team/app:v1")
        elsewhere.store.uploads["session"] = bytearray()
        location = f"http://{elsewhere.address}/v2/team/app/blobs/uploads/session?state=x"
        registry.faults.append(Fault(on="POST", skip=1, headers={"Location": location}))
        options = RegistryOptions(plain_http=True, user="me:s3cret")
        async with open_sink(reference, options, retry=quick) as sink:
            await sink.put_blob(BLOB, Passes().read)
        assert elsewhere.store.blob("team/app", BLOB.digest) == DATA
        assert not any("authorization" in request.headers for request in elsewhere.requests)


async def test_whole_image(place):
    registry, sink, reference = place
    await push_sample(sink, reference)
    assert registry.store.tags["team/app", "v1"] == Digest.of(SampleImage().manifest)
