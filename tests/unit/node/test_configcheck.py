"""Mistakes in a configuration that types do not show: all of them at once, each with its place."""

from __future__ import annotations

import pytest

from p2pgz import config
from p2pgz.errors import ConfigError
from p2pgz.node import configcheck

WRONG = """
[http]
listen = "nowhere"
[peers]
listen = ["/ip4/0.0.0.0/tcp/4801", "here"]
bootstrap = ["/ip4/192.0.2.1/tcp/4801", "there:4801"]
announce = ["/ip4/192.0.2.1"]
allow = ["12D3nobody"]
trusted_indexers = ["12D3nobody"]
cluster_key_file = "absent.key"
[registry]
ca_file = "absent.pem"
docker_config = "absent.json"
[seed]
images = ["r.example/secret/app:1", "r.example/open/app:1"]
[[sharing]]
repository = "r.example/secret/*"
mode = "none"
[[mounts]]
reference = "Not A Reference"
directory = "relative"
[[mounts]]
reference = "r.example/open/app:1"
directory = "/srv/app"
[[mounts]]
reference = "r.example/open/app:2"
directory = "/srv/app"
"""


def load(tmp_path, text: str) -> config.Loaded:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return config.load(path, {})


def lines_of(error: ConfigError, tmp_path) -> dict[str, str]:
    """`line: key` → message."""
    found = {}
    for line in error.what.replace(f"{tmp_path}/", "").splitlines()[1:]:
        place, key, message = line.strip().split(": ", 2)
        found[f"{place} {key}"] = found.get(f"{place} {key}", "") + message
    return found


def test_everything_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, WRONG)
    with pytest.raises(ConfigError) as caught:
        configcheck.check(loaded)
    found = lines_of(caught.value, tmp_path)
    assert set(found) == {
        "config.toml:3 http.listen",
        "config.toml:5 peers.listen",
        "config.toml:6 peers.bootstrap",
        "config.toml:7 peers.announce",
        "config.toml:8 peers.allow",
        "config.toml:9 peers.trusted_indexers",
        "config.toml:10 peers.cluster_key_file",
        "config.toml:12 registry.ca_file",
        "config.toml:13 registry.docker_config",
        "config.toml:15 seed.images",
        "config.toml:20 mounts[0].reference",
        "config.toml:21 mounts[0].directory",
        "config.toml:24 mounts[1].directory",
        "config.toml:27 mounts[2].directory",
    }
    assert "there:4801" in found["config.toml:6 peers.bootstrap"]
    assert "nobody" in found["config.toml:15 seed.images"]
    assert "2 addresses" in found["config.toml:5 peers.listen"]


def test_files_that_may_come_later_do_not_keep_a_node_from_starting(tmp_path):
    loaded = load(tmp_path, "[registry]\nca_file = '/absent.pem'\ndocker_config = '/absent.json'\n")
    assert configcheck.check(loaded, files=False) is loaded.config
    with pytest.raises(ConfigError, match="2 mistakes"):
        configcheck.check(loaded)


def test_one_mistake_is_one_line_with_its_own_hint(tmp_path):
    with pytest.raises(ConfigError) as caught:
        configcheck.check(load(tmp_path, "[http]\nlisten = 'x'\n"))
    assert "\n" not in caught.value.what
    assert "127.0.0.1:4802" in caught.value.hint


def test_no_peers_and_yet_something_for_them(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.toml:3: peers\.mdns: is set"):
        configcheck.check(load(tmp_path, "[peers]\nenabled = 'never'\nmdns = true\n"))


@pytest.mark.parametrize("text", ["", config.dump_default(), "[peers]\nlisten = ['/ip4/0.0.0.0/tcp/0']\n"])
def test_right_ones_pass(tmp_path, text):
    configcheck.check(load(tmp_path, text))
