"""What every command shares: which node, which configuration, how to talk, how to print."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from p2pgz.config import Loaded

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """The global options."""

    state_dir: str | None = None
    config_file: str | None = None
    quiet: bool = False
    verbose: bool = False

    @property
    def state_path(self) -> Path:
        """The state directory that selects the node."""
        from p2pgz import directories

        return directories.state_dir(self.state_dir, os.environ, root=directories.is_root())

    @property
    def run_path(self) -> Path:
        """Where the node's sockets are."""
        from p2pgz import directories

        return directories.run_dir(self.state_dir, os.environ, root=directories.is_root())

    @property
    def config_path(self) -> Path:
        """The configuration file, whether it exists or not."""
        from p2pgz import directories

        return (
            Path(self.config_file)
            if self.config_file
            else directories.default_path(os.environ, root=directories.is_root())
        )

    def load(self, flags: dict[str, object] | None = None, *, must_exist: bool = False) -> Loaded:
        """The merged configuration; raises ConfigError."""
        from p2pgz import config

        merged = {"log.level": "debug", **(flags or {})} if self.verbose else flags
        must_exist = must_exist or self.config_file is not None
        return config.load(self.config_path, os.environ, merged, must_exist=must_exist)


def print_json(value: object) -> None:
    """One document on standard output."""
    indent = 2 if sys.stdout.isatty() else None
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a name in an image that is not UTF-8: keep it as an escaped surrogate
        text = json.dumps(value, indent=indent)
    click.echo(text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def registry_options(command: F) -> F:
    """Options of every command that names an image in a registry, spelled as ctr and nerdctl spell them."""
    options = [
        click.option("--plain-http", is_flag=True, help="Speak HTTP to the registry, without TLS."),
        click.option(
            "--platform", default="", metavar="OS/ARCH[/VARIANT]", help="Platform; default: this machine's."
        ),
        click.option(
            "--tlscacert", "ca_file", default="", metavar="FILE", help="CA certificates to trust (PEM)."
        ),
        click.option(
            "--hosts-dir", default="", metavar="DIR", help="Directory of hosts.toml files (mirrors)."
        ),
        click.option(
            "--user", default="", metavar="NAME:PASSWORD", help="Credentials; better: docker login."
        ),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


unverified_option = click.option(
    "--allow-unverified-toc",
    is_flag=True,
    help="Take the registry's word for layers whose TOC nothing vouches for.",
)


def image_request(reference: str, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request about an image, paths made absolute: the node has another working directory."""
    request = {key: value for key, value in options.items() if value not in (None, "", False)}
    for key in ("ca_file", "hosts_dir"):
        if request.get(key):
            request[key] = str(Path(request[key]).absolute())
    return {"reference": absolute_reference(reference), **request}


def absolute(path: str) -> Path:
    """The path from the root, `..` taken away as typed, symlinks kept: what the user sees in `mount`'s output."""
    return Path(os.path.normpath(Path(path).absolute()))


def absolute_reference(reference: str) -> str:
    """`oci:DIR[:TAG]` and `oci-archive:FILE[:TAG]` with an absolute path; anything else unchanged."""
    for transport in ("oci:", "oci-archive:"):
        if reference.startswith(transport):
            return transport + str(absolute(reference.removeprefix(transport)))
    return reference
