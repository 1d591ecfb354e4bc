"""Tags while the registry is well, away, silent or refusing: real HTTP, a real pool, plain layers."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.config import RegistryConfig
from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_CONFIG, OCI_INDEX, OCI_LAYER_TAR
from p2pgz.core.platform import Platform
from p2pgz.core.reference import parse_reference
from p2pgz.errors import AuthRefused, ImageNotFound, P2pgzError, SourceUnavailable, SourceUnreachable
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.open import ImageOpener
from p2pgz.image.opened import OpenImage
from p2pgz.image.tags import LOOK_UP_SECONDS, age
from p2pgz.pool.pool import Pool
from p2pgz.registry.sources import Sources
from p2pgz.testing.fake_registry import FakeRegistry
from p2pgz.testing.registry_faults import Fault
from p2pgz.web.api import MountRequest

pytestmark = pytest.mark.trio
AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
REPOSITORY = "team/app"


@pytest.fixture(autouse=True)
def nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def put_image(
    registry: FakeRegistry, text: str, *, tag: str = "", architecture: str = "amd64"
) -> dict[str, Any]:
    """An image of one plain layer with one file; its entry for an index."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("file")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text.encode()))
    layer = buffer.getvalue()
    config = {
        "os": "linux",
        "architecture": architecture,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    stored = [
        (registry.store.add_blob(REPOSITORY, data), media_type)
        for data, media_type in ((json.dumps(config).encode(), OCI_CONFIG), (layer, OCI_LAYER_TAR))
    ]
    described = [
        {"mediaType": media_type, "digest": str(blob.digest), "size": blob.size}
        for blob, media_type in stored
    ]
    manifest = {"schemaVersion": 2, "config": described[0], "layers": described[1:]}
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    made = registry.store.add_manifest(REPOSITORY, json.dumps(manifest).encode(), tag=tag)
    platform = {"os": "linux", "architecture": architecture}
    return {"mediaType": made.media_type, "digest": str(made.digest), "size": made.size, "platform": platform}


class Host:
    """What of a node opens images."""

    def __init__(self, opener: ImageOpener, sources: Sources, pool: Pool) -> None:
        self.opener, self.sources, self.pool = opener, sources, pool

    async def open(self, reference: str, platform: Platform = AMD64, *, seconds: float = 30.0) -> OpenImage:
        parsed = parse_reference(reference)
        source = await self.sources.get(parsed, MountRequest(reference=reference, plain_http=True))

        async def progress(_: dict[str, Any]) -> None:
            await trio.lowlevel.checkpoint()

        return await self.opener.open(
            parsed,
            source,
            platform=platform,
            allow_unverified_toc=False,
            progress=progress,
            tag_seconds=seconds,
        )


@asynccontextmanager
async def host(state: Path) -> AsyncIterator[Host]:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool.open(state, boot_id="boot", check_filesystem=False))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        fetcher = ChunkFetcher(pool, nursery, connections=4, fill_bytes_per_second=0, read_deadline_seconds=5)
        yield Host(ImageOpener(pool, fetcher, state), Sources(RegistryConfig(), stack), pool)
        nursery.cancel_scope.cancel()


async def test_twenty_mounts_of_a_tag_are_one_look_up_and_one_token(tmp_path: Path) -> None:
    async with FakeRegistry.open() as registry, host(tmp_path / "state") as node:
        put_image(registry, "hello", tag="1")
        registry.auth, registry.anonymous_pull = "bearer", True
        reference = f"{registry.address}/{REPOSITORY}:1"
        opened = []

        async def open_one() -> None:
            opened.append(await node.open(reference))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(open_one)
        assert len({image.digest for image in opened}) == 1
        assert len(opened) == 20
        # the first HEAD is told where tokens are
        assert [seen.status for seen in registry.seen("HEAD")] == [401, 200]
        assert len(registry.seen(server="token")) == 1
        assert len(registry.seen("GET", "/manifests/")) == 1
        assert registry.seen("GET", "/manifests/1") == []


async def test_last_digest_is_used_and_said_to_be_stale_while_nobody_answers(tmp_path: Path) -> None:
    async with host(tmp_path / "state") as node:
        async with FakeRegistry.open() as registry:
            put_image(registry, "hello", tag="1")
            reference = f"{registry.address}/{REPOSITORY}:1"
            first = await node.open(reference)
            assert first.stale_since is None
            assert first.warnings == []
            record = node.pool.catalog.tag(reference, "linux/amd64")
            assert record is not None
        again = await node.open(reference, seconds=0.5)
        assert again.digest == first.digest
        assert again.stale_since == record.resolved
        [warning] = again.warnings
        assert reference in warning
        assert "cannot be reached" in warning
        assert warning.endswith("s ago")
        assert node.pool.catalog.tag(reference, "linux/amd64") == record


