"""Real nodes and images of each mode: who gets what, what the DHT says, and that no secret leaves a host.

The outsiders are in this process: peers that say what they like, with the cluster's key and without.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from p2pgz.config import load
from p2pgz.core.admission import Admission
from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX, Digest
from p2pgz.core.frames import encode
from p2pgz.core.keyspace import Contact
from p2pgz.core.messages import Bitmap, Doc, DocWant, Frame, Goodbye, Join, Leave, Missing, ProofJoin, Want
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.sharing import document_name, image_secret, swarm_name
from p2pgz.errors import P2pgzError
from p2pgz.node import open_node
from p2pgz.p2p.handshake import Credentials, Handshaken, dial
from p2pgz.p2p.identity import Identity, load_identity
from p2pgz.p2p.tls import TlsStream
from p2pgz.testing.dht import listening_dht
from p2pgz.web.api import MountRequest, VerifyRequest
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.cli.running import P2pgz
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

KEY = "a-key-of-this-test-that-nobody-guesses"
PASSWORD = "pass-word-of-this-test"
# what a bitmap needs to come, many times over: for images of which none must come
BITMAPS_SECONDS = 0.5
FILE_BYTES = 40_000
FILES = 6
MODES = ("cluster", "proof", "none")
RULES = """
[[sharing]]
repository = "*/proof/*"
mode = "proof"

