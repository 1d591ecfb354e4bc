"""Whose name and password a registry gets: docker's config.json, its helpers, and the auth.json of podman and skopeo.

`auth` asks when a registry wants credentials, not before. Secrets live in `Credentials`, whose repr hides
them, and go into no message. Nothing is written, and no helper is run but the one that a configuration file
of the user names.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import trio

from p2pgz.core.reference import DEFAULT_HOST
from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import ConfigError, ImageInvalid, UsageError
from p2pgz.registry.hosts import DOCKER_HUB
from p2pgz.registry.options import RegistryOptions

log = structlog.get_logger(component="registry")

HELPER_SECONDS = 20.0  # a helper may talk to a cloud's metadata service or unlock a keyring
MAX_HELPER_BYTES = 1 << 20  # tokens are some KiB
MAX_FILE_BYTES = 4 << 20
DOCKER_HUB_KEY = "https://index.docker.io/v1/"  # docker's name for its own registry since 2013
IDENTITY_TOKEN_USER = "<token>"  # noqa: S105  # what helpers call a user whose secret is an identity token
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NOT_FOUND = b"credentials not found"  # the helper protocol's words


@dataclass(frozen=True, slots=True)
class Credentials:
    """What proves who we are; at most one kind is set."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """to be exchanged for an access token (OAuth 2 refresh token)"""
    registry_token: str = field(default="", repr=False)
    """an access token that is used as it is"""

    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class CredentialStore:
    """All places that may hold credentials for registries, as `options` and the environment name them."""

    def __init__(self, options: RegistryOptions, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment
        self._docker_config = options.docker_config
        self._user = _parse_user(options.user) if options.user else None

    async def find(self, host: str, repository: str) -> Credentials | None:
        """The credentials for a repository, or None:

        the registry is then asked without. Raises ConfigError.
        """
        if self._user is not None:
            return self._user
        for path, chosen in self._files():
            document = _read(path, chosen=chosen)
            found = await self._find_in(document, path, host, repository)
            if found is not None:
                return found
        return None

    def _files(self) -> Iterator[tuple[Path, bool]]:
        """Candidates, and whether somebody chose them (then they must be there)."""
        environment = self._environment
        home = Path(environment.get("HOME") or "/")
        if self._docker_config:
            yield Path(self._docker_config), True
        elif folder := environment.get("DOCKER_CONFIG"):
            yield Path(folder) / "config.json", False
        else:
            yield home / ".docker" / "config.json", False
        if path := environment.get("REGISTRY_AUTH_FILE"):
            yield Path(path), False
        if runtime := environment.get("XDG_RUNTIME_DIR"):
            yield Path(runtime) / "containers" / "auth.json", False
        configuration = environment.get("XDG_CONFIG_HOME")
        yield (Path(configuration) if configuration else home / ".config") / "containers" / "auth.json", False

    async def _find_in(
        self, document: dict[str, Any], path: Path, host: str, repository: str
    ) -> Credentials | None:
        keys = list(_keys(host, repository))
        helpers = _table(document, "credHelpers", path)
        for key in keys:
            if isinstance(helper := helpers.get(key), str) and helper:
                return await self._ask(helper, key, path)
        store = document.get("credsStore")
        if isinstance(store, str) and store:
            found = await self._ask(store, keys[-1] if host == DEFAULT_HOST else host, path)
            if found is not None:
                return found
        auths = _table(document, "auths", path)
        by_host = {_without_scheme(key): value for key, value in auths.items()}
        for key in keys:
            if isinstance(entry := auths.get(key, by_host.get(_without_scheme(key))), dict):
                found = _parse_entry(entry, f"{path}: auths of {key}")
                if found is not None:
                    return found
        return None

    async def _ask(self, helper: str, server: str, path: Path) -> Credentials | None:
        """Run `docker-credential-HELPER get`. A helper that is missing or fails is warned about and passed over: most images
        need no credentials."""
        if not _HELPER.fullmatch(helper):
            raise ConfigError(f"{path}: {helper[:100]!r} cannot be the name of a credential helper")
        program = f"docker-credential-{helper}"
        output = await _run_helper(program, server.encode(), dict(self._environment))
        if output is None:
            return None
        where = f"{program} get"
        try:
            document = parse_strict(output, where=where)
            user, secret = document["Username"], document["Secret"]
        except (ImageInvalid, KeyError, TypeError):
            log.warning(
                "registry.credential-helper", helper=program, problem="its answer is no JSON of the protocol"
            )
            return None
        if not isinstance(user, str) or not isinstance(secret, str) or not (user or secret):
            return None
        if user == IDENTITY_TOKEN_USER:
            return Credentials(identity_token=secret)
        return Credentials(username=user, password=secret)


def _parse_user(text: str) -> Credentials:
    name, colon, password = text.partition(":")
    if not colon or not name:
        raise UsageError(
            "--user needs a name and a password", hint="--user NAME:PASSWORD, or use docker login"
        )
    return Credentials(username=name, password=password)


def _keys(host: str, repository: str) -> Iterator[str]:
    """What files may call a repository, the most specific first (containers' auth.json allows namespaces)."""
    if host == DEFAULT_HOST:
        for short in _namespaces(repository):
            yield f"docker.io/{short}"
        yield from (DOCKER_HUB_KEY, "index.docker.io", DEFAULT_HOST, DOCKER_HUB, DOCKER_HUB_KEY)
        return
    for short in _namespaces(repository):
        yield f"{host}/{short}"
    yield host


def _namespaces(repository: str) -> Iterator[str]:
    while repository:
        yield repository
        repository = repository.rpartition("/")[0]


def _without_scheme(key: str) -> str:
    """docker logout/login wrote `https://host/v1/` for years; it means the host."""
    bare = key.removeprefix("https://").removeprefix("http://")
    return bare.partition("/")[0] if bare != key or bare.endswith(("/v1/", "/v2/", "/v1", "/v2")) else bare


def check_file(path: str) -> None:
    """Whether a file that somebody chose can be read; raises ConfigError."""
    _read(Path(path), chosen=True)


def _read(path: Path, *, chosen: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if chosen:
            raise ConfigError(
                f"{path}: no such file", hint="docker's config.json is expected there"
            ) from None
        return {}
    except NotADirectoryError:
        return {}
    except OSError as error:
        if not chosen and isinstance(error, PermissionError):
            return {}
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        document = parse_strict(data or b"{}", where=str(path))
    except ImageInvalid as error:
        raise ConfigError(f"{path}: cannot be understood as JSON") from error  # its text may quote a secret
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return document


def _table(document: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} must be an object")
    return value or {}


def _parse_entry(entry: dict[str, Any], where: str) -> Credentials | None:
    def text(key: str) -> str:
        value = entry.get(key) or ""
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {key} must be a text")
        return value

    if token := text("identitytoken"):
        return Credentials(identity_token=token)
    if token := text("registrytoken"):
        return Credentials(registry_token=token)
    if packed := text("auth"):
        try:
            user, colon, password = base64.b64decode(packed, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise ConfigError(f"{where}: auth is not base64 of NAME:PASSWORD") from None
        if not colon:
            raise ConfigError(f"{where}: auth is not base64 of NAME:PASSWORD")
        return Credentials(username=user, password=password.rstrip("\0"))
    if user := text("username"):
        return Credentials(username=user, password=text("password"))
    return None


async def _run_helper(program: str, server: bytes, environment: dict[str, str]) -> bytes | None:
    """The helper's standard output, or None when it has nothing to say or something is wrong with it."""

    def problem(text: str) -> None:
        log.warning("registry.credential-helper", helper=program, problem=text)

    try:
        process = await trio.lowlevel.open_process(
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # may hold what must not be logged
            env=environment,
        )
    except OSError as error:
        problem(f"cannot be run: {error.strerror}")
        return None
    output = bytearray()
    try:
        with trio.move_on_after(HELPER_SECONDS) as scope:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(trio.BrokenResourceError):  # it did not want to know
                await process.stdin.send_all(server)
            await process.stdin.aclose()
            async for piece in process.stdout:
                output += piece
                if len(output) > MAX_HELPER_BYTES:
                    problem("its answer is too long")
                    return None
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):  # a killed process is reaped at once
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()
    if scope.cancelled_caught:
        problem(f"no answer within {HELPER_SECONDS:g} s")
        return None
    if process.returncode != 0:
        if _NOT_FOUND not in output:
            problem(f"ended with status {process.returncode}")
        return None
    return bytes(output)
