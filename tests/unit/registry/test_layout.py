"""OCI layouts and archives: tags, odd documents, paths that lead out, and writing that nobody sees half done."""

import contextlib
import io
import json
import os
import tarfile

import pytest

from p2pgz.core import media
from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_MANIFEST, Descriptor, Manifest, parse_manifest_or_index
from p2pgz.core.reference import parse_reference
from p2pgz.errors import ImageInvalid, ImageNotFound, SourceUnavailable
from p2pgz.registry import RegistryOptions, open_sink, open_source
from p2pgz.testing.conformance_source import SampleImage, describe, push_sample, read_range

pytestmark = pytest.mark.trio
OPTIONS = RegistryOptions()
PLACES = {"layout": "oci:{}/image", "archive": "oci-archive:{}/image.tar"}


async def resolve(text):
    reference = parse_reference(text)
    async with open_source(reference, OPTIONS) as source:
        return await source.resolve(reference)


async def test_images_of_the_vectors_are_read(vectors):
    for tag in ("gz", "esgz", "zstd", "mixed"):
        reference = parse_reference(f"oci:{vectors}/image:{tag}")
        async with open_source(reference, OPTIONS) as source:
            descriptor = await source.resolve(reference)
            manifest = parse_manifest_or_index(await source.document(descriptor), descriptor.media_type)
            assert isinstance(manifest, Manifest)
            config = await source.document(manifest.config)
            assert len(media.parse_config(config, len(manifest.layers)).diff_ids) == len(manifest.layers)
            for layer in manifest.layers:
                assert Digest.of(await read_range(source, layer, 0, layer.size)) == layer.digest


async def test_vectors_as_an_archive(vectors, tmp_path):
    path = tmp_path / "image.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(vectors / "image", arcname=".")
    assert await resolve(f"oci-archive:{path}:esgz") == await resolve(f"oci:{vectors}/image:esgz")


async def test_without_a_tag_there_must_be_one_image(vectors, tmp_path):
    with pytest.raises(ImageNotFound, match="4 images") as caught:
        await resolve(f"oci:{vectors}/image")
    assert "esgz, gz, mixed, zstd" in caught.value.hint
    reference = parse_reference(f"oci:{tmp_path}/one")
    async with open_sink(reference, OPTIONS) as sink:
        stored = await sink.put_document(SampleImage().manifest, OCI_MANIFEST, reference)
    assert (await resolve(str(reference))).digest == stored.digest


def write_layout(folder, index, marker='{"imageLayoutVersion": "1.0.0"}'):
    folder.mkdir()
    (folder / "oci-layout").write_text(marker)
    (folder / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return f"oci:{folder}"


def entry(name, **changes):
    annotations = {media.REF_NAME_ANNOTATION: name}
    found = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(b"x")), "size": 1, "annotations": annotations}
    return {**found, **changes}


async def test_whole_references_as_names_are_understood(tmp_path):
    index = {
        "schemaVersion": 2,
        "manifests": [entry("registry.example/team/app:v1"), entry("registry.example/team/app:v2", size=2)],
    }
    text = write_layout(tmp_path / "image", index)
    assert (await resolve(f"{text}:v2")).size == 2
    with pytest.raises(ImageNotFound):
        await resolve(f"{text}:v3")


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ("", ImageInvalid),
        ("[]", ImageInvalid),
        ({"schemaVersion": 2, "manifests": [entry("v1", digest="sha256:../../../etc/passwd")]}, ImageInvalid),
        ({"schemaVersion": 2, "manifests": [entry("v1", size=-1)]}, ImageInvalid),
        (" " * (media.MAX_MANIFEST_BYTES + 1), ImageInvalid),
        ({"schemaVersion": 2, "manifests": []}, ImageNotFound),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_odd_index_is_refused(tmp_path, index, error):
    text = write_layout(tmp_path / "image", index)
    with pytest.raises(error):
        await resolve(f"{text}:v1")


@pytest.mark.parametrize("marker", ["", "{}", '{"imageLayoutVersion": "2.0.0"}', "[]"])
async def test_other_layout_versions_are_refused(tmp_path, marker):
    text = write_layout(tmp_path / "image", {"schemaVersion": 2, "manifests": []}, marker)
    with pytest.raises(ImageInvalid):
        await resolve(f"{text}:v1")


async def test_what_is_no_layout_is_not_found(tmp_path):
    (tmp_path / "file").write_text("x")
    for text in (
        f"oci:{tmp_path}",
        f"oci:{tmp_path}/none",
        f"oci:{tmp_path}/file",
        f"oci-archive:{tmp_path}/none",
    ):
        with pytest.raises(ImageNotFound):
            await resolve(f"{text}:v1")
    for text in (f"oci-archive:{tmp_path}/file:v1", f"oci-archive:{tmp_path}:v1"):
        with pytest.raises(ImageInvalid):
            await resolve(text)


