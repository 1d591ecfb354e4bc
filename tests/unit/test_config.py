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
        ("[pool]\nquota = 1\n", "unknown field `quota` at `pool`"),
        ("[fetch]\nfill = 'maybe'\n", "at `fetch.fill`"),
        ("[fetch]\nread_deadline_seconds = 0\n", "at `fetch.read_deadline_seconds`"),
        ("version = 2\n", "version = 2"),
        ("[log]\nlevel = 'loud'\n", "log.level"),
        ("fetch = 1\n", "at `fetch`"),
        ("[[sharing]]\nrepository = 'r/*'\nmode = 'all'\n", "at `sharing[0].mode`"),
        ("[[sharing]]\nmode = 'none'\n", "at `sharing[0]`"),
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
