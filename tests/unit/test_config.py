"""The configuration: precedence, errors a person can act on, and a default file that says everything."""

from __future__ import annotations

import tomllib

import msgspec
import pytest

from p2pgz import config, directories
from p2pgz.errors import ConfigError


def test_flag_beats_environment_beats_file_beats_default(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[fetch]\nfill = false\nfill_bytes_per_second = 1\nread_deadline_seconds = 7.0\n")
    environment = {"P2PGZ_FETCH__FILL_BYTES_PER_SECOND": "2", "P2PGZ_FETCH__READ_DEADLINE_SECONDS": "8"}
    loaded = config.load(path, environment, {"fetch.read_deadline_seconds": 9})
    fetch = loaded.config.fetch
    assert (fetch.fill, fetch.fill_bytes_per_second, fetch.read_deadline_seconds) == (False, 2, 9.0)
    assert loaded.origins["fetch.fill"] == "file"
    assert loaded.origins["fetch.fill_bytes_per_second"] == "environment"
    assert loaded.origins["fetch.read_deadline_seconds"] == "flag"
    assert loaded.origins["mount.suid"] == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[pool]\nquota = 1\n", "config.toml:2: pool.quota: no such key (did you mean pool.quota_bytes?)"),
        ("[fetch]\nfill = 'maybe'\n", "config.toml:2: fetch.fill: 'maybe': expected true or false"),
        (
            "[fetch]\nread_deadline_seconds = 0\n",
            "config.toml:2: fetch.read_deadline_seconds: 0: expected a number > 0",
        ),
        ("version = 2\n", "config.toml:1: version: 2 is not understood"),
        ("[log]\nlevel = 'loud'\n", "config.toml:2: log.level: 'loud' is no level (one of debug"),
        ("fetch = 1\n", "config.toml:1: fetch: is a table, not 1"),
        (
            "[[sharing]]\nrepository = 'r/*'\nmode = 'all'\n",
            "config.toml:3: sharing[0].mode: 'all': expected one of cluster, none, proof",
        ),
        ("[[sharing]]\nmode = 'none'\n", "config.toml:1: sharing[0].repository: is missing"),
        ("[fetch\n", "not TOML"),
    ],
)
def test_a_wrong_file_says_what_and_where(tmp_path, text, says):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config") as caught:
        config.load(path, {})
    assert says in str(caught.value)
    assert caught.value.exit_code == 15


def test_a_named_file_must_exist_and_the_default_one_need_not(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        config.load(tmp_path / "absent.toml", {}, must_exist=True)
    assert config.load(tmp_path / "absent.toml", {}).config == config.Config()


def test_unknown_environment_key_is_an_error_and_other_variables_are_not():
    with pytest.raises(ConfigError, match="nonsense"):
        config.load(None, {"P2PGZ_FETCH__NONSENSE": "1"})
    assert config.load(None, {"P2PGZ_STATE_DIR": "/x", "PATH": "/bin"}).config == config.Config()


def test_the_printed_default_is_the_default_and_explains_every_key():
    text = config.dump_default()
    assert msgspec.convert(tomllib.loads(text), config.Config) == config.Config()
    lines = text.splitlines()
    keys = [
        number for number, line in enumerate(lines) if " = " in line and not line.startswith(("#", "version"))
    ]
    assert len(keys) > 10
    assert all(lines[number - 1].startswith("# ") for number in keys)


def test_state_directory_selects_the_node_and_its_sockets(tmp_path):
    environment = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/1"}
    assert str(directories.state_dir(None, environment, root=False)) == "/home/u/.local/state/p2pgz"
    assert str(directories.run_dir(None, environment, root=False)) == "/run/user/1/p2pgz"
    assert str(directories.state_dir(None, {}, root=True)) == "/var/lib/p2pgz"
    assert str(directories.run_dir(None, {}, root=True)) == "/run/p2pgz"
    assert directories.run_dir(str(tmp_path), environment, root=True) == tmp_path
    assert directories.run_dir(None, {"P2PGZ_STATE_DIR": str(tmp_path)}, root=True) == tmp_path


def test_all_mistakes_are_told_at_once_with_their_places(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        "version = 1\n[pool]\nquota = 1\nquota_bytes = 'much'\n\n[fetch]\nfill_bytes_per_second = '20MB'\nfill = 3.5\n"
        "[[mounts]]\nreference = 'x'\n[log]\nlevel = 'loud'\n"
    )
    environment = {"P2PGZ_PEERS__ENABLED": "perhaps", "P2PGZ_NONSENSE__KEY": "1"}
    with pytest.raises(ConfigError) as caught:
        config.load(path, environment, {"registry.connections": 0})
    assert caught.value.what.replace(str(path), "F").splitlines() == [
        "9 mistakes in the configuration:",
        "  F:3: pool.quota: no such key (did you mean pool.quota_bytes?)",
        "  F:7: fetch.fill_bytes_per_second: '20MB': expected a whole number, got a text"
        " (a number of bytes a second, without a unit)",
        "  F:8: fetch.fill: 3.5: expected true or false, got a number",
        "  F:9: mounts[0].directory: is missing",
        "  environment variable P2PGZ_PEERS__ENABLED: peers.enabled: 'perhaps': expected one of always, auto, never",
        "  environment variable P2PGZ_NONSENSE__KEY: nonsense: no such key",
        "  command line: registry.connections: 0: expected a whole number >= 1",
        "  F:12: log.level: 'loud' is no level (one of debug, info, warning, error)",
        "  F:4: pool.quota_bytes: 'much' is not a number of bytes, nor like 200GB, 64GiB or 80%"
        ' (for example 200000000000, "200GB" or "80%")',
    ]
