"""A fake registry and sources on it, without patience: retries wait milliseconds."""

from contextlib import asynccontextmanager

import pytest

from p2pgz.core.reference import parse_reference
from p2pgz.registry import RegistryOptions, RetryPolicy, open_source
from p2pgz.testing.fake_registry import FakeRegistry


@pytest.fixture(autouse=True)
def nobodys_home(tmp_path, monkeypatch):
    """No credentials of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


PLAIN = RegistryOptions(plain_http=True)


@pytest.fixture
def quick():
    return RetryPolicy(first_seconds=0.001, longest_seconds=0.01)


@pytest.fixture
def opened(quick):
    """`async with opened(options) as (registry, source):` a fake registry and a source of its repository team/app."""

    @asynccontextmanager
    async def open_both(options=PLAIN, tls=None):
        async with (
            FakeRegistry.open(tls=tls) as registry,
            open_source(parse_reference(f"{registry.address}/team/app"), options, retry=quick) as source,
        ):
            yield registry, source

    return open_both
