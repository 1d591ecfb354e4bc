"""TLS: whose certificates are trusted, and when plain HTTP is spoken instead."""

import ssl
from contextlib import asynccontextmanager

import pytest
import trustme

from p2pgz.core.reference import parse_reference
from p2pgz.errors import ConfigError, SourceUnavailable
from p2pgz.registry import RegistryOptions, open_source
from p2pgz.registry.transport import TlsSettings
from p2pgz.testing.fake_registry import FakeRegistry
from p2pgz.testing.registry_faults import Fault


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def server_context(authority, *, wants_client=False):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if wants_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@asynccontextmanager
async def serving(quick, options, tls):
    async with FakeRegistry.open(tls=tls) as registry:
        reference = parse_reference(f"{registry.address}/team/app:latest")
        async with open_source(reference, options, retry=quick) as source:
            yield registry, source, reference


@pytest.mark.trio
async def test_own_ca_is_trusted(authority, ca_file, quick):
    async with serving(quick, RegistryOptions(ca_file=ca_file), server_context(authority)) as (
        registry,
        source,
        reference,
    ):
        registry.storage = True
        image = registry.store.add_image("team/app", [b"layer"])
        assert await source.resolve(reference) == image
        await source.document(image)


@pytest.mark.trio
async def test_unknown_ca_is_refused_at_once_and_without_falling_back(authority, quick):
    async with serving(quick, RegistryOptions(), server_context(authority)) as (registry, source, reference):
        with pytest.raises(SourceUnavailable, match="not trusted") as caught:
            await source.resolve(reference)
        assert "--tlscacert" in caught.value.hint
        assert source.stats.requests == 1
        assert registry.requests == []


@pytest.mark.trio
async def test_skip_verify_of_hosts_toml(authority, tmp_path, quick):
    async with FakeRegistry.open(tls=server_context(authority)) as registry:
        folder = tmp_path / "upstream.test"
        folder.mkdir()
        (folder / "hosts.toml").write_text(f'server = "https://{registry.address}"\nskip_verify = true')
        image = registry.store.add_image("team/app", [b"layer"])
        reference = parse_reference("upstream.test/team/app:latest")
        async with open_source(reference, RegistryOptions(hosts_dir=str(tmp_path)), retry=quick) as source:
            assert await source.resolve(reference) == image


@pytest.mark.trio
async def test_client_certificate_of_hosts_toml(authority, ca_file, tmp_path, quick):
    async with FakeRegistry.open(tls=server_context(authority, wants_client=True)) as registry:
        folder = tmp_path / "upstream.test"
        folder.mkdir()
        mine = authority.issue_cert("me@example.org")
        mine.private_key_and_cert_chain_pem.write_to_path(str(folder / "me.pem"))
        text = f'server = "https://{registry.address}"\nca = "{ca_file}"\nclient = "me.pem"'
        (folder / "hosts.toml").write_text(text)
        image = registry.store.add_image("team/app", [b"layer"])
        reference = parse_reference("upstream.test/team/app:latest")
        async with open_source(reference, RegistryOptions(hosts_dir=str(tmp_path)), retry=quick) as source:
            assert await source.resolve(reference) == image


@pytest.mark.trio
async def test_loopback_registry_without_tls_needs_no_option(quick):
    async with serving(quick, RegistryOptions(), None) as (registry, source, reference):
        image = registry.store.add_image("team/app", [b"layer"])
        assert await source.resolve(reference) == image


@pytest.mark.trio
async def test_redirect_from_tls_to_plain_http_is_refused(authority, ca_file, quick):
    async with serving(quick, RegistryOptions(ca_file=ca_file), server_context(authority)) as (
        registry,
        source,
        _,
    ):
        image = registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(Fault(on="GET", redirect="http://127.0.0.1:1/x?signature=s3cret"))
        with pytest.raises(SourceUnavailable, match="without TLS") as caught:
            await source.document(image)
        assert "s3cret" not in str(caught.value)


@pytest.mark.trio
async def test_nobody_listens(quick):
    reference = parse_reference("127.0.0.1:1/team/app:latest")
    async with open_source(reference, RegistryOptions(), retry=quick) as source:
        with pytest.raises(SourceUnavailable, match=r"(?i)refused"):
            await source.resolve(reference)


@pytest.mark.parametrize(
    "text", [None, "", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_unusable_ca_file_is_a_config_error(tmp_path, text):
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        TlsSettings(ca_files=(str(path),)).context()
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        TlsSettings(client_pairs=((str(path), ""),)).context()
