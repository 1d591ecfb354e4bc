"""Images through files, from one pool into another, with nobody else to ask: whole and verified, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.exportfile import Document, ExportReader, ExportWriter, Head
from p2pgz.core.inventory import read_inventory, write_inventory
from p2pgz.core.media import parse_manifest_or_index
from p2pgz.core.platform import Platform
from p2pgz.core.reference import parse_reference
from p2pgz.core.sharing import Mode, Policy, Rule
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkMissing, ExportInvalid, P2pgzError, PoolFull, StateError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Shares
from p2pgz.image.exporting import inventory, plan_export, write_export
from p2pgz.image.files import read_path
from p2pgz.image.importing import ImageImport
from p2pgz.image.open import ImageOpener
from p2pgz.image.opened import OpenImage
from p2pgz.image.opening import Away
from p2pgz.image.verify import verify_image
from p2pgz.pool.disk import Disk
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN, Segment
from p2pgz.testing.faulty_disk import FaultyDisk
from p2pgz.testing.memory_source import MemorySource
from tests.unit.convert.test_convert import add_image

pytestmark = pytest.mark.trio
PLATFORM = Platform("linux", "amd64")
REFERENCE = parse_reference("registry.example/team/app:1")
LAYERS = ("basic.esgz", "latin1.gz", "latin1.zctr", "hlorder.tar")
SOME_FILE = b"duneviol58.root"


class Host:
    """What of a node opens, exports and imports."""

    def __init__(self, pool: Pool, nursery: trio.Nursery, state: Path, policy: Policy | None) -> None:
        self.pool = pool
        self.fetcher = ChunkFetcher(
            pool, nursery, connections=4, fill_bytes_per_second=0, read_deadline_seconds=5
        )
        self.shares = Shares(policy, state)
        self.opener = ImageOpener(pool, self.fetcher, state, shares=self.shares)
        self.kept: list[Digest] = []

    async def open(self, source: MemorySource) -> OpenImage:
        return await self.opener.open(
            REFERENCE, source, platform=PLATFORM, allow_unverified_toc=False, progress=nothing
        )

    async def export(
        self, image: OpenImage, leave_out: Callable[[Segment, int, bytes], bool] = lambda *_: False
    ) -> bytes:
        export = await plan_export(
            image,
            REFERENCE,
            REFERENCE,
            PLATFORM,
            pool=self.pool,
            shares=self.shares,
            layers=self.opener.layers,
            leave_out=leave_out,
        )
        return b"".join([piece async for piece in write_export(export, self.pool, self.fetcher)])

    async def take(self, data: bytes, *, expected: Digest | None = None) -> OpenImage:
        async def keep(manifest: Digest, segments: list[Segment]) -> None:
            self.kept.append(manifest)
            await trio.lowlevel.checkpoint()

        coming = ImageImport(
            "file",
            pool=self.pool,
            fetcher=self.fetcher,
            opener=self.opener,
            shares=self.shares,
            keep=keep,
            expected=expected,
        )
        for at in range(0, len(data), 10_000):
            await coming.feed(data[at : at + 10_000])
        return await coming.finish()

    async def known(self, digest: Digest) -> OpenImage:
        return await self.opener.open_known(digest, REFERENCE, Away("nobody"), allow_unverified_toc=False)

    def inventory(self) -> frozenset[bytes]:
        pieces = write_inventory(inventory(self.pool, SHARED_DOMAIN, self.pool.segments()))
        return read_inventory(b"".join(pieces), name="inventory")

    async def has_nothing(self, digest: Digest) -> None:
        """No image that anybody could mount."""
        with pytest.raises(StateError, match="is not kept here"):
            await self.known(digest)
        assert self.opener.tags.last(REFERENCE, PLATFORM) is None


async def nothing(_: object) -> None:
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def host(state: Path, policy: Policy | None = None, disk: Disk | None = None) -> AsyncIterator[Host]:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            Pool.open(state, boot_id="boot", check_filesystem=False, disk=disk)
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        yield Host(pool, nursery, state, policy)


def source(*layers: str) -> MemorySource:
    store = MemorySource()
    store.tags["1"] = add_image(store, *layers)
    return store


async def exported(folder: Path, *layers: str, policy: Policy | None = None) -> tuple[bytes, Digest]:
    async with host(folder / "sender", policy) as sender:
        image = await sender.open(source(*layers))
        return await sender.export(image), image.digest


def parts_of(data: bytes) -> list[Head | Document | VerifiedChunk]:
    reader = ExportReader("file")
    parts = list(reader.feed(data))
    reader.finish()
    return parts


def packed(parts: list[Head | Document | VerifiedChunk]) -> bytes:
    """A file of these parts, with counts that are right: what somebody makes who knows the format."""
    writer = ExportWriter()
    chunks = [part for part in parts if isinstance(part, VerifiedChunk)]
    documents = [part for part in parts if isinstance(part, Document)]
    (head,) = [part for part in parts if isinstance(part, Head)]
    head = msgspec.structs.replace(
        head, documents=len(documents), chunks=len(chunks), chunk_bytes=sum(map(len, chunks))
    )
    pieces = [writer.head(head), *(writer.document(part.digest, part.data) for part in documents)]
    return b"".join([*pieces, *map(writer.chunk, chunks), writer.end()])


@pytest.mark.parametrize("mode", [Mode.CLUSTER, Mode.PROOF, Mode.NONE])
async def test_an_image_arrives_whole(tmp_path: Path, mode: Mode) -> None:
    policy = Policy([Rule("registry.example/*", mode)])
    data, digest = await exported(tmp_path, *LAYERS, policy=policy)
    async with host(tmp_path / "receiver", policy) as receiver:
        image = await receiver.take(data, expected=digest)
        assert image.digest == digest
        found = await verify_image(image, receiver.pool, receiver.fetcher, fetch=False, progress=nothing)
        assert (found["missing_chunks"], found["wrong"]) == (0, [])
        assert found["right_chunks"] > 50
        last = receiver.opener.tags.last(REFERENCE, PLATFORM)
        assert last is not None
        assert last.descriptor.digest == digest
        assert receiver.kept == [digest]
    async with host(tmp_path / "receiver", policy) as again:
        image = await again.known(digest)
        assert b"".join([bytes(piece) async for piece in read_path(image, again.fetcher, b"/" + SOME_FILE)])


async def test_what_the_other_side_has_is_left_out(tmp_path: Path) -> None:
    store = source(*LAYERS)
    async with host(tmp_path / "sender") as sender, host(tmp_path / "receiver") as receiver:
        image = await sender.open(store)
        whole = await sender.export(image)
        other = MemorySource()
        other.tags["1"] = add_image(other, "basic.gz")
        await receiver.open(other)  # the same files in a layer that is stored in another way
        has = receiver.inventory()
        data = await sender.export(image, lambda segment, n, chunk: chunk in has)
        head = parts_of(data)[0]
        assert isinstance(head, Head)
        full = parts_of(whole)[0]
        assert isinstance(full, Head)
        assert head.chunks + head.left_out_chunks == full.chunks
        taken = await receiver.take(data)
        found = await verify_image(taken, receiver.pool, receiver.fetcher, fetch=False, progress=nothing)
        assert (found["missing_chunks"], found["wrong"]) == (0, [])
        everything = receiver.inventory()
        data = await sender.export(image, lambda segment, n, chunk: chunk in everything)
        head = parts_of(data)[0]
        assert isinstance(head, Head)
        assert (head.chunks, head.left_out_chunks) == (0, full.chunks)
        assert (await receiver.take(data)).digest == image.digest


@pytest.mark.parametrize("layer", ["basic.esgz", "basic.zctr", "basic.zsgz", "basic.gz"])
async def test_a_layer_that_is_known_by_its_blob_and_one_that_came_in_a_file_are_the_same(
    tmp_path: Path, layer: str
) -> None:
    """Where its last member ends only the footer says, which a file does not have."""
    data, digest = await exported(tmp_path, layer)
    async with host(tmp_path / "receiver") as receiver:
        await receiver.open(source(layer))
        assert (await receiver.take(data)).digest == digest
    other = MemorySource()
    image = add_image(other, layer)
    manifest = other.blobs[image.digest].replace(b'"who": "me"', b'"who": "another"')
    other.tags["1"] = other.add(manifest, image.media_type)  # the same layer, not known by these annotations
    async with host(tmp_path / "other") as receiver:
        await receiver.take(data)
        assert (await receiver.open(other)).digest != digest


async def test_what_was_left_out_and_is_not_there_is_missed(tmp_path: Path) -> None:
    async with host(tmp_path / "sender") as sender:
        image = await sender.open(source("basic.esgz"))
        left: list[bytes] = []

        def leave_out(segment: Segment, n: int, digest: bytes) -> bool:
            left.append(digest)
            return len(left) <= 3

        data = await sender.export(image, leave_out)
    async with host(tmp_path / "receiver") as receiver:
        with pytest.raises(ChunkMissing, match="chunks of its image are neither in it nor in this pool"):
            await receiver.take(data)
        await receiver.has_nothing(image.digest)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
async def test_a_file_that_was_cut_short_leaves_nothing(tmp_path: Path, share: float) -> None:
    data, digest = await exported(tmp_path, *LAYERS[:2])
    async with host(tmp_path / "receiver") as receiver:
        with pytest.raises(ExportInvalid):
            await receiver.take(data[: int(len(data) * share)])
        await receiver.has_nothing(digest)
        assert (await receiver.take(data)).digest == digest  # and the whole one is taken after that


async def refused(folder: Path, data: bytes, digest: Digest, message: str) -> None:
    async with host(folder / "receiver") as receiver:
        with pytest.raises(P2pgzError, match=message) as caught:
            await receiver.take(data)
        assert caught.value.exit_code == 12
        await receiver.has_nothing(digest)


async def test_documents_that_lack_are_named(tmp_path: Path) -> None:
    data, digest = await exported(tmp_path, "basic.esgz", "basic.gz")
    head, *parts = parts_of(data)
    assert isinstance(head, Head)
    documents = [part for part in parts if isinstance(part, Document)]
    assert len(documents) == 4
    for number, lacking in enumerate(documents):
        left = [part for part in parts if part is not lacking]
        await refused(tmp_path / str(number), packed([head, *left]), digest, f"{lacking.digest} is not in it")


async def test_a_chunk_of_another_image_is_refused(tmp_path: Path) -> None:
    data, digest = await exported(tmp_path, "basic.esgz")
    stranger = verify(Digest.of(b"stranger").raw, b"stranger", source="test")
    await refused(tmp_path, packed([*parts_of(data), stranger]), digest, "does not belong to its image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain": {}}, "nothing in it says what is in layer"),
        ({"reference": "oci:dir:tag"}, "is no name in a registry"),
        ({"reference": "Wrong:Name:"}, "Wrong"),
        ({"platform": "a/b/c/d"}, "is not a platform"),
        ({"manifest": str(Digest.of(b"other"))}, "is not in it"),
    ],
)
async def test_a_head_that_lies_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    data, digest = await exported(tmp_path, "basic.gz")
    head, *parts = parts_of(data)
    await refused(tmp_path, packed([msgspec.structs.replace(head, **change), *parts]), digest, message)


async def test_another_manifest_than_the_expected_one_is_refused(tmp_path: Path) -> None:
    data, digest = await exported(tmp_path, "basic.gz")
    async with host(tmp_path / "receiver") as receiver:
        with pytest.raises(ExportInvalid, match="this is another file"):
            await receiver.take(data, expected=Digest.of(b"another"))
        await receiver.has_nothing(digest)


async def test_an_index_of_a_plain_layer_that_lies_is_refused_and_not_remembered(tmp_path: Path) -> None:
    """Every chunk is right, and the document has its digest: only the layer's own stream gives the lie away."""
    data, digest = await exported(tmp_path, "basic.gz")
    head, *parts = parts_of(data)
    assert isinstance(head, Head)
    ((layer, index),) = head.plain.items()
    lie = next(part.data for part in parts if isinstance(part, Document) and str(part.digest) == index)
    assert SOME_FILE in lie
    lie = lie.replace(SOME_FILE, SOME_FILE[::-1], 1)
    head = msgspec.structs.replace(head, plain={layer: str(Digest.of(lie))})
    parts = [Document(Digest.of(lie), lie) if str(part.digest) == index else part for part in parts
             if isinstance(part, Document)] + [part for part in parts if not isinstance(part, Document)]  # fmt: skip
    await refused(tmp_path, packed([head, *parts]), digest, "it does not say what is in the stream")
    async with host(
        tmp_path / "receiver"
    ) as receiver:  # the layer, when it comes from elsewhere, is what it is
        image = await receiver.open(source("basic.gz"))
        assert image.tree.walk(b"/" + SOME_FILE)


