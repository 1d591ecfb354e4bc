"""What this host may give to peers: the images it has opened, and what the policy of today says about their repositories.

The image opener asks `place` where an image belongs (its dedup domain, and how peers are asked for it) and tells `add` what
an opened image consists of. `fetch.offers` answers peers from the tables here and from nothing else, so what no image of a
known mode has is never given away: layers whose TOC is only the registry's word, leftovers, images whose repository has
become private since. Each image is a small file, so that a node gives what it has as soon as it runs. Design, section 6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.sharing import Mode, Policy, document_name, image_secret, private_domain, swarm_name
from p2pgz.core.startup import name_of
from p2pgz.errors import ImageInvalid
from p2pgz.pool.disk import write_durably
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.segment import SHARED_DOMAIN

log = structlog.get_logger(component="fetch")

IMAGES: Final = "images"
# Documents that were brought for all before their image was open here
EARLY_MAX: Final = 4096
# One image: 1 000 layers and their documents are 150 KB
_FILE_MAX_BYTES: Final = 1 << 20


class Access(NamedTuple):
    """Where documents are kept, and whether and how peers are asked for them."""

    domain: str = SHARED_DOMAIN
    secret: bytes = b""
    """with it, only those that know the image understand the question"""
    peers: bool = True


class ImageFile(msgspec.Struct, frozen=True):
    """What `images/KEY.json` remembers of an image that was opened under a repository's name."""

    repository: str
    manifest: str
    domain: str
    indexes: list[str]
    """digests of the indexes that led to the manifest"""
    documents: list[str]
    """config and TOCs"""
    segments: list[str]
    """ids of the layers' segments whose TOC the manifest vouches for"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one image of a repository belongs, as things are today."""

    repository: str
    manifest: Digest
    mode: Mode
    domain: str
    secret: bytes = b""

    @property
    def access(self) -> Access:
        """For its config and TOCs."""
        return Access(self.domain, self.secret, self.shared)

    @property
    def manifest_domain(self) -> str:
        """Where its manifest is kept."""
        return SHARED_DOMAIN if self.domain == SHARED_DOMAIN else private_domain(self.repository)

    @property
    def shared(self) -> bool:
        """Whether any peer may have it, or be asked for it."""
        return self.mode is not Mode.NONE


class _Closed(NamedTuple):
    """Something that only provers get."""

    secret: bytes
    domain: str
    digest: Digest