@pytest.mark.timeout(10)
async def test_fifo_or_directory_in_place_of_a_blob_does_not_hang(tmp_path):
    text = write_layout(tmp_path / "image", {"schemaVersion": 2, "manifests": []})
    folder = tmp_path / "image" / "blobs" / "sha256"
    folder.mkdir(parents=True)
    for name, make in ((b"fifo", os.mkfifo), (b"dir", os.mkdir)):
        make(folder / Digest.of(name).hex)
        async with open_source(parse_reference(text), OPTIONS) as source:
            blob = Descriptor(media_type="x", digest=Digest.of(name), size=5)
            with pytest.raises((ImageNotFound, SourceUnavailable)):
                await source.document(blob)
            with pytest.raises((ImageNotFound, SourceUnavailable)):
                await read_range(source, blob, 0, 5)


def tar_of(tmp_path, members):
    path = tmp_path / "image.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
    return f"oci-archive:{path}"


async def test_archive_members_never_lead_outside(tmp_path):
    (tmp_path / "secret").write_text("secret")
    evil = Digest.of(b"secret")
    text = tar_of(
        tmp_path,
        [
            ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
            ("index.json", b'{"schemaVersion": 2, "manifests": []}'),
            (f"blobs/sha256/{evil.hex}", str(tmp_path / "secret")),
            ("../escaped", b"x"),
            (f"/blobs/sha256/{Digest.of(b'abs').hex}", b"abs"),
        ],
    )
    async with open_source(parse_reference(text), OPTIONS) as source:
        with pytest.raises(ImageNotFound):
            await source.document(Descriptor(media_type="x", digest=evil, size=6))
    async with open_sink(parse_reference(text), OPTIONS) as sink:  # which unpacks what is there
        await sink.put_document(SampleImage().manifest, OCI_MANIFEST, parse_reference(f"{text}:v1"))
    assert not (tmp_path.parent / "escaped").exists()
    assert (await resolve(f"{text}:v1")).size == len(SampleImage().manifest)


async def test_cut_archive_is_refused(tmp_path):
    reference = parse_reference(f"oci-archive:{tmp_path}/image.tar")
    async with open_sink(reference, OPTIONS) as sink:
        await push_sample(sink, reference)
    path = tmp_path / "image.tar"
    whole = path.read_bytes()
    for keep in (100, 600, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises((ImageInvalid, ImageNotFound)):
            await resolve(f"{reference}:v1")
    path.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(ImageInvalid, match="unpacked"):
        await resolve(f"{reference}:v1")


@pytest.mark.parametrize("place", PLACES)
async def test_other_tags_stay_and_nothing_temporary_is_left(tmp_path, place):
    reference = parse_reference(PLACES[place].format(tmp_path))
    async with open_sink(reference, OPTIONS) as sink:
        await push_sample(sink, reference)
    other = SampleImage(large=b"other")
    async with open_sink(reference, OPTIONS) as sink:
        await sink.put_document(other.manifest, OCI_MANIFEST, reference.with_tag("v2"))
        await sink.put_document(other.manifest, OCI_MANIFEST, reference.with_tag("all"))
    assert (await resolve(f"{reference}:v1")).digest == Digest.of(SampleImage().manifest)
    assert (await resolve(f"{reference}:v2")).digest == Digest.of(other.manifest)
    assert (await resolve(f"{reference}:all")).digest == Digest.of(other.manifest)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


async def test_failed_archive_leaves_the_old_one(tmp_path):
    reference = parse_reference(f"oci-archive:{tmp_path}/image.tar")
    async with open_sink(reference, OPTIONS) as sink:
        await push_sample(sink, reference)
    before = (tmp_path / "image.tar").read_bytes()
    with contextlib.suppress(ZeroDivisionError):
        async with open_sink(reference, OPTIONS) as sink:
            await sink.put_document(b"{}", OCI_MANIFEST, reference.with_tag("v3"))
            1 / 0  # noqa: B018  # half way
    assert (tmp_path / "image.tar").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["image.tar"]


@pytest.mark.parametrize("place", PLACES)
async def test_wrong_bytes_are_not_stored(tmp_path, place):
    reference = parse_reference(PLACES[place].format(tmp_path))
    async with open_sink(reference, OPTIONS) as sink:

        async def read():
            yield b"other"

        blob = describe(b"12345", "x")
        with pytest.raises(ImageInvalid):
            await sink.put_blob(blob, read)
        assert not await sink.has_blob(str(blob.digest))


async def test_sink_says_when_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("x")
    for text in (f"oci:{tmp_path}/file", f"oci:{tmp_path}/file/x", f"oci-archive:{tmp_path}/none/image.tar"):
        with pytest.raises(SourceUnavailable, match="cannot be written"):
            async with open_sink(parse_reference(text), OPTIONS):
                pass


@pytest.mark.parametrize("place", PLACES)
async def test_damaged_document_is_refused(tmp_path, place):
    reference = parse_reference(PLACES["layout"].format(tmp_path))
    async with open_sink(reference, OPTIONS) as sink:
        await push_sample(sink, reference)
    manifest = describe(SampleImage().manifest, OCI_MANIFEST)
    path = tmp_path / "image" / "blobs" / "sha256" / manifest.digest.hex
    path.write_bytes(b" " * manifest.size)
    async with open_source(reference, OPTIONS) as source:
        with pytest.raises(ImageInvalid, match="have the digest"):
            await source.document(manifest)
