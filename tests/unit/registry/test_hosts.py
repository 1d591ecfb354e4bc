"""hosts.toml as containerd reads it, and mirrors at work."""

import pytest
import trio

from p2pgz.core.reference import parse_reference
from p2pgz.errors import ConfigError, ImageNotFound, SourceUnavailable
from p2pgz.registry import RegistryOptions, open_sink, open_source
from p2pgz.registry import client as client_module
from p2pgz.registry.hosts import endpoints_for, is_loopback
from p2pgz.testing.conformance_source import read_range
from p2pgz.testing.fake_registry import FakeRegistry
from p2pgz.testing.registry_faults import Fault

TAG = parse_reference("registry.example/team/app:latest")


def bases(host, **options):
    return [endpoint.base.full for endpoint in endpoints_for(host, RegistryOptions(**options))]


def write(tmp_path, name, text):
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "hosts.toml").write_text(text)
    return str(tmp_path)


def test_registry_itself_without_configuration(tmp_path):
    assert bases("registry.example:5000") == ["https://registry.example:5000/v2"]
    assert bases("docker.io") == ["https://registry-1.docker.io/v2"]
    assert bases("registry.example", plain_http=True) == ["http://registry.example/v2"]
    assert bases("registry.example", hosts_dir=str(tmp_path / "none")) == ["https://registry.example/v2"]


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        ("localhost", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("a.localhost", True),
        ("localhost.example", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback(host, is_it):
    assert is_loopback(host) == is_it


def test_mirrors_come_first_with_their_settings(tmp_path):
    folder = write(
        tmp_path,
        "docker.io",
        """
server = "https://registry.example/prefix"
ca = "server.pem"
[host."http://mirror.example:5000"]
  capabilities = ["pull", "resolve"]
  [host."http://mirror.example:5000".header]
    x-team = ["a", "b"]
[host."https://other.example/odd/path"]
  override_path = true
  skip_verify = true
  ca = ["/etc/a.pem", "b.pem"]
  client = [["c.pem", "k.pem"]]
[host."registry-1.docker.io"]
""",
    )
    first, second, itself, server = endpoints_for("docker.io", RegistryOptions(hosts_dir=folder))
    assert first.base.full == "http://mirror.example:5000/v2"
    assert first.capabilities == {"pull", "resolve"}
    assert first.headers == {"x-team": "a, b"}
    assert first.namespace == "docker.io"
    assert first.mirror
    assert second.base.full == "https://other.example/odd/path"
    assert second.tls.skip_verify
    assert second.tls.ca_files == ("/etc/a.pem", f"{tmp_path}/docker.io/b.pem")
    assert second.tls.client_pairs == ((f"{tmp_path}/docker.io/c.pem", f"{tmp_path}/docker.io/k.pem"),)
    assert itself.namespace == ""
    assert server.base.full == "https://registry.example/prefix/v2"
    assert server.tls.ca_files == (f"{tmp_path}/docker.io/server.pem",)
    assert not server.mirror


def test_directories_in_containerds_order(tmp_path):
    folder = write(tmp_path, "_default", 'server = "https://default"')
    assert bases("registry.example:5000", hosts_dir=folder) == ["https://default/v2"]
    write(tmp_path, "registry.example:5000", 'server = "https://colon"')
    assert bases("registry.example:5000", hosts_dir=folder) == ["https://colon/v2"]
    write(tmp_path, "registry.example_5000_", 'server = "https://underscore"')
    assert bases("registry.example:5000", hosts_dir=folder) == ["https://underscore/v2"]


def test_directory_without_hosts_toml_holds_certificates(tmp_path):
    folder = tmp_path / "registry.example"
    folder.mkdir()
    (folder / "ca.crt").touch()
    (folder / "me.cert").touch()
    (endpoint,) = endpoints_for(
        "registry.example", RegistryOptions(hosts_dir=str(tmp_path), ca_file="/x.pem")
    )
    assert endpoint.tls.ca_files == (str(folder / "ca.crt"), "/x.pem")
    assert endpoint.tls.client_pairs == ((str(folder / "me.cert"), str(folder / "me.key")),)


@pytest.mark.parametrize(
    "text",
    ["x", "host = 1", "server = 1", '[host."ftp://x"]', '[host."https://"]', '[host."https://x"]\nca = 1',
     '[host."https://x"]\ncapabilities = ["fly"]', '[host."https://x"]\nskip_verify = "yes"',
     '[host."https://x"]\nheader = 1',
     '[host."https://x"]\nclient = [["a", 1]]', '[host."https://x"]\noverride_path = 1', '[host]\n"https://x" = 1', '[host."https://u:p@x"]'],
)  # fmt: skip
def test_odd_file_is_a_config_error(tmp_path, text):
    with pytest.raises(ConfigError, match=r"hosts\.toml"):
        bases("registry.example", hosts_dir=write(tmp_path, "registry.example", text))


@pytest.fixture
def mirrored(tmp_path, quick):
    """A mirror and a registry `upstream.test`, and options that know both."""
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def open_all():
        async with FakeRegistry.open() as mirror, FakeRegistry.open() as upstream:
            able = 'capabilities = ["pull", "resolve"]'
            text = f'server = "http://{upstream.address}"\n[host."http://{mirror.address}"]\n{able}'
            options = RegistryOptions(hosts_dir=write(tmp_path, "upstream.test", text), user="me:s3cret")
            async with open_source(parse_reference("upstream.test/team/app"), options, retry=quick) as source:
                yield mirror, upstream, source, options

    return open_all


@pytest.mark.trio
async def test_mirror_answers_and_is_told_the_namespace(mirrored):
    async with mirrored() as (mirror, upstream, source, _):
        image = mirror.store.add_image("team/app", [b"layer"])
        assert await source.resolve(TAG) == image
        await source.document(image)
        assert upstream.requests == []
        assert all(request.query == {"ns": "upstream.test"} for request in mirror.requests)


@pytest.mark.trio
async def test_mirror_without_the_image_is_passed_over_this_time_only(mirrored):
    async with mirrored() as (mirror, upstream, source, _):
        image = upstream.store.add_image("team/app", [b"layer"])
        assert await source.resolve(TAG) == image
        await source.document(image)
        assert len(mirror.requests) == 2
        assert all("ns" not in request.query for request in upstream.requests)


@pytest.mark.trio
@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(drop_after=-1), Fault(body=b"junk"), Fault(endless=True),
     Fault(headers={"Content-Type": "text/html"}),
     Fault(status=429, headers={"Retry-After": "50"}), Fault(redirect="/v2/x/blobs/y", times=9)],
    ids=repr,
)  # fmt: skip
async def test_bad_mirror_is_passed_over_for_a_while(mirrored, fault, monkeypatch):
    async with mirrored() as (mirror, upstream, source, _):
        image = mirror.store.add_image("team/app", [b"layer"])
        upstream.store.add_image("team/app", [b"layer"])
        mirror.faults.append(fault)
        with trio.fail_after(5):
            await source.document(image)
        before = len(mirror.requests)
        await source.document(image)
        assert len(mirror.requests) == before
        monkeypatch.setattr(client_module, "MIRROR_PENALTY_SECONDS", 0)
        source._client._ways[0].passed_over_until = 0
        fault.times = 0
        await source.document(image)
        assert len(mirror.requests) == before + 1


