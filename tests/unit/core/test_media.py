"""Manifests, indexes, configs: every bad document of the vectors gets its verdict, and mutations never crash a parser."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core import media
from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    Descriptor,
    Index,
    Manifest,
    check_document,
    parse_config,
    parse_manifest_or_index,
    select_platform,
)
from p2pgz.core.platform import Platform
from p2pgz.errors import ImageInvalid, ImageNotFound, UsageError

VECTORS = Path(__file__).parents[2] / "vectors"
ITEMS = {
    name: item
    for name, item in json.loads((VECTORS / "bad/expected.json").read_text())["items"].items()
    if item.get("role") in ("manifest", "index", "config")
}
AMD64 = Platform("linux", "amd64")
# Where the vectors allow two answers, ours
REFUSED_BY_CHOICE = {"manifest-dup-keys", "manifest-dup-layers", "manifest-layers-null", "config-other-os"}
TAKEN_BY_CHOICE = {
    "manifest-media-foreign",
    "manifest-media-lie",
    "manifest-no-layers",
    "manifest-annotation-two-tocs",
}


def read(item) -> bytes:
    data = (VECTORS / item["file"]).read_bytes()
    return gzip.decompress(data) if item["file"].endswith(".gz") else data


def open_document(item, data):
    descriptor = Descriptor(
        media_type="",
        digest=Digest.parse(item.get("declared_digest", item["digest"])),
        size=item["size"] + item.get("declared_size_delta", 0),
    )
    check_document(descriptor, data)
    if item["role"] == "config":
        return parse_config(data, 1)
    document = parse_manifest_or_index(data)
    return select_platform(document, AMD64) if item["role"] == "index" else document


@pytest.mark.parametrize("name", ITEMS)
def test_bad_document_gets_its_verdict(name):
    item = ITEMS[name]
    must_reject = (item["must"] == "reject" and name not in TAKEN_BY_CHOICE) or name in REFUSED_BY_CHOICE
    data = read(item)
    if must_reject:
        with pytest.raises((ImageInvalid, ImageNotFound)) as caught:
            open_document(item, data)
        assert len(str(caught.value)) < 500
        return
    found = open_document(item, data)
    if name == "manifest-good":
        assert len(found.layers) == 1
    if name == "manifest-same-layer-twice":
        assert found.layers[0].digest == found.layers[1].digest
    if name == "index-attestation":
        assert found.size == 500
    if name == "index-nested":
        assert found.media_type == media.OCI_INDEX


def test_vectors_are_all_there():
    assert len(ITEMS) >= 45


def test_html_page_says_so():
    with pytest.raises(ImageInvalid, match="HTML"):
        parse_manifest_or_index(b"<!doctype html><html>")


def test_foreign_platforms_are_listed():
    data = read(ITEMS["index-other-platform"])
    with pytest.raises(ImageNotFound, match="plan9/riscv64"):
        select_platform(parse_manifest_or_index(data), AMD64)


def good(**changes) -> bytes:
    document = json.loads(read(ITEMS["manifest-good"]))
    document.update(changes)
    return json.dumps(document).encode()


def test_schema1_is_refused_by_its_content_type_before_parsing():
    with pytest.raises(ImageInvalid, match="schema 1"):
        parse_manifest_or_index(b"not even json", media.SCHEMA1_PREFIX + "prettyjws")


def test_announced_type_must_be_the_documents_own():
    assert isinstance(parse_manifest_or_index(good(), media.OCI_MANIFEST + "; charset=utf-8"), Manifest)
    assert isinstance(parse_manifest_or_index(good(), "text/plain"), Manifest)
    with pytest.raises(ImageInvalid, match="announced"):
        parse_manifest_or_index(good(), media.DOCKER_MANIFEST)


def test_type_follows_announcement_or_lists_when_the_document_is_silent():
    document = json.loads(good())
    del document["mediaType"]
    data = json.dumps(document).encode()
    assert parse_manifest_or_index(data).media_type == media.OCI_MANIFEST
    assert parse_manifest_or_index(data, media.DOCKER_MANIFEST).media_type == media.DOCKER_MANIFEST
    with pytest.raises(ImageInvalid, match="other kind"):
        parse_manifest_or_index(data, media.OCI_INDEX)
    assert isinstance(parse_manifest_or_index(b'{"schemaVersion":2,"manifests":[]}'), Index)


@pytest.mark.parametrize(
    "changes",
    [
        {"schemaVersion": True},
        {"schemaVersion": 2.0},
        {"mediaType": 5},
        {"mediaType": "text/plain"},
        {"annotations": []},
        {"config": []},
        {"layers": [None]},
        {"layers": [{"mediaType": media.OCI_LAYER_TAR, "digest": "sha256:" + "1" * 64, "size": True}]},
        {
            "layers": [
                {"mediaType": media.OCI_LAYER_TAR, "digest": "sha256:" + "1" * 64, "size": 1, "urls": [1]}
            ]
        },
        {"layers": [{"digest": "sha256:" + "1" * 64, "size": 1}]},
    ],
)
def test_wrong_types_are_refused(changes):
    with pytest.raises(ImageInvalid):
        parse_manifest_or_index(good(**changes))


@pytest.mark.parametrize(
    "data",
    [b'\xef\xbb\xbf{"schemaVersion":2}', b'{"schemaVersion":2,"a":"\\ud800"}', b"[" * 10**6, b'{"a":' + b"1" * 10**5 + b"}",
     b'{"schemaVersion":NaN}', b"\xff\xfe{\x00}\x00", b"null", b'"x"'],
)  # fmt: skip
def test_odd_json_is_refused(data):
    with pytest.raises(ImageInvalid):
        parse_manifest_or_index(data)


def index(*platforms: str | None) -> Index:
    entries = tuple(
        Descriptor(
            media_type=media.OCI_MANIFEST,
            digest=Digest.of(bytes([n])),
            size=n,
            platform=Platform.of(*text.split("/")) if text else None,
        )
        for n, text in enumerate(platforms)
    )
    return Index(media_type=media.OCI_INDEX, manifests=entries, annotations={}, digest=Digest.of(b""))


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/arm64", ["linux/amd64", "linux/arm64/v8"], 1),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm64/v9", ["linux/arm64", "linux/arm64/v8.2"], 1),
        ("linux/arm64", ["linux/arm64/v9", "linux/arm64"], 1),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], 1),
        ("linux/arm/v7", ["linux/arm/v6", "linux/arm"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
        ("linux/amd64", [None], 0),
        ("linux/amd64", [None, "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
        ("linux/amd64", [None, None], None),
        ("linux/amd64", ["linux/amd64/v3"], None),
        ("linux/arm64", ["linux/arm", "windows/arm64"], None),
        ("linux/amd64", [], None),
    ],
)
def test_platform_is_selected(wanted, offered, chosen):
    document = index(*offered)
    if chosen is None:
        with pytest.raises(ImageNotFound):
            select_platform(document, Platform.parse(wanted))
    else:
        assert select_platform(document, Platform.parse(wanted)) == document.manifests[chosen]


def test_attestations_are_passed_over():
    document = index("unknown/unknown", None)
    assert select_platform(document, AMD64) == document.manifests[1]
    entry = replace(document.manifests[1], annotations={"vnd.docker.reference.type": "attestation-manifest"})
    with pytest.raises(ImageNotFound):
        select_platform(replace(document, manifests=(entry,)), AMD64)


def test_platform_texts():
    assert Platform.parse("amd64") == AMD64
    assert Platform.for_machine("x86_64") == AMD64
    assert str(Platform.for_machine("aarch64")) == "linux/arm64"
    assert str(Platform.for_machine("armv6l")) == "linux/arm/v6"
    assert Platform.parse("linux/armhf") == Platform.parse("linux/arm/7")
    for text in ("", "a/b/c/d", "linux//x", "linux/amd 64", "linux/" + "x" * 99):
        with pytest.raises(UsageError):
            Platform.parse(text)


def config(**changes) -> bytes:
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]}
    return json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs, **changes}).encode()


def test_config_fields():
    found = parse_config(config(config={"Env": ["A=b"]}, history=[{"created_by": "x"}]), 1)
    assert found.config == {"Env": ["A=b"]}
    assert found.history == ({"created_by": "x"},)
    assert [str(diff_id)[:9] for diff_id in found.diff_ids] == ["sha256:11"]
    assert parse_config(config(config=None, history=None, os="windows"), 1, os="").os == "windows"


@pytest.mark.parametrize(
    "changes",
    [{"rootfs": {"type": "x", "diff_ids": []}}, {"rootfs": []}, {"config": []}, {"config": "x"}, {"history": {}},
     {"history": [1]}, {"os": 1}, {"rootfs": {"type": "layers", "diff_ids": None}}],
)  # fmt: skip
def test_bad_config_is_refused(changes):
    with pytest.raises(ImageInvalid):
        parse_config(config(**changes), 1)


def test_config_above_the_limit_is_refused():
    with pytest.raises(ImageInvalid, match="limit"):
        parse_config(b" " * (media.MAX_CONFIG_BYTES + 1), 1)


SEEDS = [
    read(ITEMS["manifest-good"]),
    read(ITEMS["index-attestation"]),
    config(config={"Env": []}, history=[{}]),
]
KEYS = ["size", "digest", "mediaType", "layers", "config", "rootfs", "urls", "platform", "os", "annotations"]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def parse_all(data: bytes) -> None:
    for parse in (parse_manifest_or_index, lambda data: parse_config(data, 1)):
        try:
            document = parse(data)
            if isinstance(document, Index):
                select_platform(document, AMD64)
        except (ImageInvalid, ImageNotFound):
            pass


@given(st.sampled_from(SEEDS), st.integers(0, 2**32))
@settings(max_examples=150)
def test_mutated_bytes_parse_or_raise_the_named_error(seed, number):
    draw = random.Random(number)
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        data[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 2))
    parse_all(bytes(data))


@given(JUNK, st.sampled_from(["layers", "config", "manifests", "annotations", "rootfs", "history", "os"]))
@settings(max_examples=150)
def test_odd_values_parse_or_raise_the_named_error(value, key):
    for seed in SEEDS:
        document = json.loads(seed)
        document[key] = value
        parse_all(json.dumps(document).encode())
        document[key] = [value]
        parse_all(json.dumps(document).encode())
