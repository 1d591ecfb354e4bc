"""How a registry is reached, how patiently, and what was counted on the way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryOptions:
    """What a user may say about reaching registries. Equal options may share a client. `user` never shows in a repr.

    Registries on the loopback interface need no `plain_http`: TLS is tried first, and plain HTTP when they
    do not speak it.
    """

    plain_http: bool = False
    """speak HTTP without TLS, and allow what only that would: tokens and redirects over HTTP"""
    ca_file: str = ""
    """PEM file of certificates to trust besides the system's"""
    hosts_dir: str = ""
    """containerd's directory of hosts.toml files"""
    docker_config: str = ""
    """docker's config.json; empty: $DOCKER_CONFIG, then ~/.docker/config.json"""
    user: str | None = field(default=None, repr=False)
    """`name:password`, which wins over all credential files"""


@dataclass(slots=True)
class RegistryStats:
    """Counters of one client; plain ints, read at scrape time."""

    requests: int = 0
    """HTTP requests sent, those to token and storage servers included"""
    answers: Counter[int] = field(default_factory=Counter)
    """their status codes; 0: there was no answer"""
    received_bytes: int = 0
    """body bytes received"""
    sent_bytes: int = 0
    """body bytes sent"""
    retries: int = 0
    """requests sent again after a failure"""
    refused_at: float = float("-inf")
    """when the registry itself, none of its mirrors, last answered that it will not do as asked: it is there"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed request is sent again:

    exponentially later, with jitter so that hosts do not come back in step.
    """

    attempts: int = (
        5  # with the delays below: about 3 s in all, the time of a registry's restart behind a balancer
    )
    first_seconds: float = 0.2
    longest_seconds: float = 5.0
    random: random.Random = field(default_factory=random.Random)

    def delay_seconds(self, failures: int) -> float:
        """How long to wait after so many failures in a row (1 and more)."""
        whole: float = min(self.longest_seconds, self.first_seconds * 2.0 ** min(failures - 1, 16))
        return whole * (0.5 + self.random.random() / 2)
