"""Where the registry of a name is asked: mirrors first, then the registry itself, as containerd's hosts.toml says.

`RegistryClient` calls `endpoints_for` once. Reads the directory layout of containerd's `certs.d`
(docs/hosts.md there); nothing is written. What containerd ignores is ignored here, too, and what would
change whom we trust must be right or is refused.
"""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pgz.core.reference import DEFAULT_HOST
from p2pgz.errors import ConfigError, P2pgzError
from p2pgz.registry.options import RegistryOptions
from p2pgz.registry.transport import TlsSettings, Url

DOCKER_HUB = "registry-1.docker.io"  # what answers for docker.io
ALL_CAPABILITIES = frozenset({"pull", "resolve", "push"})
MAX_HOSTS_BYTES = 1 << 20  # a mirror takes 100 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One place to ask. `base` ends before `/<repository>/…`; `namespace` is what mirrors are told in `?ns=`.

    `may_be_plain`: an address on the loopback interface, where plain HTTP is as good as TLS; asked when TLS
    is not spoken.
    """

    base: Url
    capabilities: frozenset[str] = ALL_CAPABILITIES
    tls: TlsSettings = field(default_factory=TlsSettings)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    mirror: bool = False
    namespace: str = ""
    may_be_plain: bool = False


def is_loopback(host: str) -> bool:
    """Whether a host name without port means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def endpoints_for(host: str, options: RegistryOptions) -> list[Endpoint]:
    """The endpoints of a reference's host, in the order to ask;

    raises ConfigError for a hosts.toml that cannot be followed.
    """
    folder = _folder_of(host, options.hosts_dir)
    if folder is None:
        return [_server(host, options)]
    path = folder / "hosts.toml"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_HOSTS_BYTES + 1)
    except FileNotFoundError:
        return [_server(host, options, _docker_style(folder, options))]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_HOSTS_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_HOSTS_BYTES} bytes")
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    return _HostsFile(path, host, options).endpoints(document)


def _folder_of(host: str, hosts_dir: str) -> Path | None:
    if not hosts_dir:
        return None
    name, colon, port = host.rpartition(":")
    names = [f"{name}_{port}_"] if colon and port.isdecimal() else []
    for candidate in [*names, host, "_default"]:
        folder = Path(hosts_dir) / candidate
        if folder.is_dir():
            return folder
    return None


def _server(host: str, options: RegistryOptions, tls: TlsSettings | None = None) -> Endpoint:
    """The registry itself, where nothing says otherwise."""
    address = DOCKER_HUB if host == DEFAULT_HOST else host
    scheme = "http" if options.plain_http else "https"
    url = Url.parse(f"{scheme}://{address}/v2", where=host)
    return Endpoint(
        base=url,
        tls=tls or TlsSettings(ca_files=_own_ca(options)),
        may_be_plain=not options.plain_http and is_loopback(url.host),
    )


def _own_ca(options: RegistryOptions) -> tuple[str, ...]:
    return (options.ca_file,) if options.ca_file else ()


def _docker_style(folder: Path, options: RegistryOptions) -> TlsSettings:
    """A directory without hosts.toml holds docker's `*.crt` (CAs) and `*.cert`/`*.key` (clients)."""
    pairs = [(str(path), str(path.with_suffix(".key"))) for path in sorted(folder.glob("*.cert"))]
    authorities = tuple(str(path) for path in sorted(folder.glob("*.crt")))
    return TlsSettings(ca_files=authorities + _own_ca(options), client_pairs=tuple(pairs))


