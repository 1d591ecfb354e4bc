"""What is wrong with a configuration beyond its types: addresses, names, files, and keys that contradict each other.

Called before a node starts, before it takes a changed configuration, by `p2pgz config check` and by `p2pgz doctor`. All
that is wrong is said at once. Nothing is asked over the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath

from p2pgz.config import Config, Loaded, PeersConfig
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.reference import parse_reference
from p2pgz.core.sharing import Mode
from p2pgz.core.structcheck import Mistake
from p2pgz.errors import P2pgzError
from p2pgz.node.live import policy_of
from p2pgz.node.peering import read_admission, read_zone
from p2pgz.node.seeding import configured_seeds
from p2pgz.registry.credentials import check_file
from p2pgz.registry.transport import TlsSettings
from p2pgz.web.http import AUTO, NONE, parse_listen

Check = tuple[str, Callable[[], object]]


def check(loaded: Loaded, *, files: bool = True) -> Config:
    """The configuration, if it can be used; raises ConfigError. `files`: those that may also come later must be there."""
    found = [*_failures(_parsing(loaded.config)), *_contradictions(loaded.config)]
    if files:
        found += _failures(_reading(loaded.config))
    if found:
        raise loaded.places.error(found)
    return loaded.config


def _failures(checks: Iterator[Check]) -> Iterator[Mistake]:
    for key, call in checks:
        try:
            call()
        except P2pgzError as error:
            yield Mistake(key, error.what.removeprefix(f"{key}: "), error.hint)


def _parsing(config: Config) -> Iterator[Check]:
    peers = config.peers
    for text in peers.listen:
        yield "peers.listen", partial(PeerAddress.parse, text, where="peers.listen", any_port=True)
    for key, addresses in (("peers.announce", peers.announce), ("peers.bootstrap", peers.bootstrap)):
        for text in addresses:
            yield key, partial(PeerAddress.parse, text, where=key)
    for key, ids in (("peers.allow", peers.allow), ("peers.trusted_indexers", peers.trusted_indexers)):
        for text in ids:
            yield key, partial(PeerId.parse, text)
    yield "peers.cluster_key_file", lambda: read_admission(_key_alone(peers))
    yield "peers.zone", lambda: read_zone(peers)
    if config.http.listen not in (AUTO, NONE):
        yield "http.listen", lambda: parse_listen(config.http.listen)
    yield "sharing", lambda: policy_of(config.sharing)
    yield "seed.images", lambda: configured_seeds(config.seed)
    for n, mount in enumerate(config.mounts):
        yield f"mounts[{n}].reference", partial(parse_reference, mount.reference)


def _key_alone(config: PeersConfig) -> PeersConfig:
    return PeersConfig(cluster_key_file=config.cluster_key_file)


def _reading(config: Config) -> Iterator[Check]:
    """Files that are read when they are needed."""
    if config.registry.ca_file:
        yield "registry.ca_file", lambda: TlsSettings(ca_files=(config.registry.ca_file,)).context()
    if config.registry.docker_config:
        yield "registry.docker_config", lambda: check_file(config.registry.docker_config)


def _contradictions(config: Config) -> Iterator[Mistake]:
    """Keys that cannot both be meant."""
    peers = config.peers
    if len(peers.listen) > 1:
        yield Mistake(
            "peers.listen",
            f"{len(peers.listen)} addresses: a node listens at one",
            "0.0.0.0 or :: is every interface",
        )
    directories = Counter(mount.directory for mount in config.mounts)
    for n, mount in enumerate(config.mounts):
        if not PurePosixPath(mount.directory).is_absolute():
            yield Mistake(f"mounts[{n}].directory", f"{mount.directory!r} is not an absolute path")
        elif directories[mount.directory] > 1:
            yield Mistake(
                f"mounts[{n}].directory",
                f"{mount.directory} is used by {directories[mount.directory]} mounts",
            )
    if peers.enabled == "never":
        wanted = {
            "peers.bootstrap": peers.bootstrap,
            "peers.mdns": peers.mdns,
            "seed.images": config.seed.images,
        }
        for key, value in wanted.items():
            if value:
                yield Mistake(key, 'is set, and peers.enabled = "never"', "leave one of them out")
    yield from _seeds_for_nobody(config)


def _seeds_for_nobody(config: Config) -> Iterator[Mistake]:
    try:
        policy, seeds = policy_of(config.sharing), configured_seeds(config.seed)
    except P2pgzError:
        return  # said already
    for reference in seeds:
        if policy.mode(reference.name) is Mode.NONE:
            yield Mistake(
                "seed.images",
                f"{reference} is to be given to peers, and [[sharing]] gives it to nobody",
                "leave one of them out",
            )
