"""Whole images through `convert_image`, between stores in memory."""

import json
from pathlib import Path

import pytest
import trio

from p2pgz.convert.convert import ConvertOptions, LayerProgress, convert_image
from p2pgz.convert.layer import LayerOptions
from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
)
from p2pgz.core.platform import Platform
from p2pgz.core.reference import Reference
from p2pgz.core.tail import Opened, open_layer_tail
from p2pgz.core.toc import UNCOMPRESSED_SIZE_ANNOTATION
from p2pgz.errors import ImageInvalid, ImageNotFound, SourceUnavailable
from p2pgz.testing.memory_sink import MemorySink
from p2pgz.testing.memory_source import Fault, MemorySource

pytestmark = pytest.mark.trio
VECTORS = Path(__file__).parents[2] / "vectors"
HERE = Reference(transport="oci", path="here", tag="in")
THERE = Reference(transport="oci", path="there", tag="out")


def descriptor(blob: Descriptor, **more: object) -> dict[str, object]:
    return {"mediaType": blob.media_type, "digest": str(blob.digest), "size": blob.size, **more}


def add_image(store: MemorySource, *sources: str, docker: bool = False, **config: object) -> Descriptor:
    """An image of the vectors' layers; its config has an empty layer in the history as real ones do."""
    layers, diff_ids = [], []
    for source in sources:
        document = json.loads((VECTORS / "expected" / f"{source}.json").read_text())
        media = (
            DOCKER_LAYER_GZIP if docker else OCI_LAYER_ZSTD if "zst" in document["blob"] else OCI_LAYER_GZIP
        )
        blob = store.add((VECTORS / document["blob"]).read_bytes(), media)
        layers.append(descriptor(blob, annotations={"who": "me", **document.get("annotations", {})}))
        diff_ids.append(document["diff_id"])
    history = [{"created_by": f"step {n}"} for n in range(len(sources))] + [
        {"created_by": "ENV x", "empty_layer": True}
    ]
    tree = {
        "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]}, "history": history,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, **config,
    }  # fmt: skip
    config_blob = store.add(json.dumps(tree).encode(), DOCKER_CONFIG if docker else OCI_CONFIG)
    manifest = {
        "schemaVersion": 2, "mediaType": DOCKER_MANIFEST if docker else OCI_MANIFEST, "config": descriptor(config_blob),
        "layers": layers, "annotations": {"kept": "yes"},
    }  # fmt: skip
    return store.add(json.dumps(manifest).encode(), manifest["mediaType"])


async def run(store: MemorySource, image: Descriptor, sink: MemorySink | None = None, **options: object):
    store.tags["in"] = image
    sink = sink or MemorySink()
    layer = {"threads": 1, **{key: options.pop(key) for key in ("format", "prioritized") if key in options}}
    made = await convert_image(
        store, HERE, sink, THERE, ConvertOptions(layer=LayerOptions(**layer), **options)
    )
    assert sink.store.tags["out"].digest == made.descriptor.digest
    return made, sink


