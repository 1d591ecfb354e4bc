"""What `p2pgz doctor` looks at beyond this host: names, the registry and its credentials, the node and its peers."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from p2pgz.cli.checkup import Finding, port
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.errors import AuthRefused, P2pgzError

if TYPE_CHECKING:
    from p2pgz.cli.client import NodeClient
    from p2pgz.config import Config
    from p2pgz.core.reference import Reference

LOOKUP_SECONDS: Final = 5.0
CONNECT_SECONDS: Final = 3.0
REGISTRY_SECONDS: Final = 20.0
# the byte that is to come from a peer: files of an image are tried until one is not here yet
FILES_TRIED: Final = 8
FILE_MAX_BYTES: Final = 4 << 20
BOOTSTRAPS_TRIED: Final = 8


def look_up(name: str) -> list[str]:
    """The addresses of a name; raises OSError. A resolver that does not answer is not waited for."""
    answer: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(
                sorted({str(row[4][0]) for row in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
            )
        except OSError as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answer.get(timeout=LOOKUP_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {LOOKUP_SECONDS:g} s") from None
    if isinstance(found, OSError):
        raise found
    return found


def names(wanted: Iterable[str], look: Callable[[str], list[str]] = look_up) -> list[Finding]:
    """Whether the names that the configuration and the reference need can be resolved."""
    found = []
    for name in dict.fromkeys(wanted):
        try:
            found.append(Finding("dns", "ok", f"{name} is {', '.join(look(name)[:3])}"))
        except OSError as error:
            found.append(
                Finding(
                    "dns",
                    "failed",
                    f"{name}: {error.strerror or error}",
                    "check the spelling, /etc/resolv.conf and /etc/hosts",
                )
            )
    return found or [Finding("dns", "skipped", "no name is needed")]


def ports(config: Config, status: dict[str, Any] | None) -> list[Finding]:
    """Whether the ports that the configuration names can be had; those of a running node are its own."""
    from p2pgz.node.peering import DEFAULT_PORT as PEERS_PORT
    from p2pgz.web import http

    listen = config.peers.listen[0] if config.peers.listen else ""
    address = PeerAddress.parse(listen, where="peers.listen", any_port=True) if listen else None
    host, number = (address.host, address.port) if address is not None else ("", PEERS_PORT)
    findings = []
    if status is not None:
        findings.append(
            Finding(
                "ports",
                "ok",
                f"the node listens at {', '.join(status['node']['addrs']) or 'no address for peers'}",
            )
        )
        findings.append(
            Finding("ports", "ok", f"its page is at {', '.join(status['node']['http']) or 'no address'}")
        )
        return findings
    if number and config.peers.enabled != "never":
        findings.append(_or_any(port("ports", host, number, ours=False), is_default=address is None))
    text = config.http.listen
    if text != http.NONE:
        host, number = (http.LOOPBACK, http.DEFAULT_PORT) if text == http.AUTO else http.parse_listen(text)
        if number:
            findings.append(_or_any(port("ports", host, number, ours=False), is_default=text == http.AUTO))
    return findings or [Finding("ports", "skipped", "none is needed")]


def _or_any(finding: Finding, *, is_default: bool) -> Finding:
    """A default port that is taken is replaced by another one."""
    if finding.state == "failed" and is_default:
        return finding._replace(
            state="warning", hint="the node will use any other one; name one to be found at"
        )
    return finding


def registry(reference: Reference, config: Config, options: dict[str, Any]) -> list[Finding]:
    """Whether the registry knows the image and lets us in, and whether the image is lazy."""
    import trio

    from p2pgz.registry.credentials import CredentialStore
    from p2pgz.registry.opening import open_source
    from p2pgz.registry.options import RegistryOptions, RetryPolicy

    access = RegistryOptions(
        plain_http=options.get("plain_http", False) or reference.host in config.registry.plain_http,
        ca_file=options.get("ca_file") or config.registry.ca_file,
        hosts_dir=options.get("hosts_dir") or config.registry.hosts_dir,
        docker_config=config.registry.docker_config,
        user=options.get("user") or None,
    )

    async def ask() -> list[Finding]:
        findings = []
        if reference.transport == "registry":
            credentials = await CredentialStore(access).find(reference.host, reference.repository)
            whose = (
                "some are configured for it"
                if credentials is not None
                else "none are configured for it; public images need none"
            )
            findings.append(Finding("credentials", "ok", f"{reference.host}: {whose}"))
        began = time.monotonic()
        async with open_source(reference, access, retry=RetryPolicy(attempts=2)) as source:
            try:
                with trio.fail_after(REGISTRY_SECONDS):
                    descriptor = await source.resolve(reference)
                    await source.document(descriptor)
            except trio.TooSlowError:
                findings.append(
                    Finding(
                        "registry",
                        "failed",
                        f"{reference.host}: no answer within {REGISTRY_SECONDS:g} s",
                        "is a firewall or a proxy between?",
                    )
                )
            except AuthRefused as error:
                findings.append(
                    Finding(
                        "credentials",
                        "failed",
                        error.what,
                        error.hint or "log in: docker login, podman login",
                    )
                )
            except P2pgzError as error:
                findings.append(
                    Finding(
                        "registry",
                        "failed",
                        error.what,
                        error.hint or "`p2pgz ls` of the same reference says more",
                    )
                )
            else:
                findings.append(
                    Finding(
                        "registry",
                        "ok",
                        f"{reference} is {descriptor.digest}, answered in {1000 * (time.monotonic() - began):.0f} ms",
                    )
                )
        return findings

    return trio.run(ask)


def node(status: dict[str, Any] | None, version: str) -> list[Finding]:
    """How the running node is, as it says itself."""
    if status is None:
        return [
            Finding(
                "node",
                "skipped",
                "none runs for this state directory",
                "`p2pgz node` starts one; `p2pgz mount` one for itself",
            )
        ]
    about = status["node"]
    findings = [
        Finding(
            "node",
            "ok",
            f"runs with pid {about['pid']}, version {about['version']}, up {about['uptime_seconds']:.0f} s",
        )
    ]
    if about["version"] != version:
        findings.append(
            Finding(
                "node",
                "warning",
                f"it is version {about['version']}, this command is {version}",
                "`p2pgz upgrade` lets it go on as the installed one",
            )
        )
    if about["identity_twins"]:
        findings.append(
            Finding(
                "node",
                "failed",
                "another host has the same identity",
                "remove the key from one of the state directories and restart it",
            )
        )
    if status["config"]["refused"]:
        findings.append(
            Finding(
                "node",
                "failed",
                f"the configuration is not in effect: {status['config']['refused']}",
                "correct it, then send SIGHUP",
            )
        )
    if status["config"]["waiting_for_restart"]:
        findings.append(
            Finding(
                "node",
                "warning",
                f"changed, but not in effect: {', '.join(status['config']['waiting_for_restart'])}",
                "`p2pgz upgrade` restarts it and keeps its mounts",
            )
        )
    pool = status["pool"]
    if pool["state"] != "keeping":
        said = f": {pool['error']}" if pool["error"] else ""
        findings.append(
            Finding(
                "node",
                "failed",
                f"its pool is {pool['state']}{said}",
                "free some space, or raise pool.quota_bytes",
            )
        )
    if pool["lost_chunks"] or pool["scrub_wrong_chunks"]:
        findings.append(
            Finding(
                "node",
                "warning",
                f"{pool['lost_chunks'] + pool['scrub_wrong_chunks']} chunks had changed on the disk",
                "they were fetched again; look at the disk's health",
            )
        )
    lost = [mount for mount in status["mounts"] if mount["state"] == "lost"]
    return findings + [Finding("node", "failed", f"{mount['dir']}: {mount['error']}") for mount in lost]


def peers(status: dict[str, Any] | None, bootstrap: list[str]) -> list[Finding]:
    """Whether others can be reached, and reach us."""
    findings = []
    for text in bootstrap[:BOOTSTRAPS_TRIED]:
        address = PeerAddress.parse(text, where="peers.bootstrap")
        try:
            socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS).close()
            findings.append(Finding("peers", "ok", f"{text} accepts connections"))
        except OSError as error:
            findings.append(
                Finding(
                    "peers",
                    "failed",
                    f"{text}: {error.strerror or error}",
                    "does a node run there? does a firewall let TCP through?",
                )
            )
    if status is None or status["node"]["peer_id"] is None:
        why = "no node runs" if status is None else "this node takes no part in a swarm"
        return [*findings, Finding("peers", "skipped", f"not seen: {why}")]
    ids = {peer["peer_id"] for peer in status["peers"]}
    if not ids:
        hint = (
            "none of the bootstrap addresses let it in: do all hosts have the same cluster key?"
            if bootstrap
            else "name one to begin with: p2pgz node --bootstrap ADDRESS"
        )
        return [
            *findings,
            Finding("peers", "failed" if bootstrap else "warning", "no peer is connected", hint),
        ]
    findings.append(Finding("peers", "ok", f"{len(ids)} are connected"))
    accepted = status["node"].get("connections_accepted", 0)
    if accepted:
        findings.append(
            Finding("peers", "ok", f"others reach this node: {accepted} connections came from them")
        )
    else:
        findings.append(
            Finding(
                "peers",
                "warning",
                "no peer has connected to this node yet",
                "it only takes, unless they reach its address: is a firewall or NAT before it? see peers.announce",
            )
        )
    if status["node"]["faulty_peers"]:
        findings.append(
            Finding(
                "peers",
                "warning",
                f"{len(status['node']['faulty_peers'])} have lost their place for faults",
                "the status says which, and why",
            )
        )
    return findings


def byte_from_a_peer(
    client: NodeClient | None, status: dict[str, Any] | None, request: dict[str, Any] | None
) -> Finding:
    """Whether peers really give something: what they gave so far, else one file of the image, read through the node."""
    name = "a byte"
    if client is None or status is None or status["node"]["peer_id"] is None:
        return Finding(name, "skipped", "that needs a node with peers")
    if (given := status["sources"]["peer"]["bytes"]) > 0:
        return Finding(name, "ok", f"{given} bytes came from peers since the node started, each verified")
    if request is None:
        return Finding(
            name,
            "skipped",
            "nothing has come from a peer yet",
            "p2pgz doctor IMAGE, with an image that a peer has, tries it",
        )
    listed = client.call("/v1/files", {**request, "path": "/", "recursive": True})["entries"]
    files = [entry for entry in listed if entry["type"] == "reg" and 0 < entry["size"] <= FILE_MAX_BYTES]
    for entry in files[:: max(1, len(files) // FILES_TRIED)][:FILES_TRIED]:
        for _ in client.read("/v1/content", {**request, "path": entry["name"]}):
            pass
        sources = client.status()["sources"]
        if sources["peer"]["bytes"]:
            return Finding(
                name, "ok", f"{entry['name']}: {sources['peer']['bytes']} bytes came from peers, verified"
            )
    return Finding(
        name,
        "warning",
        "what was read came from the registry, or was here",
        "no connected peer has this image: seed it on one, `p2pgz seed`",
    )
