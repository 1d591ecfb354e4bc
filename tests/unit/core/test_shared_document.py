"""A layer opened by the document that a peer has of it, without its blob: the same files as by its tail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.tail import Opened, open_document, open_layer_tail, shared_document
from p2pgz.core.toc import (
    CONTAINERS_CHECKSUM_ANNOTATION,
    CONTAINERS_POSITION_ANNOTATION,
    TOC_DIGEST_ANNOTATION,
)
from p2pgz.errors import ImageInvalid

BLOBS = Path(__file__).parents[2] / "vectors" / "blobs"


def opened(path: Path) -> tuple[Opened, dict[str, str], int]:
    """By its tail, with what a manifest would say of it."""
    data = path.read_bytes()
    first = open_layer_tail(data, len(data), {}, allow_unverified=True)
    assert isinstance(first, Opened)
    annotations = {TOC_DIGEST_ANNOTATION: str(Digest.of(first.toc_json))}
    if first.footer.kind == "zstd-containers":
        footer = first.footer
        assert footer.toc_compressed_bytes is not None
        compressed = data[footer.toc_offset : footer.toc_offset + footer.toc_compressed_bytes]
        position = f"{footer.toc_offset}:{footer.toc_compressed_bytes}:{footer.toc_raw_bytes}:1"
        annotations = {
            CONTAINERS_CHECKSUM_ANNOTATION: str(Digest.of(compressed)),
            CONTAINERS_POSITION_ANNOTATION: position,
        }
    again = open_layer_tail(data, len(data), annotations)
    assert isinstance(again, Opened)
    return again, annotations, len(data)


def lazy_blobs() -> list[Path]:
    found = []
    for path in sorted(BLOBS.iterdir()):
        try:
            data = path.read_bytes()
            answer = open_layer_tail(data, len(data), {}, allow_unverified=True)
        except ImageInvalid:
            continue
        if isinstance(answer, Opened):
            found.append(path)
    return found


@pytest.mark.parametrize("path", lazy_blobs(), ids=lambda path: path.name)
def test_document_opens_the_same_layer(path: Path) -> None:
    by_tail, annotations, size = opened(path)
    assert shared_document(annotations) == Digest.of(by_tail.document)
    media_type = "application/vnd.oci.image.layer.v1.tar+" + by_tail.compression
    by_document = open_document(by_tail.document, size, media_type, annotations)
    assert by_document.vouched
    assert by_document.compression == by_tail.compression
    assert json.loads(by_document.toc_json) == json.loads(by_tail.toc_json)
    assert [entry.name for entry in by_document.toc.entries] == [entry.name for entry in by_tail.toc.entries]


def test_layers_without_a_digest_have_no_document() -> None:
    assert shared_document({}) is None
    assert shared_document({CONTAINERS_CHECKSUM_ANNOTATION: str(Digest.of(b""))}) is None
    with pytest.raises(ImageInvalid, match="is not a sha256 digest"):
        shared_document({TOC_DIGEST_ANNOTATION: "sha256:nonsense"})


@pytest.mark.parametrize("position", ["100:7:9:1", "9999999:8:9:1", "one:two"])
def test_position_that_cannot_be_is_refused(position: str) -> None:
    annotations = {
        CONTAINERS_CHECKSUM_ANNOTATION: str(Digest.of(b"x" * 8)),
        CONTAINERS_POSITION_ANNOTATION: position,
    }
    with pytest.raises(ImageInvalid, match=r"position"):
        open_document(b"x" * 8, 1000, "application/vnd.oci.image.layer.v1.tar+zstd", annotations)
