"""Where credentials come from, and that odd files and helpers end in an error or none, never in a secret shown."""

import base64
import json
import os

import pytest
import structlog

from p2pgz.errors import ConfigError
from p2pgz.registry import RegistryOptions
from p2pgz.registry import credentials as module
from p2pgz.registry.credentials import Credentials, CredentialStore

pytestmark = pytest.mark.trio


def auth(user="me", password="s3cret"):
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


async def find(tmp_path, document, host="registry.example", repository="team/app", **environment):
    path = tmp_path / "config.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    store = CredentialStore(
        RegistryOptions(), {"DOCKER_CONFIG": str(tmp_path), "HOME": "/nowhere", **environment}
    )
    return await store.find(host, repository)


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("registry.example", "registry.example"),
        ("https://registry.example", "registry.example"),
        ("https://registry.example/v1/", "registry.example"),
        ("registry.example/v2/", "registry.example"),
        ("registry.example/team", "registry.example"),
        ("registry.example/team/app", "registry.example"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("localhost:5000", "localhost:5000"),
    ],
)
async def test_key_of_the_registry_is_found(tmp_path, key, host):
    assert await find(tmp_path, {"auths": {key: auth()}}, host) == Credentials(
        username="me", password="s3cret"
    )


@pytest.mark.parametrize(
    "key", ["other.example", "registry.example:5000", "registry.example/other", "example"]
)
async def test_key_of_another_registry_is_not(tmp_path, key):
    assert await find(tmp_path, {"auths": {key: auth()}}) is None


async def test_kinds_of_secrets(tmp_path):
    for entry, found in (
        ({"identitytoken": "t"}, Credentials(identity_token="t")),
        ({"registrytoken": "t"}, Credentials(registry_token="t")),
        ({"username": "me", "password": "p:q"}, Credentials(username="me", password="p:q")),
        (auth("me", "p:q"), Credentials(username="me", password="p:q")),
        ({}, None),
    ):
        assert await find(tmp_path, {"auths": {"registry.example": entry}}) == found


async def test_user_option_wins(tmp_path):
    store = CredentialStore(RegistryOptions(user="you:x:y"), {"HOME": "/nowhere"})
    assert await store.find("registry.example", "a") == Credentials(username="you", password="x:y")


async def test_auth_json_of_containers_is_read_after_dockers(tmp_path):
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {"registry.example/team": auth("podman")}}))
    found = await find(tmp_path, {}, REGISTRY_AUTH_FILE=str(path))
    assert found.username == "podman"
    found = await find(
        tmp_path, {"auths": {"registry.example": auth("docker")}}, REGISTRY_AUTH_FILE=str(path)
    )
    assert found.username == "docker"


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        '{"auths": []}',
        '{"auths": {"registry.example": {"auth": "s3cret!"}}}',
        '{"auths": {"registry.example": {"auth": "czNjcmV0"}}}',
        '{"auths": {"registry.example": {"auth": 5}}}',
        '{"credHelpers": {"registry.example": "../../bin/sh"}}',
        '{"s3cret": 1, "s3cret": 2}',
    ],
)
async def test_odd_file_is_a_config_error_without_its_text(tmp_path, document):
    with pytest.raises(ConfigError) as caught:
        await find(tmp_path, document)
    assert "s3cret" not in str(caught.value)
    assert "config.json" in str(caught.value)


async def test_chosen_file_must_be_there(tmp_path):
    store = CredentialStore(RegistryOptions(docker_config=str(tmp_path / "none.json")))
    with pytest.raises(ConfigError, match="no such file"):
        await store.find("registry.example", "a")


def helper(tmp_path, script):
    path = tmp_path / "docker-credential-test"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("document", [{"credHelpers": {"registry.example": "test"}}, {"credsStore": "test"}])
async def test_helper_is_asked_for_the_host(tmp_path, monkeypatch, document):
    environment = helper(
        tmp_path,
        f'cat > {tmp_path}/asked; echo "{{\\"Username\\":\\"me\\",\\"Secret\\":\\"s3cret\\"}}"; echo $1 >> {tmp_path}/asked',
    )
    monkeypatch.setenv("PATH", environment["PATH"])
    assert await find(tmp_path, document, **environment) == Credentials(username="me", password="s3cret")
    assert (tmp_path / "asked").read_text() == "registry.exampleget\n"


async def test_helper_may_give_an_identity_token(tmp_path, monkeypatch):
    environment = helper(tmp_path, 'echo "{\\"Username\\":\\"<token>\\",\\"Secret\\":\\"s3cret\\"}"')
    monkeypatch.setenv("PATH", environment["PATH"])
    assert await find(tmp_path, {"credsStore": "test"}, **environment) == Credentials(identity_token="s3cret")


@pytest.mark.parametrize(
    ("script", "warns"),
    [
        ("echo 'credentials not found in native keychain'; exit 1", ""),
        ("echo s3cret; exit 1", "status 1"),
        ("echo s3cret", "no JSON"),
        ("echo '{\"Username\":5}'", "no JSON"),
        ("yes s3cret", "too long"),
        ("exec sleep 60", "no answer"),
    ],
)
async def test_failing_helper_is_passed_over(tmp_path, monkeypatch, script, warns):
    monkeypatch.setattr(module, "HELPER_SECONDS", 0.3)
    environment = helper(tmp_path, script)
    monkeypatch.setenv("PATH", environment["PATH"])
    document = {"credsStore": "test", "auths": {"registry.example": auth("fallback")}}
    with structlog.testing.capture_logs() as logs:
        assert (await find(tmp_path, document, **environment)).username == "fallback"
    assert "s3cret" not in str(logs)
    assert warns in str(logs)
    assert bool(logs) == bool(warns)


async def test_missing_helper_is_passed_over(tmp_path):
    with structlog.testing.capture_logs() as logs:
        assert await find(tmp_path, {"credsStore": "nobody-has-this"}) is None
    assert "cannot be run" in str(logs)
