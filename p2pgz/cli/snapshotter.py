"""`p2pgz snapshotter`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

import click

from p2pgz.cli.client import NodeClient, running_node
from p2pgz.cli.context import Settings, image_request, registry_options
from p2pgz.errors import NodeUnavailable, P2pgzError
from p2pgz.snapshotter.images import Lazy, Wanted

# images that are being pulled
KNOWN_MAX = 64


class _Known(NamedTuple):
    """What the node said of an image that was asked for by digest."""

    reference: str
    layers: list[tuple[str, str]]
    """digest and chain id of each"""


class NodeImages:
    """The node, asked through its control socket; started when none runs."""

    def __init__(self, settings: Settings, options: dict[str, Any], *, verified_diffids: bool) -> None:
        self._settings = settings
        self._options = options
        self._verified = verified_diffids
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def _node(self) -> NodeClient:
        return running_node(self._settings)

    def find(self, wanted: Wanted) -> Lazy:
        """See `snapshotter.images.Images`. A puller asks for one layer after the other: the node is asked once."""
        with self._lock:
            known = self._known.get(wanted.reference)
        if known is not None and (wanted.layer, wanted.chain_id) in known.layers:
            number = known.layers.index((wanted.layer, wanted.chain_id))
            return Lazy(reference=known.reference, layers=number + 1, total=len(known.layers))
        request = {**image_request(wanted.reference, self._options), "verified_diffids": self._verified}
        asked = {**request, "layer": wanted.layer, "chain_id": wanted.chain_id}
        found = self._node().call("/v1/layers", asked)
        with self._lock:
            if "@" in wanted.reference:  # what a tag means may change
                layers = list(zip(found["layer_digests"], found["chain_ids"], strict=True))
                self._known[wanted.reference] = _Known(found["reference"], layers)
                while len(self._known) > KNOWN_MAX:
                    del self._known[next(iter(self._known))]
        return Lazy(reference=found["reference"], layers=found["layers"], total=found["total"])

    def mount(self, lazy: Lazy, directory: Path) -> None:
        """See `snapshotter.images.Images`. Setuid files and devices are for containers: who mounts decides about them."""
        from p2pgz.mount.attach import attach
        from p2pgz.mount.umount import check_mount_point

        check_mount_point(directory)
        request = image_request(lazy.reference, {**self._options, "directory": str(directory)})
        node = self._node()
        result = node.call("/v1/mounts", {**request, "layers": lazy.layers, "suid": True, "dev": True})
        try:
            descriptor = node.descriptor(result["token"])
        except OSError as error:
            raise NodeUnavailable("the node ended before it gave its mount", hint="try again") from error
        try:
            attach(descriptor, directory)
        finally:
            os.close(descriptor)

    def unpacked(self, wanted: Wanted | None, key: str, reason: str) -> None:
        """See `snapshotter.images.Images`."""
        reference, layer = (wanted.reference, wanted.layer) if wanted else ("", "")
        try:
            node = running_node(self._settings, start=False)
            node.call(
                "/v1/layers/unpacked", {"reference": reference, "layer": layer, "key": key, "reason": reason}
            )
        except P2pgzError:
            pass  # the log has it


@click.command()
@click.option(
    "--address",
    default="",
    metavar="SOCKET",
    help="Where containerd connects; default: p2pgz.sock beside api.sock.",
)
@click.option(
    "--root", default="", metavar="DIR", help="Its own files; default: snapshotter/ of the state directory."
)
@registry_options
@click.pass_obj
def snapshotter(settings: Settings, /, address: str, root: str, **options: Any) -> None:
    """Serve containerd as a remote snapshotter, in the foreground: its containers start before their images are here.

    Asks the node of this state directory, and starts one that ends after its last mount where none runs. SIGTERM ends it;
    containers go on. The registry options are for images whose registry the node's configuration does not describe.
    """
    import structlog

    from p2pgz.node.supervision import Supervisor
    from p2pgz.snapshotter.server import served
    from p2pgz.snapshotter.service import Snapshotter
    from p2pgz.telemetry import log

    config = settings.load().config
    log.set_up(config.log.level)
    socket = Path(address).absolute() if address else settings.run_path / "p2pgz.sock"
    directory = Path(root).absolute() if root else settings.state_path / "snapshotter"
    images = NodeImages(settings, options, verified_diffids=config.snapshotter.require_verified_diffid)
    service = Snapshotter(directory, images)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with service.opened(), served(service, socket):
        structlog.get_logger(component="snapshotter").info(
            "snapshotter.ready", address=str(socket), pid=os.getpid()
        )
        supervisor = Supervisor(os.environ)
        supervisor.ready()
        ended.wait()
        supervisor.stopping()
