"""The command line without a node: help, options, exit codes, errors for people and for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from p2pgz.cli import COMMANDS, run


def call(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "p2pgz", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom p2pgz.cli import run\nrun(['--help'])\n"
        "heavy = {'trio', 'pyfuse3', 'libp2p', 'httpcore2', 'apsw', 'starlette', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--state-dir" in text or command in {"pool", "config"}
    assert len(text) > 200


def test_the_state_directory_may_stand_before_or_behind_the_command(tmp_path, capsys):
    for arguments in (
        ["--state-dir", str(tmp_path / "a"), "status"],
        ["status", "--state-dir", str(tmp_path / "a")],
        ["--state-dir", "/elsewhere", "status", "--state-dir", str(tmp_path / "a")],
        ["pool", "stat", "--state-dir", str(tmp_path / "a"), "--config", str(tmp_path / "absent.toml")],
    ):
        assert run(arguments) in (1, 15)
        error = capsys.readouterr().err
        assert str(tmp_path) in error
        assert "/elsewhere" not in error


def test_environment_variables_are_options(tmp_path):
    code, _, error = call("status", P2PGZ_STATE_DIR=str(tmp_path / "there"))
    assert code == 1
    assert str(tmp_path / "there") in error
    code, out, _ = call("config", "show", "--origin", P2PGZ_FETCH__FILL="false")
    assert code == 0
    assert "fetch.fill = false  # environment" in out


def test_unknown_words_are_usage_errors_that_help():
    code, _, error = call("muont", "x", "y")
    assert code == 2
    assert "Did you mean 'mount'" in error
    code, _, error = call("mount", "--no-such-option", "x", "y")
    assert code == 2
    code, _, error = call("mount", "x")
    assert code == 2
    assert "DIR" in error


def test_errors_for_programs_are_one_json_line():
    code, out, error = call("status", "--json", "--state-dir", "/nonexistent/p2pgz")
    assert (code, out) == (1, "")
    document = json.loads(error.splitlines()[-1])
    assert document["message_type"] == "exit_error"
    assert document["code"] == 1
    assert "/nonexistent/p2pgz" in document["message"]


def test_configuration_errors_have_their_own_code(tmp_path):
    path = tmp_path / "p2pgz.toml"
    path.write_text("[fetch]\nfil = true\n")
    code, _, error = call("--config", str(path), "config", "check")
    assert code == 15
    assert "fil" in error
    assert str(path) in error


def test_what_a_node_would_refuse_is_refused_by_the_check(tmp_path):
    path = tmp_path / "p2pgz.toml"
    for text in ('listen = ["nowhere"]', 'cluster_key_file = "/nowhere"', 'allow = ["nowhere"]'):
        path.write_text(f"[peers]\n{text}\n")
        code, _, error = call("--config", str(path), "config", "check")
        assert code == 15
        assert "nowhere" in error


def test_the_default_configuration_checks(tmp_path):
    code, out, _ = call("config", "default")
    assert code == 0
    path = tmp_path / "p2pgz.toml"
    path.write_text(out)
    assert call("config", "check", "--config", str(path)) == (0, "", "")


def test_version():
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("p2pgz, version ")