@pytest.mark.trio
async def test_blob_goes_on_at_the_registry_when_the_mirror_breaks_off(mirrored):
    data = bytes(range(256)) * 1000
    async with mirrored() as (mirror, upstream, source, _):
        blob = mirror.store.add_blob("team/app", data)
        upstream.store.add_blob("team/app", data)
        mirror.faults.append(Fault(drop_after=100_000))
        assert await read_range(source, blob, 0, len(data)) == data
        assert upstream.requests[0].headers["range"] == f"bytes=100000-{len(data) - 1}"


@pytest.mark.trio
async def test_nobody_has_it(mirrored):
    async with mirrored() as (_, upstream, source, _):
        with pytest.raises(ImageNotFound):
            await source.resolve(TAG)
        upstream.faults.append(Fault(status=500, times=99))
        with pytest.raises(SourceUnavailable):
            await source.resolve(TAG)


@pytest.mark.trio
async def test_mirror_gets_no_credentials_of_the_registry(mirrored):
    async with mirrored() as (mirror, upstream, source, _):
        mirror.auth, mirror.users = "basic", {"me": "s3cret"}
        upstream.auth, upstream.users = "basic", {"me": "s3cret"}
        image = upstream.store.add_image("team/app", [b"layer"])
        assert await source.resolve(TAG) == image
        assert not any("authorization" in request.headers for request in mirror.requests)


@pytest.mark.trio
async def test_pushes_go_to_the_registry(mirrored, quick):
    async with mirrored() as (mirror, upstream, _, options):
        async with open_sink(parse_reference("upstream.test/team/app"), options, retry=quick) as sink:
            await sink.put_document(b'{"layers": []}', "application/json", TAG)
        assert mirror.requests == []
        assert ("team/app", "latest") in upstream.store.tags


@pytest.mark.trio
async def test_header_of_hosts_toml_stays_at_its_host(tmp_path, quick):
    async with FakeRegistry.open() as registry:
        registry.storage = True
        text = f'server = "http://{registry.address}"\n[header]\nx-secret = "s3cret"'
        options = RegistryOptions(hosts_dir=write(tmp_path, "upstream.test", text))
        blob = registry.store.add_blob("team/app", b"0123")
        async with open_source(parse_reference("upstream.test/team/app"), options, retry=quick) as source:
            await read_range(source, blob, 0, 2)
        assert registry.seen(server="registry")[0].headers["x-secret"] == "s3cret"
        assert "x-secret" not in registry.seen(server="storage")[0].headers
