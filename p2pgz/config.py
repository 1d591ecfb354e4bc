"""The configuration: one frozen value, from a TOML file, the environment and command-line flags.

Precedence is flag > environment > file > default. A key `pool.quota_bytes` is the environment variable
`P2PGZ_POOL__QUOTA_BYTES`. Unknown keys are errors: a typing mistake must not be a default in disguise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from p2pgz.core.places import Places
from p2pgz.core.size import parse_amount
from p2pgz.core.structcheck import Mistake, mistakes, without
from p2pgz.errors import ConfigError

CONFIG_VERSION = 1
FLOOR_AUTO = "auto"
FLOOR_AUTO_SHARE, FLOOR_AUTO_MAX_BYTES = 0.05, 1 << 30
ENVIRONMENT_PREFIX = "P2PGZ_"
LOG_LEVELS = ("debug", "info", "warning", "error")
# environment variables with this prefix that are not configuration keys (click's completion and our process plumbing)
ENVIRONMENT_OTHERS = frozenset({"P2PGZ_STATE_DIR", "P2PGZ_CONFIG", "P2PGZ_RUN_DIR"})

NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Logs go to standard error as JSON lines, or as text on a terminal."""

    level: str = "info"
    """debug, info, warning or error"""


class PoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pool: chunk bytes on this host's disk."""

    check_filesystem: bool = True
    """refuse state directories on NFS, Lustre, overlayfs, tmpfs and file systems that punch no holes"""
    quota_bytes: int | str = 0
    """most that the pool takes on the disk: a number of bytes, or a text like "200GB", "64GiB" or "80%" (of the file
    system); 0: no limit"""
    free_floor_bytes: int | str = "auto"
    """the pool shrinks while less than this is free on its file system, written likewise; "auto": 5%, at most 1 GiB; 0:
    never"""
    scrub_interval_seconds: NonNegative = 604_800
    """every chunk is read from the disk and checked this often, in idle time; 0: never"""
    scrub_bytes_per_second: NonNegative = 8_000_000
    """how fast that goes; 0: no limit"""


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How registries are spoken to; per-mount flags win."""

    plain_http: list[str] = []
    """hosts (`host` or `host:port`) that are spoken to without TLS"""
    ca_file: str = ""
    """PEM file with certificates to trust besides the system's"""
    hosts_dir: str = "/etc/containerd/certs.d"
    """containerd's directory of hosts.toml files: mirrors, CAs, headers"""
    docker_config: str = ""
    """docker's config.json for credentials; empty: $DOCKER_CONFIG, then ~/.docker/config.json"""
    connections: Positive = 8
    """requests at a time to one registry"""
    bytes_per_second: NonNegative = 0
    """limit of what registries send, compressed bytes of layers; a read waits at most as long as its own bytes take, the
    background pays for it; 0: none"""


class FetchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How missing chunks are fetched."""

    read_deadline_seconds: Seconds = 60.0
    """a read that no source could answer by then fails with EIO; the next read tries again"""
    fill: bool = True
    """fetch what nobody has read yet in the background, once an image is mounted"""
    fill_bytes_per_second: NonNegative = 20_000_000
    """limit of the background fetch, from wherever it comes (compressed bytes of registries, uncompressed of peers); 0:
    none"""
    fill_delay_seconds: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """how long nothing must have been asked for after a mount before the background fetch starts, so that a start-up has
    the link for itself; after a minute it starts in any case"""
    startup_list: bool = True
    """record which chunks of an image are read first, tell peers, and fetch those first at the next mount, here or there"""


class MountConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Defaults of mounts; per-mount flags win."""

    suid: bool = False
    """honour setuid bits and file capabilities (root only)"""
    dev: bool = False
    """honour device nodes (root only)"""
    context: str = ""
    """SELinux context of all files of a mount"""
    resend: bool = True
    """readers survive a killed file system process (Linux 6.9.4 and later); false: an error, and a new mount"""
    abandon_seconds: Annotated[float, msgspec.Meta(ge=1)] = 60.0
    """how long readers wait for a missing file system process before the mount is given up and they get an error"""


class SnapshotterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`p2pgz snapshotter`: containerd's containers."""

    require_verified_diffid: bool = False
    """take a layer only after all of it was read once and found to be what its diff id and its TOC say; for hosts of several
    tenants"""


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The daemon itself."""

    ephemeral_linger_seconds: Seconds = 10.0
    """a node that a command started for itself ends this long after its last mount"""


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The status page, metrics and probes. Nothing can be changed there; whoever reaches it can read all of it."""

    listen: str = "auto"
    """address, such as "127.0.0.1:4802" or ":4802" (every interface); "auto": port 4802 of the loopback interface, or any
    port if it is taken, and nothing for a node that a command starts for itself; "none": nothing"""
    hosts: list[str] = []
    """further names that browsers and scrapers may call this host by; its own name, localhost and addresses are
    always right"""


class PeersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The swarm: other hosts that give chunks and are given some."""

    enabled: Literal["auto", "always", "never"] = "auto"
    """auto: `p2pgz node` takes part; a node that another command starts does when peers are configured"""
    listen: list[str] = []
    """multiaddrs to listen at, such as `/ip4/0.0.0.0/tcp/4801`; empty: port 4801, or any port if it is taken"""
    announce: list[str] = []
    """multiaddrs at which others reach this host; empty: found out"""
    bootstrap: list[str] = []
    """multiaddrs of nodes to begin with; `/dns/NAME/tcp/PORT` stands for all addresses of a name"""
    zone: str = ""
    """where this host is (a rack, a data centre, a cloud's zone): bytes cross the border between zones as seldom as can be;
    empty: all hosts without one are in the same zone"""
    leases: bool = True
    """when several nodes of the cluster want the same part of an image, one asks the registry for all of them"""
    mdns: bool = False
    """look for peers on the local network"""
    cluster_key_file: str = ""
    """file with the cluster's key, one a line, at most two (the new one and the old one); empty: anyone may join"""
    allow: list[str] = []
    """peer ids that may join without the cluster's key"""
    trusted_indexers: list[str] = []
    """peer ids whose signed index of a layer that nobody converted is believed at once: it is lazy, and checked later"""
    dht: bool = True
    """find and announce providers in the DHT; without it only peers that are connected anyway are asked"""
    provide: Literal["toc", "chunk"] = "toc"
    """what is announced: layers, by way of which chunks are found, or every chunk as well (up to 2000 of them)"""
    download_bytes_per_second: NonNegative = 0
    """limit of what is taken from peers, uncompressed bytes; a read waits at most as long as its own bytes take, the
    background pays for it; 0: none"""
    upload_bytes_per_second: NonNegative = 0
    """limit of what is given to peers; 0: none"""
    connections: Positive = 128
    """most connections to peers at a time; beyond, an idle one makes room, and when none is idle the new one is refused"""
    upload_slots: Positive = 16
    """peers that are sent to at a time; others wait their turn or are sent elsewhere"""

    @property
    def configured(self) -> bool:
        """Whether anything says that this node is to have peers."""
        return bool(self.bootstrap or self.listen or self.mdns or self.cluster_key_file or self.allow)


class SeedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Images that this node keeps whole and gives to its peers. Only `p2pgz node` seeds."""

    images: list[str] = []
    """references of images to fetch, keep and give to peers; they follow their tags"""
    watch_seconds: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    """how often a registry is asked what a followed tag means (about; by HEAD); 0: only when the node starts"""
    bytes_per_second: NonNegative = 50_000_000
    """limit of fetching seeds, uncompressed bytes, from wherever they come; 0: none"""


class MountAtStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that is mounted whenever the node runs."""

    reference: str
    directory: str
    mode: Literal["auto", "tree", "erofs"] = "auto"


class SharingRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With whom images of some repositories are shared. The first that matches counts; else all peers may have them."""

    repository: str
    """a glob over `registry/repository`; `*` also stands for slashes"""
    mode: Literal["cluster", "proof", "none"]
    """cluster: every admitted peer; proof: those that have the image's manifest; none: nobody"""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be configured."""

    version: int = CONFIG_VERSION
    log: LogConfig = LogConfig()
    pool: PoolConfig = PoolConfig()
    registry: RegistryConfig = RegistryConfig()
    fetch: FetchConfig = FetchConfig()
    mount: MountConfig = MountConfig()
    snapshotter: SnapshotterConfig = SnapshotterConfig()
    node: NodeConfig = NodeConfig()
    http: HttpConfig = HttpConfig()
    peers: PeersConfig = PeersConfig()
    seed: SeedConfig = SeedConfig()
    mounts: list[MountAtStart] = []
    """images to mount when the node starts: `[[mounts]]` with `reference`, `directory` and, if need be, `mode`"""
    sharing: list[SharingRule] = []
    """who may have which images: `[[sharing]]` with `repository` (a glob, `*` is also for slashes) and `mode`"""


class Loaded(msgspec.Struct, frozen=True):
    """A configuration and where each key's value came from (`default`, `file`, `environment`, `flag`)."""

    config: Config
    origins: dict[str, str]
    places: Places


def load(
    path: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
    *,
    must_exist: bool = False,
) -> Loaded:
    """Read and merge all layers; raises ConfigError that names all that is wrong: where, the key, what would be right."""
    text = _read(path, must_exist=must_exist) if path is not None else ""
    document = _parse(text, path)
    origins = dict.fromkeys(flatten(document), "file")
    for name, value in [*_environment_keys(environment).items(), *(flags or {}).items()]:
        _insert(document, name, value)
        origins[name] = "flag" if name in (flags or {}) else "environment"
    found = mistakes(document, Config)
    # what can be read is looked at as well, so that all is said at once
    config = msgspec.convert(without(document, {mistake.key for mistake in found}), Config, strict=False)
    places = Places(str(path or "configuration"), text, origins, ENVIRONMENT_PREFIX)
    if found := [*found, *_wrong_values(config)]:
        raise places.error(found)
    named = {key: origins.get(key, "default") for key in flatten(msgspec.to_builtins(config))}
    return Loaded(config, named, places)


def _wrong_values(config: Config) -> Iterator[Mistake]:
    """What types do not say."""
    if config.version != CONFIG_VERSION:
        yield Mistake(
            "version", f"{config.version} is not understood", f"this p2pgz reads version = {CONFIG_VERSION}"
        )
    if config.log.level not in LOG_LEVELS:
        yield Mistake("log.level", f"{config.log.level!r} is no level", f"one of {', '.join(LOG_LEVELS)}")
    for key in ("quota_bytes", "free_floor_bytes"):
        value = getattr(config.pool, key)
        try:
            parse_amount(0 if (key, value) == ("free_floor_bytes", FLOOR_AUTO) else value)
        except ValueError as error:
            yield Mistake(f"pool.{key}", str(error), 'for example 200000000000, "200GB" or "80%"')


def _read(path: Path, *, must_exist: bool) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"{path}: no such configuration file") from None
        return ""
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _parse(text: str, path: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _environment_keys(environment: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, text in environment.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in ENVIRONMENT_OTHERS or "__" not in name:
            continue
        found[name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")] = text
    return found


# keys that are lists: in the environment, items are separated by commas
_LISTS = frozenset(
    {
        "registry.plain_http",
        "http.hosts",
        "peers.listen",
        "peers.announce",
        "peers.bootstrap",
        "peers.allow",
        "peers.trusted_indexers",
        "seed.images",
    }
)


def _insert(document: dict[str, Any], name: str, value: object) -> None:
    *tables, key = name.split(".")
    for table in tables:
        document = document.setdefault(table, {})
        if not isinstance(document, dict):
            raise ConfigError(f"{name}: {table} is a value, not a table")
    if name in _LISTS and isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    document[key] = value


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"pool": {"x": 1}}` → `{"pool.x": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def dump_default() -> str:
    """A complete configuration file: every key with its default and what it means."""
    lines = [f"version = {CONFIG_VERSION}", ""]
    for field in msgspec.structs.fields(Config):
        table = getattr(Config(), field.name)
        if not isinstance(table, msgspec.Struct):
            continue
        lines += [f"# {(type(table).__doc__ or '').strip()}", f"[{field.name}]"]
        for key, doc in zip(msgspec.structs.fields(type(table)), _field_docs(type(table)), strict=True):
            lines += [f"# {' '.join(doc.split())}"] if doc else []
            lines.append(f"{key.name} = {_toml(getattr(table, key.name))}")
        lines.append("")
    lines += ["# Images to mount whenever the node starts, as often as needed:", "# [[mounts]]"]
    lines += ['# reference = ""', '# directory = ""', '# mode = "auto"', ""]
    lines += ["# With whom images are shared; the first that matches counts, else every peer of the cluster:"]
    lines += ["# [[sharing]]", '# repository = "registry.example/team/*"', '# mode = "proof"']
    return "\n".join([*lines, ""])


def _field_docs(struct: type[msgspec.Struct]) -> list[str]:
    """The string below each field, read from the source: one place for the meaning of a key."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = []
    for here, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign):
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            docs.append(str(after.value.value) if is_doc else "")  # type: ignore[union-attr]  # is_doc proves it
    return docs


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value) if isinstance(value, int | float) else msgspec.json.encode(value).decode()


def pool_limits(config: PoolConfig, total_bytes: int) -> tuple[int, int]:
    """Quota and floor in bytes, on a file system of this size."""
    floor = config.free_floor_bytes
    if floor == FLOOR_AUTO:
        floor = min(int(total_bytes * FLOOR_AUTO_SHARE), FLOOR_AUTO_MAX_BYTES)
    return parse_amount(config.quota_bytes).of(total_bytes), parse_amount(floor).of(total_bytes)
