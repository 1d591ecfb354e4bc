"""The manifests name only what exists: configuration keys, commands, ports, paths of probes, volumes. `make kubernetes` has
them validated by helm and kubeconform."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from p2pgz.cli import cli
from p2pgz.config import Config, load

ROOT = Path(__file__).parents[2]
CHART = ROOT / "configs" / "helm" / "p2pgz"
RENDERED = ROOT / "configs" / "kubernetes" / "p2pgz.yaml"
COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"

pytestmark = pytest.mark.skipif(not RENDERED.is_file(), reason="not part of what is installed")


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    documents = [document for document in yaml.safe_load_all(RENDERED.read_text()) if document]
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def pods(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [objects[kind]["spec"]["template"]["spec"] for kind in ("DaemonSet", "StatefulSet")]


def configured(objects: dict[str, dict[str, Any]], name: str, tmp_path: Path) -> Config:
    path = tmp_path / name
    path.write_text(objects["ConfigMap"]["data"][name])
    return load(path, {}, must_exist=True).config


def test_everything_is_there(objects: dict[str, dict[str, Any]]) -> None:
    assert set(objects) == {
        "ConfigMap", "DaemonSet", "NetworkPolicy", "Service", "ServiceAccount", "StatefulSet"
    }  # fmt: skip


def test_the_configurations_are_right(objects: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    service = objects["Service"]["metadata"]["name"]
    for name in ("node.toml", "seed.toml"):
        config = configured(objects, name, tmp_path)
        assert config.peers.bootstrap == [f"/dns/{service}.p2pgz.svc/tcp/4801"]
        assert config.peers.listen == ["/ip4/0.0.0.0/tcp/4801"]
        assert config.http.listen == ":4802"  # probes come to the pod's address
        secret = Path(config.peers.cluster_key_file)
        for pod in pods(objects):
            mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert str(secret.parent) in mounts


def test_containers_name_what_exists(objects: dict[str, dict[str, Any]]) -> None:
    shipped = set(objects["ConfigMap"]["data"])
    for pod in pods(objects):
        (container,) = pod["containers"]
        context = click.Context(cli)
        command = cli.get_command(context, container["args"][0])
        assert command is not None
        command.make_context(container["args"][0], container["args"][1:], parent=context)
        environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        assert environment.keys() <= {"P2PGZ_CONFIG", "P2PGZ_STATE_DIR", "HOME"}
        assert Path(environment["P2PGZ_CONFIG"]).name in shipped
        state = Path(environment["P2PGZ_STATE_DIR"])
        paths = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        assert any(state.is_relative_to(path) for path in paths)
        # a volume cannot be mounted inside a read-only one: nobody could make its directory
        assert not [(a, b) for a in paths for b in paths if a != b and a.is_relative_to(b)]
        volumes = {volume["name"] for volume in pod["volumes"]} | {"state"}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
            "peers": 4801,
            "http": 4802,
        }
        reference = (ROOT / "docs" / "reference" / "http.md").read_text()
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            request = container[probe]["httpGet"]
            assert request["port"] == "http"
            assert f"{request['path']}`" in reference


def test_who_needs_what(objects: dict[str, dict[str, Any]]) -> None:
    """Only what mounts is privileged; nobody gets a token of the Kubernetes API."""
    node, seed = pods(objects)
    assert node["containers"][0]["securityContext"]["privileged"]
    (images,) = [m for m in node["containers"][0]["volumeMounts"] if m["name"] == "images"]
    assert images["mountPropagation"] == "Bidirectional"
    assert seed["securityContext"]["runAsNonRoot"]
    assert seed["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not objects["ServiceAccount"]["automountServiceAccountToken"]
    assert {pod["automountServiceAccountToken"] for pod in (node, seed)} == {False}


def test_selectors_select(objects: dict[str, dict[str, Any]]) -> None:
    labels = {
        kind: objects[kind]["spec"]["template"]["metadata"]["labels"] for kind in ("DaemonSet", "StatefulSet")
    }
    for kind, own in labels.items():
        wanted = objects[kind]["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= own.items()
    seeds = [
        objects["Service"]["spec"]["selector"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in seeds:
        assert selector.items() <= labels["StatefulSet"].items()
        assert not selector.items() <= labels["DaemonSet"].items()


def test_the_chart_uses_the_values_that_it_documents() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = "".join(path.read_text() for path in sorted((CHART / "templates").iterdir()))
    used = set(re.findall(r"\.Values\.([\w.]+)", templates))

    def known(path: str) -> bool:
        at = values
        for key in path.split("."):
            if not isinstance(at, dict) or key not in at:
                return False
            at = at[key]
        return True

    assert sorted(path for path in used if not known(path)) == []
    unused = [
        f"{section}.{key}"
        for section, inner in values.items()
        for key in (inner if isinstance(inner, dict) else {})
        if not any(path in (section, f"{section}.{key}") for path in used)
    ]
    assert unused == []


def test_the_compose_file_names_what_exists() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    services = document["services"]
    assert {"registry", "seed", "node1", "node2"} == set(services)
    for name, service in services.items():
        if name == "registry":
            continue
        loaded = load(None, {key: str(value) for key, value in service["environment"].items()})
        assert loaded.config.peers.bootstrap == ["/dns/seed/tcp/4801"]
        assert loaded.config.registry.plain_http == ["registry:5000"]
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(document["volumes"])
        command = cli.get_command(click.Context(cli), service["healthcheck"]["test"][2])
        assert command is not None
    assert "devices" not in services["seed"]


def test_the_dockerfile_copies_what_exists() -> None:
    text = DOCKERFILE.read_text()
    allowed = set(
        re.findall(r"^!(.+)$", (ROOT / "docker" / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    )
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert copied == allowed
    assert [name for name in copied if not (ROOT / name).exists()] == []
