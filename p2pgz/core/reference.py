"""Image references: the distribution grammar, and `oci:`/`oci-archive:` for local layouts.

Everything that takes a reference from a person or a file comes through `parse_reference`; a `Reference`
therefore holds only text that may stand in a URL path, a file name or a header as it is. Grammar:
distribution reference (`reference.go`, named and normalised forms); only sha256 digests. The external TOC
of tag T is tag `T-esgztoc` in every transport.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from p2pgz.core.digest import Digest
from p2pgz.errors import ImageInvalid, UsageError

DEFAULT_HOST = "docker.io"
DEFAULT_TAG = "latest"
EXTERNAL_TOC_SUFFIX = "-esgztoc"
MAX_NAME_LETTERS = 255  # distribution: host and repository together
MAX_TAG_LETTERS = 128  # distribution: one letter and up to 127 more
MAX_REFERENCE_LETTERS = 4096 + 256  # PATH_MAX, a tag and a digest; far more than any registry name
MAX_PORT = 65535
HINT = "like ubuntu:24.04, registry.example:5000/team/app@sha256:…, oci:DIR:TAG or oci-archive:FILE:TAG"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_TAG_LETTERS - 1}}}")
_BARE_ID = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f\ud800-\udbff]|[\udc00-\udc7f]"
)  # file names that are no UTF-8 keep \udc80-\udcff


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A parsed reference. `transport` tells which fields count.

    registry: `host` (`docker.io`, `localhost:5000`), `repository`, `tag`, `digest`. oci, oci-archive:
    `path`, `tag`, `digest`. With a digest the tag is only a remark: the digest decides.
    """

    transport: Literal["registry", "oci", "oci-archive"]
    host: str = ""
    repository: str = ""
    path: str = ""
    tag: str = ""
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The repository or layout without tag and digest: `docker.io/library/ubuntu`, `oci:DIR`."""
        return (
            f"{self.host}/{self.repository}"
            if self.transport == "registry"
            else f"{self.transport}:{self.path}"
        )

    def __str__(self) -> str:
        """The canonical form; parsing it gives an equal reference."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}@{self.digest}" if self.digest else self.name + tag

    def with_tag(self, tag: str) -> Reference:
        """Another tag of the same repository or layout; raises UsageError when it cannot be one."""
        if not _TAG.fullmatch(tag):
            raise UsageError(f"{self.name}: {_shown(tag)} cannot be a tag", hint=_TAG_HINT)
        return replace(self, tag=tag, digest=None)

    def with_digest(self, digest: Digest) -> Reference:
        """What this digest names in the same repository or layout, whatever a tag says."""
        return replace(self, digest=digest)

    @property
    def external_toc_tag(self) -> str:
        """The tag under which the external TOCs of this image would be, or empty when it has no tag."""
        return f"{self.tag}{EXTERNAL_TOC_SUFFIX}" if self.tag else ""


_TAG_HINT = f"1 to {MAX_TAG_LETTERS} letters, digits, _ . - and not . or - first"


def parse_reference(text: str) -> Reference:
    """Parse what a person or a file calls an image; raises UsageError that says what is wrong with it."""
    if not text or len(text) > MAX_REFERENCE_LETTERS:
        raise UsageError(f"{_shown(text)} is not an image reference", hint=HINT)
    if _CONTROL.search(text):
        raise UsageError(f"{_shown(text)}: control characters cannot be in a reference", hint=HINT)
    for transport in ("oci-archive", "oci"):
        if text.startswith(f"{transport}:"):
            return _parse_local(transport, text)
    if "://" in text:
        raise UsageError(
            f"{_shown(text)} is a URL, not an image reference", hint="leave out the scheme: " + HINT
        )
    return _parse_named(text)


def _parse_named(text: str) -> Reference:
    name, digest = _split_digest(text)
    # a colon after the last slash begins a tag, unless the whole is only a host with a port, which names
    # nothing
    after_slash = name.rfind("/") + 1
    last, colon, tag = name[after_slash:].partition(":")
    name = name[:after_slash] + last
    if colon and not _TAG.fullmatch(tag):
        raise UsageError(f"{_shown(text)}: {_shown(tag)} cannot be a tag", hint=_TAG_HINT)
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host, repository = first.lower(), rest
    else:
        host, repository = DEFAULT_HOST, name
    if host == "index.docker.io":  # what old configurations call it
        host = DEFAULT_HOST
    if host == DEFAULT_HOST and "/" not in repository:
        repository = f"library/{repository}"
    _check_host(host, text)
    _check_repository(host, repository, text)
    if host == DEFAULT_HOST and _BARE_ID.fullmatch(name):
        raise UsageError(f"{_shown(text)}: 64 hex digits are an image id, not a name", hint=HINT)
    if not tag and digest is None:
        tag = DEFAULT_TAG
    return Reference(transport="registry", host=host, repository=repository, tag=tag, digest=digest)


def _check_host(host: str, text: str) -> None:
    match = _HOST.fullmatch(host)
    if not match or (match["port"] and not 0 < int(match["port"]) <= MAX_PORT):
        raise UsageError(f"{_shown(text)}: {_shown(host)} is not a host name", hint=HINT)


def _check_repository(host: str, repository: str, text: str) -> None:
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            hint = "lower-case letters and digits, single . _ __ or dashes between them"
            if component.lower() != component and _COMPONENT.fullmatch(component.lower()):
                hint = "repository names are lower-case"
            raise UsageError(
                f"{_shown(text)}: {_shown(component)} cannot be part of a repository's name", hint=hint
            )
    if len(host) + 1 + len(repository) > MAX_NAME_LETTERS:
        raise UsageError(f"{_shown(text)}: the name is longer than {MAX_NAME_LETTERS} letters", hint=HINT)


def _parse_local(transport: Literal["oci", "oci-archive"], text: str) -> Reference:
    path, digest = _split_digest(text.removeprefix(f"{transport}:"))
    tag = ""
    # the tag is what follows the last colon of the last component: a directory further up may have colons
    # in its name
    if ":" in path.rpartition("/")[2]:
        path, _, tag = path.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise UsageError(f"{_shown(text)}: {_shown(tag)} cannot be a tag", hint=_TAG_HINT)
    if not path:
        what = "FILE" if transport == "oci-archive" else "DIR"
        raise UsageError(f"{_shown(text)}: the path is missing", hint=f"{transport}:{what}[:TAG]")
    return Reference(transport=transport, path=path, tag=tag, digest=digest)


def _split_digest(text: str) -> tuple[str, Digest | None]:
    name, at, digest_text = text.rpartition("@")
    if not at or "/" in digest_text or (":" not in digest_text and text.startswith(("/", "."))):
        return text, None
    try:
        return name, Digest.parse(digest_text)
    except ImageInvalid as error:
        raise UsageError(
            f"{_shown(text)}: what follows the @ is not a sha256 digest",
            hint="@sha256: and 64 lower-case hex digits",
        ) from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")