class _HostsFile:
    """One hosts.toml; every error names the file and the key."""

    def __init__(self, path: Path, host: str, options: RegistryOptions) -> None:
        self._path = path
        self._host = host
        self._options = options

    def endpoints(self, document: dict[str, Any]) -> list[Endpoint]:
        mirrors = document.get("host", {})
        if not isinstance(mirrors, dict):
            raise self._error("host", "a table for each URL")
        found = [self._endpoint(url, table, f'host."{url}"', mirror=True) for url, table in mirrors.items()]
        server = document.get("server")
        if server is not None and not isinstance(server, str):
            raise self._error("server", "a URL")
        rest = {key: value for key, value in document.items() if key not in ("host", "server")}
        default = _server(self._host, self._options).base
        address = server or f"{default.scheme}://{default.netloc}"
        found.append(self._endpoint(address, rest, "server", mirror=False))
        return found

    def _endpoint(self, address: str, table: Any, where: str, *, mirror: bool) -> Endpoint:
        if not isinstance(table, dict):
            raise self._error(where, "a table")
        if "://" not in address:
            address = f"{'http' if self._options.plain_http and not mirror else 'https'}://{address}"
        try:
            url = Url.parse(address, where=f"{self._path}: {where}")
        except P2pgzError as error:
            raise self._error(where, "http(s)://HOST[:PORT][/PATH]") from error
        override = table.get("override_path", False)
        if not isinstance(override, bool):
            raise self._error(f"{where}: override_path", "true or false")
        skip_verify = table.get("skip_verify", False)
        if not isinstance(skip_verify, bool):
            raise self._error(f"{where}: skip_verify", "true or false")
        path = url.path.rstrip("/")
        if not override and not path.endswith("/v2"):
            path += "/v2"
        base = Url(url.scheme, url.host, url.port, path)
        itself = base.netloc == (DOCKER_HUB if self._host == DEFAULT_HOST else self._host)
        return Endpoint(
            base=base,
            capabilities=self._capabilities(table, where),
            tls=TlsSettings(
                ca_files=tuple(self._paths(table, "ca", where)) + _own_ca(self._options),
                client_pairs=tuple(self._client_pairs(table, where)),
                skip_verify=skip_verify,
            ),
            headers=self._headers(table, where),
            mirror=mirror,
            namespace=self._host if mirror and not itself else "",
            may_be_plain=base.scheme == "https" and is_loopback(base.host) and not skip_verify,
        )

    def _capabilities(self, table: dict[str, Any], where: str) -> frozenset[str]:
        texts = self._texts(table, "capabilities", where)
        unknown = [text for text in texts if text not in ALL_CAPABILITIES]
        if unknown and set(unknown) - {"referrers"}:
            raise self._error(f"{where}: capabilities", 'some of "pull", "resolve", "push"')
        return frozenset(texts) if texts else ALL_CAPABILITIES

    def _texts(self, table: dict[str, Any], key: str, where: str) -> list[str]:
        value = table.get(key, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self._error(f"{where}: {key}", "a text or a list of texts")
        return texts

    def _paths(self, table: dict[str, Any], key: str, where: str) -> list[str]:
        return [str(self._path.parent / text) for text in self._texts(table, key, where)]

    def _client_pairs(self, table: dict[str, Any], where: str) -> list[tuple[str, str]]:
        value = table.get("client", [])
        pairs = []
        for item in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
            both = [item, ""] if isinstance(item, str) else item
            if (
                not isinstance(both, list)
                or len(both) != 2
                or not all(isinstance(text, str) for text in both)
            ):
                raise self._error(
                    f"{where}: client", "a file with certificate and key, or a list of [certificate, key]"
                )
            certificate, key = both
            pairs.append((str(self._path.parent / certificate), str(self._path.parent / key) if key else ""))
        return pairs

    def _headers(self, table: dict[str, Any], where: str) -> dict[str, str]:
        value = table.get("header", {})
        if not isinstance(value, dict):
            raise self._error(f"{where}: header", "a table")
        return {name: ", ".join(self._texts(value, name, f"{where}: header")) for name in value}

    def _error(self, key: str, right: str) -> ConfigError:
        return ConfigError(f"{self._path}: {key} cannot be understood", hint=f"must be {right}")