async def test_no_room_is_said_and_leaves_no_image(tmp_path: Path) -> None:
    data, digest = await exported(tmp_path, "big.esgz")
    async with host(tmp_path / "receiver", disk=FaultyDisk(room_bytes=100_000)) as receiver:
        with pytest.raises(PoolFull, match="does not fit"):
            await receiver.take(data)
        await receiver.has_nothing(digest)


async def test_a_chunk_that_the_disk_has_spoilt_is_fetched_again_for_the_file(tmp_path: Path) -> None:
    async with host(tmp_path / "sender") as sender:
        image = await sender.open(source("big.esgz"))
        good = await sender.export(image)
        (segment,) = image.layers
        n = max(range(segment.table.chunk_count), key=lambda n: segment.table.size[n])
        with segment.path.open("r+b") as file:
            file.seek(segment.table.segment_offset[n])
            file.write(b"spoilt")
        assert await sender.export(image) == good


async def test_layers_that_nothing_vouches_for_are_not_exported(tmp_path: Path) -> None:
    store = MemorySource()
    image = add_image(store, "basic.sgz")
    store.tags["1"] = image
    manifest = parse_manifest_or_index(store.blobs[image.digest], "", where="test")
    assert manifest is not None
    async with host(tmp_path / "sender") as sender:
        opened = await sender.opener.open(
            REFERENCE, store, platform=PLATFORM, allow_unverified_toc=True, progress=nothing
        )
        with pytest.raises(P2pgzError, match="nothing vouches for its TOC"):
            await sender.export(opened)
