"""Every source keeps the contract: fake registry, redirects, tokens, layout, archive, and the real thing."""

from contextlib import asynccontextmanager

import pytest
import trio

from p2pgz.core.reference import parse_reference
from p2pgz.registry import RegistryOptions, RetryPolicy, open_sink, open_source
from p2pgz.testing.conformance_source import SOURCE_CASES, push_sample
from p2pgz.testing.docker_registry import docker_registry
from p2pgz.testing.fake_registry import FakeRegistry

QUICK = RetryPolicy(first_seconds=0.001, longest_seconds=0.01)


@asynccontextmanager
async def fake(tmp_path, **changes):
    async with FakeRegistry.open() as registry:
        for name, value in changes.items():
            setattr(registry, name, value)
        yield (
            parse_reference(f"{registry.address}/team/app"),
            RegistryOptions(user="me:secret" if changes.get("auth") else None),
        )
        assert registry.leaks == []


@asynccontextmanager
async def layout(tmp_path):
    yield parse_reference(f"oci:{tmp_path}/layout"), RegistryOptions()


@asynccontextmanager
async def archive(tmp_path):
    yield parse_reference(f"oci-archive:{tmp_path}/image.tar"), RegistryOptions()


PLACES = {
    "fake": fake,
    "fake-storage": lambda path: fake(path, storage=True),
    "fake-bearer": lambda path: fake(path, auth="bearer", users={"me": "secret"}, storage=True),
    "fake-basic": lambda path: fake(path, auth="basic", users={"me": "secret"}),
    "layout": layout,
    "archive": archive,
}


async def check_all(reference, options):
    async with open_sink(reference, options, retry=QUICK) as sink:
        await push_sample(sink, reference)
    for case in SOURCE_CASES:
        async with open_source(reference, options, retry=QUICK) as source:
            with trio.fail_after(10):
                await case(source, reference)


@pytest.mark.trio
@pytest.mark.parametrize("place", PLACES)
async def test_source_keeps_the_contract(place, tmp_path):
    async with PLACES[place](tmp_path) as (reference, options):
        await check_all(reference, options)


@pytest.mark.registry
def test_debians_registry_keeps_the_contract(tmp_path):
    with docker_registry(tmp_path) as address:
        trio.run(check_all, parse_reference(f"{address}/team/app"), RegistryOptions(plain_http=True))