async def test_unknown_tag_of_a_registry_that_is_away_says_what_would_help(tmp_path: Path) -> None:
    async with FakeRegistry.open() as registry:
        address = registry.address
    async with host(tmp_path / "state") as node:
        with pytest.raises(SourceUnreachable, match="cannot connect") as caught:
            await node.open(f"{address}/{REPOSITORY}:1")
    assert "by digest" in caught.value.hint


async def test_silent_registry_holds_nobody_who_knows_the_tag(tmp_path: Path) -> None:
    async with FakeRegistry.open() as registry, host(tmp_path / "state") as node:
        put_image(registry, "hello", tag="1")
        reference = f"{registry.address}/{REPOSITORY}:1"
        await node.open(reference)
        registry.faults.append(Fault(silent=True, times=100))
        begun = trio.current_time()
        image = await node.open(reference, seconds=0.2)
        assert image.stale_since is not None
        assert trio.current_time() - begun < 2


async def test_registry_that_was_away_just_now_is_not_waited_for_again(tmp_path: Path) -> None:
    async with FakeRegistry.open() as registry, host(tmp_path / "state") as node:
        put_image(registry, "hello", tag="1")
        reference = f"{registry.address}/{REPOSITORY}:1"
        await node.open(reference)
        registry.faults.append(Fault(silent=True, times=100))
        await node.open(reference, seconds=0.1)
        begun = trio.current_time()
        assert (await node.open(reference, seconds=LOOK_UP_SECONDS)).stale_since is not None
        assert trio.current_time() - begun < LOOK_UP_SECONDS / 2
        registry.faults.clear()
        put_image(registry, "other", tag="1")
        assert (await node.open(reference, seconds=LOOK_UP_SECONDS)).stale_since is None


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, None),
        (503, None),
        (401, AuthRefused),
        (403, AuthRefused),
        (404, ImageNotFound),
        (429, SourceUnavailable),
    ],
)
async def test_only_a_registry_that_cannot_answer_is_not_believed(
    tmp_path: Path, status: int, error: type[P2pgzError] | None
) -> None:
    async with FakeRegistry.open() as registry, host(tmp_path / "state") as node:
        put_image(registry, "hello", tag="1")
        reference = f"{registry.address}/{REPOSITORY}:1"
        await node.open(reference)
        # a 429 that asks for more than we wait for; a 401 without a challenge that could be met
        headers = {"Retry-After": "3600"} if status in (429, 503) else {}
        registry.faults.append(Fault(status=status, headers=headers, times=100))
        if error is None:
            assert (await node.open(reference, seconds=0.3)).stale_since is not None
        else:
            with pytest.raises(error) as caught:
                await node.open(reference, seconds=0.3)
            assert not isinstance(caught.value, SourceUnreachable)


async def test_registry_that_asks_to_wait_is_waited_for(tmp_path: Path) -> None:
    async with FakeRegistry.open() as registry, host(tmp_path / "state") as node:
        put_image(registry, "hello", tag="1")
        reference = f"{registry.address}/{REPOSITORY}:1"
        await node.open(reference)
        put_image(registry, "other", tag="1")
        registry.faults.append(Fault(status=429, headers={"Retry-After": "1"}))
        image = await node.open(reference, seconds=0.2)
        assert image.stale_since is None
        assert image.digest == registry.store.tags[REPOSITORY, "1"]


async def test_registry_that_dies_between_tag_and_manifest_leaves_the_last_image(tmp_path: Path) -> None:
    async with FakeRegistry.open() as registry, host(tmp_path / "state") as node:
        put_image(registry, "hello", tag="1")
        reference = f"{registry.address}/{REPOSITORY}:1"
        first = await node.open(reference)
        put_image(registry, "other", tag="1")
        registry.faults.append(Fault(on="GET", status=502, headers={"Retry-After": "3600"}, times=100))
        image = await node.open(reference)
        assert image.digest == first.digest
        assert image.stale_since is not None


async def test_a_tag_is_remembered_for_each_platform(tmp_path: Path) -> None:
    async with host(tmp_path / "state") as node:
        async with FakeRegistry.open() as registry:
            entries = [put_image(registry, name, architecture=name) for name in ("amd64", "arm64")]
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
            registry.store.add_manifest(REPOSITORY, json.dumps(index).encode(), OCI_INDEX, tag="1")
            reference = f"{registry.address}/{REPOSITORY}:1"
            for platform in (AMD64, ARM64):
                await node.open(reference, platform)
        found = [(await node.open(reference, platform, seconds=0.2)).digest for platform in (AMD64, ARM64)]
        assert found == [Digest.parse(entry["digest"]) for entry in entries]


async def test_ages_are_said_in_words() -> None:
    assert [age(seconds) for seconds in (-5, 3, 119, 120, 7200, 172_800)] == [
        "0 s", "3 s", "119 s", "2 min", "2 h", "2 days",
    ]  # fmt: skip
