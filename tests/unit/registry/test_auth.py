"""Basic and Bearer against the fake registry; tokens are shared, renewed, and never shown."""

import base64
import json

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.reference import parse_reference
from p2pgz.errors import AuthRefused, SourceUnavailable, UsageError
from p2pgz.registry import RegistryOptions, open_source
from p2pgz.registry.auth import parse_challenges
from p2pgz.registry.credentials import Credentials
from p2pgz.testing.conformance_source import read_range
from p2pgz.testing.fake_registry import FakeRegistry
from p2pgz.testing.registry_faults import Fault

ME = RegistryOptions(plain_http=True, user="me:s3cret")
TAG = parse_reference("registry.example/team/app:latest")


def test_challenges_are_parsed():
    header = (
        'Bearer realm="https://a/t?x=1,2",service="s \\"q\\"",scope="repository:a/b:pull,push", Basic realm=x'
    )
    bearer, basic = parse_challenges(header)
    assert bearer.scheme == "bearer"
    assert bearer.parameters == {
        "realm": "https://a/t?x=1,2",
        "service": 's "q"',
        "scope": "repository:a/b:pull,push",
    }
    assert (basic.scheme, basic.parameters) == ("basic", {"realm": "x"})
    assert parse_challenges("") == []
    assert [challenge.scheme for challenge in parse_challenges("Negotiate")] == ["negotiate"]


@given(st.text('Bearer =",\\ ab', max_size=60))
def test_any_challenge_parses(header):
    for challenge in parse_challenges(header):
        assert challenge.scheme


def test_secrets_do_not_show():
    assert "s3cret" not in repr(ME)
    for field in ("password", "identity_token", "registry_token"):
        assert "s3cret" not in repr(Credentials(username="me", **{field: "s3cret"}))


@pytest.mark.trio
async def test_basic(opened):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users = "basic", {"me": "s3cret"}
        image = registry.store.add_image("team/app", [b"layer"])
        assert await source.resolve(TAG) == image
        await source.document(image)
        assert [request.status for request in registry.requests] == [401, 200, 200]


@pytest.mark.trio
@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_wrong_password_is_refused_and_not_shown(opened, auth):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users = auth, {"me": "other"}
        registry.store.add_image("team/app", [b"layer"])
        with pytest.raises(AuthRefused) as caught:
            await source.resolve(TAG)
        assert "docker login" in caught.value.hint
        assert caught.value.exit_code == 11
        error = caught.value
        while error is not None:
            shown = repr(error) + str(error)
            assert "s3cret" not in shown
            assert base64.b64encode(b"me:s3cret").decode() not in shown
            error = error.__cause__ or error.__context__
        assert len(registry.requests) <= 4


@pytest.mark.trio
@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_no_credentials_are_refused_with_a_hint(opened, auth):
    async with opened() as (registry, source):
        registry.auth = auth
        with pytest.raises(AuthRefused, match="docker login"):
            await source.resolve(TAG)


@pytest.mark.trio
async def test_token_is_fetched_once_however_many_ask(opened):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users, registry.storage = "bearer", {"me": "s3cret"}, True
        blob = registry.store.add_blob("team/app", b"0123456789")
        async with trio.open_nursery() as nursery:
            for start in range(8):
                nursery.start_soon(read_range, source, blob, start, start + 1)
        assert len(registry.seen(server="token")) == 1
        assert registry.leaks == []


@pytest.mark.trio
async def test_token_that_expires_on_the_way_is_renewed(opened):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users = "bearer", {"me": "s3cret"}
        image = registry.store.add_image("team/app", [b"layer"])
        await source.document(image)
        registry.expire_tokens()
        await source.document(image)
        assert [request.status for request in registry.seen(server="registry")] == [401, 200, 401, 200]


@pytest.mark.trio
async def test_token_is_renewed_before_it_expires(opened):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users, registry.token_seconds = "bearer", {"me": "s3cret"}, 0.1
        image = registry.store.add_image("team/app", [b"layer"])
        await source.document(image)
        await trio.sleep(0.06)
        await source.document(image)
        assert [request.status for request in registry.seen(server="registry")] == [401, 200, 200]
        assert len(registry.seen(server="token")) == 2


@pytest.mark.trio
async def test_anonymous_token(opened):
    async with opened() as (registry, source):
        registry.auth, registry.anonymous_pull = "bearer", True
        image = registry.store.add_image("team/app", [b"layer"])
        assert await source.resolve(TAG) == image
        assert "authorization" not in registry.seen(server="token")[0].headers


@pytest.mark.trio
async def test_identity_token_is_exchanged_by_post(opened, tmp_path, quick):
    config = tmp_path / "config.json"
    async with FakeRegistry.open() as registry:
        registry.auth, registry.identity_tokens = "bearer", {"s3cret-identity"}
        image = registry.store.add_image("team/app", [b"layer"])
        config.write_text(json.dumps({"auths": {registry.address: {"identitytoken": "s3cret-identity"}}}))
        options = RegistryOptions(plain_http=True, docker_config=str(config))
        async with open_source(
            parse_reference(f"{registry.address}/team/app"), options, retry=quick
        ) as source:
            await source.document(image)
        assert registry.seen(server="token")[0].method == "POST"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(on="/token", status=500, times=99), "status 500"),
        (Fault(on="/token", status=404), "status 404"),
        (Fault(on="/token", body=b"<html>"), "not JSON"),
        (Fault(on="/token", body=b"{}"), "no token"),
        (Fault(on="/token", body=b"[]"), "no token"),
        (Fault(on="/token", body=b'{"token": "s3cret\\r\\nX: y"}'), "no token"),
        (Fault(on="/token", body=b'{"token": "s3cret'), "not JSON"),
        (Fault(on="/token", endless=True), "status 200"),
    ],
    ids=repr,
)
async def test_broken_token_service_is_said_so(opened, fault, says):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users = "bearer", {"me": "s3cret"}
        registry.faults.append(fault)
        with trio.fail_after(5), pytest.raises(SourceUnavailable) as caught:
            await source.resolve(TAG)
        assert says in str(caught.value)
        assert "s3cret" not in str(caught.value)


@pytest.mark.trio
async def test_token_service_is_asked_again(opened):
    async with opened(ME) as (registry, source):
        registry.auth, registry.users = "bearer", {"me": "s3cret"}
        image = registry.store.add_image("team/app", [b"layer"])
        registry.faults.append(Fault(on="/token", status=503, times=2))
        assert await source.resolve(TAG) == image


@pytest.mark.trio
async def test_password_never_goes_to_a_token_service_without_tls(opened):
    async with opened(RegistryOptions(user="me:s3cret")) as (registry, source):
        registry.auth, registry.users = "bearer", {"me": "s3cret"}
        registry.realm = "http://token.example/token"
        with pytest.raises(AuthRefused, match="without TLS"):
            await source.resolve(TAG)


@pytest.mark.trio
async def test_user_option_without_password_is_a_usage_error():
    with pytest.raises(UsageError):
        async with open_source(TAG, RegistryOptions(user="me")):
            pass