[[sharing]]
repository = "*/none/*"
mode = "none"
"""


@dataclass(frozen=True)
class Image:
    reference: str
    manifest: bytes
    files: list[bytes]

    @property
    def toc(self) -> bytes:
        """The digest of its one layer's TOC, which names the swarm of an image that is for everyone."""
        (layer,) = json.loads(self.manifest)["layers"]
        return Digest.parse(layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"]).raw

    @property
    def config(self) -> bytes:
        return Digest.parse(json.loads(self.manifest)["config"]["digest"]).raw

    def digests(self) -> list[bytes]:
        """All that can be named by its digest."""
        chunks = [hashlib.sha256(data).digest() for data in self.files]
        return [hashlib.sha256(self.manifest).digest(), self.toc, self.config, *chunks]


@dataclass(frozen=True)
class Scene:
    registry: RegistryThread
    images: dict[str, Image]
    bare: Image
    """for everybody, but its manifest does not vouch for the TOC of its layer; `manifest` is the one that did"""
    holder: SwarmNode
    """has read all of each image"""
    member: SwarmNode
    folder: Path


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture(scope="module")
def scene(folder: Path) -> Iterator[Scene]:
    (folder / "key").write_text(KEY)
    (folder / "config.toml").write_text(RULES)
    token = base64.b64encode(f"someone:{PASSWORD}".encode()).decode()
    environment = {
        "P2PGZ_CONFIG": str(folder / "config.toml"),
        "P2PGZ_PEERS__CLUSTER_KEY_FILE": str(folder / "key"),
        "P2PGZ_REGISTRY__DOCKER_CONFIG": str(folder / "docker.json"),
        "P2PGZ_LOG__LEVEL": "debug",
    }
    with RegistryThread.running() as registry, swarm(folder, 2, **environment) as (holder, member):
        (folder / "docker.json").write_text(json.dumps({"auths": {registry.address: {"auth": token}}}))
        converter = P2pgz(folder / "converter" / "state")
        converter.home.mkdir()
        images = {mode: push_image(registry, converter, folder, mode) for mode in MODES}
        bare = without_annotations(registry, push_image(registry, converter, folder, "bare"))
        # from here on the registry wants a name, and sends to its storage with signed addresses
        registry.fake.auth, registry.fake.users, registry.fake.storage = "bearer", {"someone": PASSWORD}, True
        holder.start_node()
        for image in images.values():
            holder.ok("verify", "--plain-http", image.reference)
        member.join(holder)
        wait_until(member.peer_ids)
        yield Scene(registry, images, bare, holder, member, folder)


def without_annotations(registry: RegistryThread, image: Image) -> Image:
    document = json.loads(image.manifest)
    del document["layers"][0]["annotations"]
    digest = registry.fake.store.add_manifest("bare/app", json.dumps(document).encode()).digest
    return Image(f"{registry.address}/bare/app@{digest}", image.manifest, image.files)


def push_image(registry: RegistryThread, converter: P2pgz, folder: Path, mode: str) -> Image:
    rng = random.Random(mode)
    files = [rng.randbytes(FILE_BYTES) for _ in range(FILES)]
    target = f"{registry.address}/{mode}/app:t"
    push_converted(
        converter, folder / f"layout-{mode}", target, {f"f{n}": data for n, data in enumerate(files)}
    )
    digest = registry.fake.store.tags[f"{mode}/app", "t"]
    return Image(f"{registry.address}/{mode}/app@{digest}", registry.fake.store.content[digest], files)


def layers_told(scene: Scene) -> int:
    """Of how many layers the holder has told the member what it has."""
    return sum(peer["layers"] for peer in scene.member.status()["peers"])


def verify(scene: Scene, mode: str) -> tuple[int, int, int]:
    """Let the member read an image: blobs asked of the registry, chunks from the registry and from peers."""
    requests, before = scene.registry.blob_requests(), scene.member.sources()
    told = layers_told(scene)
    scene.member.ok("ls", "--plain-http", scene.images[mode].reference)
    if mode == "none":
        time.sleep(BITMAPS_SECONDS)
    else:
        wait_until(lambda: layers_told(scene) > told)
    scene.member.ok("verify", "--plain-http", scene.images[mode].reference)
    after = scene.member.sources()
    return (
        scene.registry.blob_requests() - requests,
        after["registry"]["chunks"] - before["registry"]["chunks"],
        after["peer"]["chunks"] - before["peer"]["chunks"],
    )


@asynccontextmanager
async def peer_of(node: SwarmNode, key: str = KEY) -> AsyncIterator[Handshaken]:
    """A peer with this cluster key that says what it likes."""
    credentials = Credentials.make(Identity.new(), Admission(cluster_keys=[key.encode()] if key else []))
    address = PeerAddress.parse(node.addresses()[0])
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        yield await dial(stream, credentials)


async def answers(ends: Handshaken, count: int, *frames: Frame) -> list[Frame]:
    """What comes back; what the node itself wants to know of us is passed over."""
    await ends.stream.send_all(b"".join(map(encode, frames)))
    heard, found = list(ends.frames), list[Frame]()
    ends.frames.clear()
    with trio.fail_after(5):
        while True:
            found += [frame for frame in heard if not isinstance(frame, Join | ProofJoin | Leave)]
            if len(found) >= count:
                return found
            data = await ends.stream.receive()
            assert data, "the connection has ended"
            heard = ends.reader.feed(data)


@pytest.mark.trio
async def test_an_admitted_peer_that_knows_digests_only_gets_what_is_for_the_cluster(scene: Scene) -> None:
    async with peer_of(scene.holder) as ends:
        for mode, image in scene.images.items():
            secret = image_secret(image.manifest)
            swarms = (image.toc, swarm_name(secret, image.toc))
            if mode == "cluster":
                bitmap, doc = await answers(ends, 2, Join(image.toc), DocWant(1, image.config))
                assert isinstance(bitmap, Bitmap)
                assert bitmap.count >= FILES
                assert isinstance(doc, Doc)
                continue
            unknown = [encode(Bitmap(bytes(32), 0, b"")), encode(Missing(1)), encode(Missing(2))]
            for name in (bytes(32), *swarms, *image.digests(), document_name(secret, image.config)):
                for join in (Join(name), ProofJoin(name, bytes(32))):
                    asked = (join, Want(1, 0, name, ((0, 1),)), DocWant(2, name), Leave(name))
                    said = await answers(ends, 3, *asked)
                    assert sorted(encode(frame).replace(name, bytes(32)) for frame in said) == sorted(unknown)


@pytest.mark.trio
async def test_layers_whose_toc_nothing_vouches_for_are_not_given(scene: Scene) -> None:
    """They are the registry's word: a peer that took them would have it from us."""
    scene.holder.ok("verify", "--plain-http", "--allow-unverified-toc", scene.bare.reference)
    async with peer_of(scene.holder) as ends:
        for name in (scene.bare.toc, hashlib.sha256(scene.bare.files[0]).digest()):
            said = await answers(ends, 3, Join(name), Want(1, 0, name, ((0, 1),)), DocWant(2, name))
            assert {encode(frame) for frame in said} == {
                encode(Bitmap(name, 0, b"")), encode(Missing(1)), encode(Missing(2))
            }  # fmt: skip
    scene.member.ok("ls", "--plain-http", "--allow-unverified-toc", scene.bare.reference)
    time.sleep(BITMAPS_SECONDS)
    before = scene.member.sources()["peer"]
    scene.member.ok("verify", "--plain-http", "--allow-unverified-toc", scene.bare.reference)
    assert scene.member.sources()["peer"] == before  # nor asked for


@pytest.mark.trio
async def test_the_dht_names_holders_of_what_is_for_the_cluster_only(scene: Scene) -> None:
    address = PeerAddress.parse(scene.holder.addresses()[0])
    assert address.peer is not None
    holder = Contact(address.peer.raw, (address.without_peer().to_bytes(),))
    async with listening_dht(admission=Admission(cluster_keys=[KEY.encode()]), contacts=[holder]) as dht:
        with trio.fail_after(20):  # its library may still be loading
            await dht.greet(holder)
            while not dht.kad.table.get(holder.peer):
                await trio.sleep(0.01)

        async def named(digest: bytes) -> list[bytes]:
            with trio.fail_after(10):
                async with dht.kad.providers(SHA256_MULTIHASH_PREFIX + digest, wanted=5) as found:
                    return [contact.peer async for contact in found]

        for digest in scene.images["cluster"].digests():
            assert holder.peer in await named(digest)
        for mode in ("proof", "none"):
            for digest in scene.images[mode].digests():
                assert await named(digest) == []
    async with listening_dht(admission=Admission(cluster_keys=[b"x" * 32]), contacts=[holder]) as stranger:
        with pytest.raises(P2pgzError, match="not admitted"):
            await stranger.greet(holder)
    async with listening_dht(contacts=[holder]) as stranger:  # would admit anybody, and shows nothing
        with pytest.raises(P2pgzError):
            await stranger.host.ask(holder, dht.kad.protocol, find_providers(scene.images["cluster"].toc))


def find_providers(toc: bytes) -> bytes:
    from p2pgz.p2p.kadmsg import KadMessage, Kind
    from p2pgz.p2p.kadmsg import encode as encode_kad

    return encode_kad(KadMessage(Kind.GET_PROVIDERS, SHA256_MULTIHASH_PREFIX + toc))


@pytest.mark.trio
async def test_who_does_not_know_the_key_gets_a_goodbye(scene: Scene) -> None:
    with pytest.raises(P2pgzError, match="not admitted"):
        async with peer_of(scene.holder, "another-key-of-this-test"):
            pass
    async with peer_of(scene.holder, "") as ends:  # would admit anybody, and shows nothing
        toc = scene.images["cluster"].toc
        (answer,) = await answers(ends, 1, Join(toc), Want(1, 0, toc, ((0, 1),)))
        assert isinstance(answer, Goodbye)


def test_images_go_to_whom_they_are_for(scene: Scene) -> None:
    assert verify(scene, "cluster") == (0, 0, pytest.approx(FILES, abs=2))
    requests, from_registry, from_peers = verify(scene, "proof")
    assert (requests, from_registry) == (0, 0)  # the manifest is all that the registry was asked for
    assert from_peers >= FILES
    requests, from_registry, from_peers = verify(scene, "none")
    assert requests > 0
    assert from_registry >= FILES
    assert from_peers == 0


def test_a_peer_on_the_list_needs_no_key(scene: Scene) -> None:
    """Told by its id: the listed one is let in, its neighbour without key is not."""
    with swarm(scene.folder / "listed", 3) as (host, listed, stranger):
        listed.state.mkdir(mode=0o700)
        peer_id = str(load_identity(listed.state).peer_id)
        host.start_node(P2PGZ_PEERS__CLUSTER_KEY_FILE=str(scene.folder / "key"), P2PGZ_PEERS__ALLOW=peer_id)
        listed.join(host)
        stranger.join(host)
        wait_until(lambda: peer_id in host.peer_ids())
        wait_until(lambda: host.log().count("peer.refused") >= 2)
        assert host.peer_ids() == {peer_id}
        assert stranger.peer_ids() == set()


@pytest.mark.trio
async def test_no_secret_and_no_private_digest_is_in_any_frame(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node in this process reads all images, and what it says to the holder is looked at before it is encrypted."""
    said = bytearray()
    send_all = TlsStream.send_all

    async def heard(stream: TlsStream, data: bytes | memoryview) -> None:
        said.extend(data)
        await send_all(stream, data)

    monkeypatch.setattr(TlsStream, "send_all", heard)
    environment = {key: text for key, text in scene.holder.environment.items() if key.startswith("P2PGZ_")}
    environment["P2PGZ_PEERS__BOOTSTRAP"] = ",".join(scene.holder.addresses())
    loaded = load(scene.folder / "config.toml", environment)
    state = scene.folder / "inside"

    async def quiet(_: dict[str, object]) -> None:
        await trio.lowlevel.checkpoint()

    with trio.fail_after(30):
        async with open_node(loaded.config, state, state) as node:
            while not node.status()["peers"]:
                await trio.sleep(0.01)
            for image in scene.images.values():
                await node.list_files(MountRequest(reference=image.reference, plain_http=True), quiet)
            while sum(peer["layers"] for peer in node.status()["peers"]) < 2:
                await trio.sleep(0.01)
            for image in scene.images.values():
                await node.verify(VerifyRequest(reference=image.reference, plain_http=True), quiet)
            sources = node.status()["sources"]
    assert sources["peer"]["chunks"] >= 2 * FILES
    assert sources["registry"]["chunks"] >= FILES
    proof = scene.images["proof"]
    assert scene.images["cluster"].toc in said
    assert swarm_name(image_secret(proof.manifest), proof.toc) in said
    for mode in ("proof", "none"):
        image = scene.images[mode]
        secret = image_secret(image.manifest)
        assert not any(name in said for name in (*image.digests(), secret))
    none = scene.images["none"]
    assert swarm_name(image_secret(none.manifest), none.toc) not in said
    token = base64.b64encode(f"someone:{PASSWORD}".encode()).decode()
    words = [PASSWORD, token, KEY, "signature=", "Bearer", "http", *scene.registry.fake._tokens]
    assert [word for word in words if word.encode() in said] == []


def test_no_secret_is_in_any_log_status_or_file(scene: Scene) -> None:
    """Passwords, tokens, signed addresses, the cluster's key and the images' own secrets."""
    secrets = [KEY, PASSWORD, base64.b64encode(f"someone:{PASSWORD}".encode()).decode(), "signature="]
    secrets += list(scene.registry.fake._tokens)
    secrets += [image_secret(image.manifest).hex() for image in scene.images.values()]
    assert len(scene.registry.fake._tokens) > 2
    assert scene.registry.fake.leaks == []
    wanted = re.compile(b"|".join(re.escape(secret.encode()) for secret in secrets))
    raw_secrets = [image_secret(image.manifest) for image in scene.images.values()]
    for node in (scene.holder, scene.member):
        assert "peers.ready" in node.log()
        assert not wanted.search(node.log().encode())
        assert not wanted.search(json.dumps(node.status()).encode())
        for path in node.state.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert not wanted.search(data), path
                assert not any(secret in data for secret in raw_secrets), path
