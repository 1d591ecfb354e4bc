"""`p2pgz doctor`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from p2pgz.cli.checkup import Finding, examine, host_checks
from p2pgz.cli.client import NodeClient
from p2pgz.cli.context import (
    Settings,
    absolute_reference,
    image_request,
    json_option,
    print_json,
    registry_options,
)
from p2pgz.errors import NodeUnavailable, P2pgzError

SIGNS = {"ok": "ok  ", "warning": "warn", "failed": "FAIL", "skipped": "  - "}


@click.command()
@click.argument("reference", metavar="[IMAGE]", default="")
@registry_options
@json_option
@click.pass_obj
def doctor(settings: Settings, /, reference: str, as_json: bool, **options: Any) -> None:
    """Check this host, the node that runs on it, and the way to peers and, with IMAGE, to its registry.

    Changes nothing and starts nothing. Each failed check says what to do. Exit code 1 if one has failed; warnings are no
    failures. With IMAGE a few of its files are read through the running node, to see a byte come from a peer.
    """
    from p2pgz.telemetry import log

    log.set_up(
        "debug" if settings.verbose else "critical", text=True
    )  # what went wrong is among the findings
    findings = check_everything(settings, reference, options)
    counts = Counter(finding.state for finding in findings)
    if as_json:
        print_json({"checks": [finding._asdict() for finding in findings], **{s: counts[s] for s in SIGNS}})  # type: ignore[index]
    else:
        for finding in findings:
            click.echo(f"{SIGNS[finding.state]}  {finding.check:12} {finding.found}")
            if finding.hint and finding.state != "ok":
                click.echo(f"{'':20}→ {finding.hint}")
    if counts["failed"]:
        raise P2pgzError(
            f"{counts['failed']} of {len(findings)} checks failed",
            hint="what to do stands below each of them",
        )


def check_everything(settings: Settings, reference: str, options: dict[str, Any]) -> list[Finding]:
    """All findings, in the order in which one would mend things."""
    from p2pgz import __version__, directories
    from p2pgz.cli import checkup_network as network
    from p2pgz.config import Config
    from p2pgz.core.reference import parse_reference
    from p2pgz.node import configcheck

    config = Config()

    def configuration() -> Finding:
        nonlocal config
        loaded = settings.load()
        config = loaded.config
        configcheck.check(loaded)
        there = settings.config_path if settings.config_path.exists() else "defaults, no file"
        return Finding("config", "ok", str(there))

    findings = examine([("config", configuration)])
    findings += examine(
        host_checks(
            settings.state_path,
            settings.run_path,
            is_root=directories.is_root(),
            check_filesystem=config.pool.check_filesystem,
        )
    )
    client, status = running(settings)
    image = parse_reference(absolute_reference(reference)) if reference else None
    request = image_request(reference, options) if reference else None
    hosts = (
        [image.host.rpartition(":")[0] or image.host]
        if image is not None and image.transport == "registry"
        else []
    )
    hosts += [text.split("/")[2] for text in config.peers.bootstrap if text.startswith("/dns")]
    checks: list[tuple[str, Any]] = [
        ("ports", lambda: network.ports(config, status)),
        ("dns", lambda: network.names(hosts)),
    ]
    if image is not None:
        checks.append(("registry", lambda: network.registry(image, config, options)))
    checks += [
        ("node", lambda: network.node(status, __version__)),
        ("peers", lambda: network.peers(status, config.peers.bootstrap)),
        ("a byte", lambda: network.byte_from_a_peer(client, status, request)),
    ]
    return findings + examine(checks)


def running(settings: Settings) -> tuple[NodeClient | None, dict[str, Any] | None]:
    """The node of these settings and its status, if one runs and answers."""
    client = NodeClient(settings.run_path)
    try:
        return client, client.status()
    except NodeUnavailable:
        return None, None