def document(sink: MemorySink, digest: object) -> dict[str, object]:
    return json.loads(sink.store.blobs[digest if isinstance(digest, Digest) else Digest.parse(digest)])


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("layer_format", ["estargz", "zstd:chunked", "zstd:chunked-stargz"])
async def test_image_is_converted_and_all_documents_agree(docker: bool, layer_format: str) -> None:
    store = MemorySource()
    image = add_image(store, "basic.gz", "links.gz", docker=docker)
    made, sink = await run(store, image, format=layer_format)
    manifest = document(sink, made.descriptor.digest)
    config = document(sink, manifest["config"]["digest"])
    stays_docker = docker and layer_format == "estargz"
    wanted_layer = (
        OCI_LAYER_ZSTD if layer_format != "estargz" else DOCKER_LAYER_GZIP if docker else OCI_LAYER_GZIP
    )
    assert (
        manifest["mediaType"]
        == made.descriptor.media_type
        == (DOCKER_MANIFEST if stays_docker else OCI_MANIFEST)
    )
    assert manifest["config"]["mediaType"] == (DOCKER_CONFIG if stays_docker else OCI_CONFIG)
    assert manifest["annotations"] == {"kept": "yes"}
    assert config["config"] == {"Env": ["PATH=/bin"]}
    assert len(config["history"]) == 3
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        blob = sink.store.blobs[Digest.parse(layer["digest"])]
        assert (layer["size"], layer["mediaType"], layer["annotations"]["who"]) == (
            len(blob),
            wanted_layer,
            "me",
        )
        assert isinstance(open_layer_tail(blob, len(blob), layer["annotations"]), Opened)
        report = next(report for report in made.layers if str(report.target.digest) == layer["digest"])
        assert report.written is not None
        assert str(report.written.diff_id) == diff_id
        assert layer["annotations"][UNCOMPRESSED_SIZE_ANNOTATION] == str(report.written.stream_bytes)


async def test_layers_that_are_lazy_already_are_kept_unless_forced() -> None:
    store = MemorySource()
    image = add_image(store, "basic.esgz", "links.gz", "names.zsgz")
    before = json.loads(store.blobs[image.digest])["layers"]
    made, sink = await run(store, image)
    after = document(sink, made.descriptor.digest)["layers"]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[2]["mediaType"] == OCI_LAYER_GZIP
    assert "io.containers.zstd-chunked.manifest-checksum" not in after[2]["annotations"]
    assert [report.written is None for report in made.layers] == [True, False, False]
    forced, forced_sink = await run(store, image, force=True)
    assert document(forced_sink, forced.descriptor.digest)["layers"][0] != before[0]
    assert forced.warnings == ()


async def test_second_run_keeps_everything() -> None:
    store = MemorySource()
    first, sink = await run(store, add_image(store, "basic.gz"))
    second, again = await run(sink.store, first.descriptor)
    assert second.descriptor.digest == first.descriptor.digest
    assert again.store.blobs.keys() == {d for d in sink.store.blobs if d in again.store.blobs} != set()


async def test_optimize_moves_files_even_in_lazy_layers() -> None:
    store = MemorySource()
    path = json.loads((VECTORS / "expected" / "tiny.esgz.json").read_text())["chunks"][40]["path"]
    made, sink = await run(
        store, add_image(store, "tiny.esgz"), prioritized=(path.encode(), b"/no/such/file")
    )
    assert made.warnings == ("prioritized '/no/such/file' is in no layer",)
    layer = document(sink, made.descriptor.digest)["layers"][0]
    blob = sink.store.blobs[Digest.parse(layer["digest"])]
    opened = open_layer_tail(blob, len(blob), layer["annotations"])
    assert isinstance(opened, Opened)
    first = {e.name for e in opened.toc.entries for c in e.chunks if c.offset < opened.toc.prefetch_end}
    assert first == {path.encode()}


def add_index(store: MemorySource, media_type: str = OCI_INDEX) -> Descriptor:
    one, other = add_image(store, "basic.gz", "links.gz"), add_image(store, "links.gz", architecture="arm64")
    about = {
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": str(one.digest),
    }
    nested = {"schemaVersion": 2, "mediaType": media_type, "manifests": [descriptor(other)]}
    entries = [
        descriptor(one, platform={"os": "linux", "architecture": "amd64"}, annotations={"a": "b"}),
        descriptor(one, platform={"os": "unknown", "architecture": "unknown"}, annotations=about),
        descriptor(
            store.add(json.dumps(nested).encode(), media_type),
            platform={"os": "linux", "architecture": "arm64"},
        ),
    ]
    index = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    return store.add(json.dumps(index).encode(), media_type)