class Shares:
    """The images of this host and who may have them. `directory` None: nothing is remembered.

    `on_open` is told each digest (TOC, manifest, config) that every peer may have from now on: what may be announced.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        directory: Path | None = None,
        on_open: Callable[[Digest], None] = lambda digest: None,
    ) -> None:
        self.policy = policy or Policy()
        self._directory = directory / IMAGES if directory is not None else None
        self._on_open = on_open
        self._open_segments: set[bytes] = set()
        self._open_documents: set[bytes] = set()
        self._early: dict[bytes, None] = {}
        self._closed_segments: dict[bytes, _Closed] = {}
        self._closed_documents: dict[bytes, _Closed] = {}
        self.changes = 0
        """grows whenever more or less is shared"""
        self._images: dict[str, ImageFile] = {}
        self._lists: dict[tuple[bytes, bool], Digest] = {}
        """manifests by the names of their start-up lists, and whether these are for provers only"""
        self._written: dict[str, ImageFile] = {}

    # --- where an image belongs

    def index_access(self, repository: str) -> Access:
        """For manifests and indexes of a repository. Peers are not asked for private ones: nothing could be proven yet."""
        if self.policy.mode(repository) is Mode.CLUSTER:
            return Access()
        return Access(private_domain(repository), peers=False)

    def place(self, repository: str, digest: Digest, manifest: bytes) -> Place:
        """Where the image with this manifest belongs."""
        mode = self.policy.mode(repository)
        if mode is Mode.CLUSTER:
            return Place(repository=repository, manifest=digest, mode=mode, domain=SHARED_DOMAIN)
        domain = private_domain(repository, digest)
        secret = image_secret(manifest) if mode is Mode.PROOF else b""
        return Place(repository=repository, manifest=digest, mode=mode, domain=domain, secret=secret)

    def former_place(self, repository: str, digest: Digest) -> Place:
        """Where the image is if its repository was of another mode when it was opened: to be read there, and not shared."""
        private = self.policy.mode(repository) is not Mode.CLUSTER
        domain = SHARED_DOMAIN if private else private_domain(repository, digest)
        return Place(repository=repository, manifest=digest, mode=Mode.NONE, domain=domain)

    # --- what it consists of

    async def add(
        self,
        place: Place,
        *,
        segments: Iterable[Segment],
        documents: Iterable[Digest],
        indexes: Iterable[Digest] = (),
    ) -> None:
        """An image has been opened: share it as its place says, and remember it. Segments of other domains are left out."""
        image = ImageFile(
            repository=place.repository,
            manifest=str(place.manifest),
            domain=place.domain,
            indexes=sorted(str(digest) for digest in indexes),
            documents=sorted({str(digest) for digest in documents}),
            segments=sorted({str(segment.id) for segment in segments if segment.domain == place.domain}),
        )
        name = _file_name(image)
        known = self._images.get(name)
        if known is not None:  # opened by tag, then by digest, which has no index
            image = msgspec.structs.replace(image, indexes=sorted({*image.indexes, *known.indexes}))
        self._images[name] = image
        if place.mode is self.policy.mode(place.repository):  # not if the rules have changed meanwhile
            self._enter(image, place)
        await self._remember(name, image)

    def indexes(self, place: Place) -> list[Digest]:
        """The indexes that led to an image, as far as it was opened by them here."""
        for image in self._images.values():
            if (image.repository, image.manifest) == (place.repository, str(place.manifest)):
                return [Digest.parse(text) for text in image.indexes]
        return []

    async def _remember(self, name: str, image: ImageFile) -> None:
        directory = self._directory
        if directory is None or image == self._written.get(name):
            await trio.lowlevel.checkpoint()
            return

        def write() -> None:
            directory.mkdir(mode=0o700, exist_ok=True)
            write_durably(directory / name, msgspec.json.encode(image))

        try:
            await trio.to_thread.run_sync(write)
        except OSError as error:  # then it is not offered after a restart, until it is opened again
            log.warning("image.not_remembered", repository=image.repository, reason=str(error))
        else:
            self._written[name] = image

    async def load(self, pool: Pool) -> None:
        """Share what earlier runs have opened, as far as it is still here and the policy of today allows."""
        for image in await trio.to_thread.run_sync(self._read_all):
            self._images[_file_name(image)] = image
        self._written = dict(self._images)
        await self.adopt(self.policy, pool)

    async def adopt(self, policy: Policy, pool: Pool) -> None:
        """Share by these rules from now on. What was opened under another mode is shared with nobody."""
        documents: dict[str, bytes | None] = {}
        while new := [name for name in self._images if name not in documents]:
            for name in new:
                image = self._images[name]
                is_open = image.domain == SHARED_DOMAIN
                domain = SHARED_DOMAIN if is_open else private_domain(image.repository)
                documents[name] = await pool.get_object(Digest.parse(image.manifest), domain=domain)
        # from here on at once: no peer is answered by half of the rules
        self.policy = policy
        self.changes += 1
        for table in (self._open_segments, self._open_documents, self._early):
            table.clear()
        for closed in (self._closed_segments, self._closed_documents):
            closed.clear()
        self._lists.clear()
        for name, document in documents.items():
            image = self._images[name]
            if document is None:
                continue
            place = self.place(image.repository, Digest.parse(image.manifest), document)
            if place.domain == image.domain:
                self._enter(image, place)
                continue
            log.warning(
                "image.not_shared", repository=image.repository, manifest=image.manifest, mode=str(place.mode),
                effect="its repository has another mode than when it was opened: mount it again to share it",
            )  # fmt: skip

    def verdicts(self) -> dict[tuple[str, bytes], bool]:
        """Of the layers of all images that were opened here, by domain and id: whether any peer may be asked for them."""
        found = {
            (image.domain, Digest.parse(text).raw): False
            for image in self._images.values()
            for text in image.segments
        }
        found |= {(SHARED_DOMAIN, raw): True for raw in self._open_segments}
        return found | {(closed.domain, closed.digest.raw): True for closed in self._closed_segments.values()}

    def _read_all(self) -> list[ImageFile]:
        found = []
        for path in sorted(self._directory.glob("*.json")) if self._directory is not None else ():
            try:
                if path.stat().st_size > _FILE_MAX_BYTES:
                    raise ImageInvalid(f"{path} is too large")
                image = msgspec.json.decode(path.read_bytes(), type=ImageFile)
                for text in [image.manifest, *image.indexes, *image.documents, *image.segments]:
                    Digest.parse(text)
            except (OSError, msgspec.MsgspecError, ImageInvalid) as error:
                log.warning("image.unreadable", path=str(path), reason=str(error), effect="it is not shared")
                continue
            found.append(image)
        return found

    def _enter(self, image: ImageFile, place: Place) -> None:
        self.changes += 1
        segments = [Digest.parse(text) for text in image.segments]
        documents = [Digest.parse(text) for text in image.documents]
        list_name = name_of(place.manifest)
        if place.mode is not Mode.NONE:
            self._lists[list_name.raw, place.mode is Mode.PROOF] = place.manifest
        if place.mode is Mode.CLUSTER:
            documents += [place.manifest, *(Digest.parse(text) for text in image.indexes)]
            new = [digest for digest in documents if digest.raw not in self._open_documents]
            self._open_segments.update(segment.raw for segment in segments)
            self._open_documents.update(digest.raw for digest in new)
            for digest in new:
                self._on_open(digest)
        elif place.mode is Mode.PROOF:
            secret = place.secret
            for segment in segments:
                closed = _Closed(secret, place.domain, segment)
                self._closed_segments[swarm_name(secret, segment.raw)] = closed
            for digest in documents:
                closed = _Closed(secret, place.domain, digest)
                self._closed_documents[document_name(secret, digest.raw)] = closed
            listed = _Closed(secret, place.domain, list_name)
            self._closed_documents[document_name(secret, list_name.raw)] = listed
            own = _Closed(secret, place.manifest_domain, place.manifest)
            self._closed_documents[document_name(secret, place.manifest.raw)] = own

    # --- what peers may have

    def open_segments(self) -> list[Digest]:
        """The TOCs whose chunks every peer may have."""
        return [Digest(raw) for raw in self._open_segments]

    def open_documents(self) -> list[Digest]:
        """The TOCs, manifests and configs that every peer may have."""
        return [Digest(raw) for raw in self._open_documents]

    def is_open_segment(self, segment: bytes) -> bool:
        """Whether every peer may have the chunks of this TOC."""
        return segment in self._open_segments

    def is_open_document(self, digest: bytes) -> bool:
        """Whether every peer may have this TOC, manifest or config."""
        return digest in self._open_documents or digest in self._early

    def open_early(self, digest: Digest) -> None:
        """A document of an image that is for every peer is here; the rest of the image is not yet."""
        self._early[digest.raw] = None
        if len(self._early) > EARLY_MAX:
            del self._early[next(iter(self._early))]

    def startup_list(self, name: bytes, *, proven: bool = False) -> Digest | None:
        """The manifest of the image whose start-up list has this name, if every peer may have it, or provers may."""
        return self._lists.get((name, proven))

    def secret(self, name: bytes) -> bytes | None:
        """The secret of the image that has a swarm or document of this name."""
        closed = self._closed_segments.get(name) or self._closed_documents.get(name)
        return closed.secret if closed is not None else None

    def closed_segment(self, name: bytes) -> tuple[str, Digest] | None:
        """Domain and id of the segment that a prover may have under this name."""
        closed = self._closed_segments.get(name)
        return (closed.domain, closed.digest) if closed is not None else None

    def closed_document(self, name: bytes) -> tuple[str, Digest] | None:
        """Domain and digest of the document that a prover may have under this name."""
        closed = self._closed_documents.get(name)
        return (closed.domain, closed.digest) if closed is not None else None


def _file_name(image: ImageFile) -> str:
    key = msgspec.json.encode([image.repository, image.manifest, image.domain])
    return f"{hashlib.sha256(key).hexdigest()}.json"
