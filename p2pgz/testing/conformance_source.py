"""The contract of an ImageSource as code, and with it that of an ImageSink: what was pushed must come back.

`push_sample` writes `SampleImage` through a sink; then each of `SOURCE_CASES` runs on a source of the same place, which
`base` refers to.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor
from p2pgz.core.ports import ImageSink, ImageSource
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageInvalid, ImageNotFound, P2pgzError
from p2pgz.testing.registry_store import described

TAG = "v1"
INDEX_TAG = "all"
LAYER_BYTES = 700_001  # several pieces everywhere, and no round number


@dataclass(frozen=True)
class SampleImage:
    """One image of a large and an empty-ish layer, the same for all."""

    large: bytes = field(default_factory=lambda: random.Random(7).randbytes(LAYER_BYTES))
    small: bytes = b"x"

    @property
    def layers(self) -> list[Descriptor]:
        return [describe(self.large, OCI_LAYER_GZIP), describe(self.small, OCI_LAYER_GZIP)]

    @property
    def config(self) -> bytes:
        diff_ids = [str(Digest.of(b"1")), str(Digest.of(b"2"))]
        return json.dumps(
            {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        ).encode()

    @property
    def manifest(self) -> bytes:
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described(describe(self.config, OCI_CONFIG)),
            "layers": [described(layer) for layer in self.layers],
        }
        return json.dumps(document).encode()

    @property
    def index(self) -> bytes:
        entry: dict[str, Any] = described(describe(self.manifest, OCI_MANIFEST))
        entry["platform"] = {"os": "linux", "architecture": "amd64"}
        return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()


def describe(data: bytes, media_type: str) -> Descriptor:
    return Descriptor(media_type=media_type, digest=Digest.of(data), size=len(data))


async def push_sample(sink: ImageSink, base: Reference) -> None:
    """Write the sample through a sink, checking what the sink promises on the way."""
    sample = SampleImage()
    config = describe(sample.config, OCI_CONFIG)
    blobs = [*zip(sample.layers, [sample.large, sample.small], strict=True), (config, sample.config)]
    for descriptor, data in blobs:
        assert not await sink.has_blob(str(descriptor.digest))
        await sink.put_blob(descriptor, lambda data=data: _in_pieces(data))  # type: ignore[misc]  # mypy#12557
        assert await sink.has_blob(str(descriptor.digest))
    lie = replace(sample.layers[1], size=2)
    try:
        await sink.put_blob(lie, lambda: _in_pieces(sample.small))
    except P2pgzError:
        pass
    else:
        raise AssertionError("a blob of another size than its descriptor's was taken")
    stored = await sink.put_document(sample.manifest, OCI_MANIFEST, base.with_tag(TAG))
    assert stored == describe(sample.manifest, OCI_MANIFEST)
    await sink.put_document(sample.manifest, OCI_MANIFEST, None)
    await sink.put_document(sample.index, OCI_INDEX, base.with_tag(INDEX_TAG))


async def _in_pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100_000):
        await trio.lowlevel.checkpoint()
        yield data[at : at + 100_000]


async def read_range(source: ImageSource, descriptor: Descriptor, start: int, end: int) -> bytes:
    """A range as one value."""
    async with source.blob(descriptor, start, end) as pieces:
        return b"".join([piece async for piece in pieces])


async def tag_leads_to_the_manifest(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    found = await source.resolve(base.with_tag(TAG))
    assert (found.digest, found.size) == (Digest.of(sample.manifest), len(sample.manifest))
    assert found.media_type == OCI_MANIFEST
    assert await source.document(found) == sample.manifest


async def tag_leads_to_the_index_and_on(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    found = await source.resolve(base.with_tag(INDEX_TAG))
    assert await source.document(found) == sample.index
    assert await source.document(describe(sample.manifest, OCI_MANIFEST)) == sample.manifest


async def digest_leads_to_the_manifest(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    found = await source.resolve(replace(base, tag="", digest=Digest.of(sample.manifest)))
    assert await source.document(found) == sample.manifest


async def unknown_tag_is_not_found(source: ImageSource, base: Reference) -> None:
    await _refuses(ImageNotFound, source.resolve, base.with_tag("nobody"))


async def unknown_digest_is_not_found(source: ImageSource, base: Reference) -> None:
    await _refuses(ImageNotFound, source.document, describe(b"nobody", OCI_CONFIG))
    await _refuses(ImageNotFound, source.document, describe(b"nobody", OCI_MANIFEST))
    await _refuses(ImageNotFound, read_range, source, describe(b"nobody", OCI_LAYER_GZIP), 0, 3)


async def blobs_are_documents_too(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    assert await source.document(describe(sample.config, OCI_CONFIG)) == sample.config


async def wrong_size_is_refused(source: ImageSource, base: Reference) -> None:
    config = describe(SampleImage().config, OCI_CONFIG)
    await _refuses(ImageInvalid, source.document, replace(config, size=config.size - 1))
    await _refuses(ImageInvalid, source.document, replace(config, size=config.size + 1))
    await _refuses(P2pgzError, read_range, source, replace(config, size=config.size + 1), 0, config.size + 1)


async def ranges_are_exact(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    large, small = sample.layers
    draw = random.Random(11)
    ranges = [
        (0, 0),
        (0, 1),
        (0, LAYER_BYTES),
        (LAYER_BYTES - 1, LAYER_BYTES),
        (5, 5),
        (LAYER_BYTES, LAYER_BYTES),
    ]
    for _ in range(10):
        start = draw.randrange(LAYER_BYTES)
        ranges.append((start, draw.randint(start, LAYER_BYTES)))
    for start, end in ranges:
        assert await read_range(source, large, start, end) == sample.large[start:end], (start, end)
    assert await read_range(source, small, 0, 1) == b"x"


async def ranges_outside_are_a_mistake_of_the_caller(source: ImageSource, base: Reference) -> None:
    small = SampleImage().layers[1]
    for start, end in ((-1, 1), (0, 2), (1, 0)):
        await _refuses(ValueError, read_range, source, small, start, end)


async def many_ranges_at_a_time(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    right: list[bool] = []

    async def one(start: int) -> None:
        data = await read_range(source, sample.layers[0], start, start + 5000)
        right.append(data == sample.large[start : start + 5000])

    async with trio.open_nursery() as nursery:
        for start in range(0, 20 * 30_000, 30_000):
            nursery.start_soon(one, start)
    assert right == [True] * 20


async def leaving_early_gives_up_the_rest(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    for _ in range(3):
        async with source.blob(sample.layers[0], 10, LAYER_BYTES) as pieces:
            first = await anext(pieces)
            assert first
            assert sample.large[10:].startswith(first)
    assert await read_range(source, sample.layers[0], 3, 9) == sample.large[3:9]


async def cancelling_is_safe(source: ImageSource, base: Reference) -> None:
    sample = SampleImage()
    with trio.CancelScope() as scope:
        async with source.blob(sample.layers[0], 0, LAYER_BYTES) as pieces:
            async for _ in pieces:
                scope.cancel()
    assert scope.cancelled_caught
    assert await read_range(source, sample.layers[0], 0, LAYER_BYTES) == sample.large


async def _refuses(kind: type[Exception], call: Callable[..., Awaitable[object]], *arguments: object) -> None:
    try:
        await call(*arguments)
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


SOURCE_CASES: list[Callable[[ImageSource, Reference], Awaitable[None]]] = [
    tag_leads_to_the_manifest,
    tag_leads_to_the_index_and_on,
    digest_leads_to_the_manifest,
    unknown_tag_is_not_found,
    unknown_digest_is_not_found,
    blobs_are_documents_too,
    wrong_size_is_refused,
    ranges_are_exact,
    ranges_outside_are_a_mistake_of_the_caller,
    many_ranges_at_a_time,
    leaving_early_gives_up_the_rest,
    cancelling_is_safe,
]