async def test_index_is_converted_for_all_platforms_and_shared_layers_once() -> None:
    store = MemorySource()
    made, sink = await run(store, add_index(store))
    index = document(sink, made.descriptor.digest)
    assert [(e["platform"]["architecture"], e.get("annotations")) for e in index["manifests"]] == [
        ("amd64", {"a": "b"}),
        ("arm64", None),
    ]
    first = document(sink, index["manifests"][0]["digest"])
    nested = document(sink, index["manifests"][1]["digest"])
    other = document(sink, nested["manifests"][0]["digest"])
    assert first["layers"][1] == other["layers"][0]
    assert len(made.layers) == 2
    assert "was left out" in made.warnings[0]


async def test_one_platform_gives_one_manifest() -> None:
    store = MemorySource()
    index = add_index(store, DOCKER_INDEX)
    made, _ = await run(store, index, platform=Platform.parse("linux/arm64"))
    assert made.descriptor.media_type == OCI_MANIFEST
    with pytest.raises(ImageNotFound):
        await run(store, index, platform=Platform.parse("linux/s390x"))


async def test_foreign_layers_are_kept_untouched() -> None:
    store = MemorySource()
    image = add_image(store, "basic.gz")
    tree = json.loads(store.blobs[image.digest])
    tree["layers"][0] |= {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "urls": ["https://elsewhere.example/x"]
    }  # fmt: skip
    made, _sink = await run(store, store.add(json.dumps(tree).encode(), OCI_MANIFEST))
    assert made.layers[0].written is None
    assert "may not be distributed" in made.warnings[0]


async def test_sink_that_has_a_blob_is_not_sent_it_again() -> None:
    store = MemorySource()
    image = add_image(store, "basic.gz")
    _, sink = await run(store, image)
    count = len(sink.sent)
    await run(store, image, sink)
    assert len(sink.sent) == count == 2


async def test_wrong_and_missing_bytes_are_noticed() -> None:
    store = MemorySource()
    image = add_image(store, "basic.gz")
    layer = Digest.parse(json.loads(store.blobs[image.digest])["layers"][0]["digest"])
    good = store.blobs[layer]
    store.blobs[layer] = good[:-1] + b"?"
    with pytest.raises(ImageInvalid, match="another digest"):
        await run(store, image)
    store.blobs[layer] = good[:-1]
    with pytest.raises(SourceUnavailable, match="ended after"):
        await run(store, image)
    store.blobs[layer] = good
    store.faults.append(Fault(0, None))
    store.faults.clear()
    await run(store, image)


async def test_layer_that_is_no_tar_is_named() -> None:
    store = MemorySource()
    image = add_image(store, "basic.gz")
    tree = json.loads(store.blobs[image.digest])
    junk = store.add(b"no tar at all" * 100, OCI_LAYER_GZIP)
    tree["layers"][0] = descriptor(junk)
    with pytest.raises(ImageInvalid, match=str(junk.digest)):
        await run(store, store.add(json.dumps(tree).encode(), OCI_MANIFEST))


async def test_cancelling_stops_in_the_middle_of_a_layer() -> None:
    store = MemorySource()
    image = store.tags["in"] = add_image(store, "big.gz")
    assert image.size
    seen: list[LayerProgress] = []
    with trio.CancelScope() as scope:

        def report(progress: LayerProgress) -> None:
            seen.append(progress)
            scope.cancel() if progress.state == "download" else None

        await convert_image(store, HERE, MemorySink(), THERE, ConvertOptions(), report=report)
    assert scope.cancelled_caught
    assert all(progress.state == "download" for progress in seen)


async def test_progress_tells_of_every_step() -> None:
    store = MemorySource()
    store.tags["in"] = add_image(store, "basic.gz")
    seen: list[LayerProgress] = []
    await convert_image(store, HERE, MemorySink(), THERE, ConvertOptions(), report=seen.append)
    assert list(dict.fromkeys(progress.state for progress in seen)) == [
        "download",
        "convert",
        "upload",
        "done",
    ]
    assert all(0 < progress.done_bytes <= progress.total_bytes for progress in seen)
