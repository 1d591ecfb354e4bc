"""The command line's end of the control API, and starting a node where none runs.

Standard library only: a command that asks a running node should start in tens of milliseconds.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from p2pgz import errors
from p2pgz.errors import NodeUnavailable, P2pgzError, StateError, StateInUse

if TYPE_CHECKING:
    from p2pgz.cli.context import Settings

API_SOCKET = "api.sock"
DESCRIPTOR_SOCKET = "fd.sock"
# A node starts in well under a second; a slow disk that checks its pool may take longer
NODE_START_SECONDS = 60.0
ANSWER_SECONDS = 30.0
# A node that holds the lock listens soon after; one that never does is broken, and then its lock is the error to show
RIVAL_START_SECONDS = 5.0


def connect(path: Path) -> socket.socket:
    """A connection to a unix socket however long its path is."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if len(os.fsencode(path)) <= 107:  # sun_path, unix(7)
            sock.connect(str(path))
        else:
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
            try:
                sock.connect(f"/proc/self/fd/{directory}/{path.name}")
            finally:
                os.close(directory)
    except BaseException:
        sock.close()
        raise
    return sock


class _Connection(http.client.HTTPConnection):
    """A node that is well begins its answer at once, whatever the request: a stopped or hung one must not hang us."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path)
        self.sock.settimeout(ANSWER_SECONDS)


class NodeClient:
    """Talks to the node of one state directory."""

    def __init__(self, run_path: Path, start: Callable[[], None] | None = None) -> None:
        self.run_path = run_path
        self._start = start
        """starts a node: for when the one that was up ends just as it is asked"""

    def is_up(self) -> bool:
        """Whether a node listens."""
        try:
            connect(self.run_path / API_SOCKET).close()
        except OSError:
            return False
        return True

    def status(self) -> dict[str, Any]:
        """The node's status document."""
        with self._request("GET", "/v1/status", None) as answer, _ended_node():
            status: dict[str, Any] = json.load(answer)
        return status

    def call(self, path: str, request: dict[str, Any], progress: Any = None) -> dict[str, Any]:
        """Run one request; progress lines go to `progress(event)`; returns the result or raises the node's error."""
        heard = False
        try:
            with self._request("POST", path, request) as answer, _ended_node():
                for line in answer:
                    heard = True
                    event = json.loads(line)
                    if event["event"] in {"result", "error"}:
                        return _result(event)
                    if progress is not None:
                        progress(event)
                raise http.client.IncompleteRead(b"")
        except NodeUnavailable:
            if heard or self._start is None:
                raise
        self._start_again()
        return self.call(path, request, progress)

    def _start_again(self) -> None:
        """Start a node in place of the one that ended, once."""
        start, self._start = self._start, None
        if start is not None:
            start()

    def read(
        self, path: str, request: dict[str, Any], body: Iterator[bytes] | None = None
    ) -> Iterator[bytes]:
        """The bytes that a request answers with, in pieces; raises the node's error where it stopped."""
        with self._request("POST", path, request, body) as answer, _ended_node():
            while len(head := answer.read(4)) == 4:
                (length,) = struct.unpack(">I", head)
                if not length:
                    show_warnings(_result(json.loads(answer.read())))
                    return
                piece = answer.read(length)
                if len(piece) < length:
                    break
                yield piece
        raise NodeUnavailable(
            "the node ended in the middle of the request", hint="see its log; run the command again"
        )

    def send(self, path: str, request: dict[str, Any], body: Iterator[bytes]) -> dict[str, Any]:
        """Run one request that a file goes with; returns the result or raises the node's error."""
        with self._request("POST", path, request, body) as answer, _ended_node():
            for line in answer:
                return _result(json.loads(line))
            raise http.client.IncompleteRead(b"")

    def descriptor(self, token: str) -> int:
        """Fetch the mount descriptor that a mount request left for us."""
        with connect(self.run_path / DESCRIPTOR_SOCKET) as sock:
            sock.settimeout(10)
            sock.sendall(token.encode() + b"\n")
            _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        if not descriptors:
            raise NodeUnavailable("the node gave no mount", hint="run the command again")
        return descriptors[0]

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, file: Iterator[bytes] | None = None
    ) -> IO[bytes]:
        connection = _Connection(self.run_path / API_SOCKET)
        try:
            if self._start is not None and not self.is_up():
                self._start_again()
            # one request each: the socket is closed with the answer
            headers = {"Connection": "close"}
            if file is None:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
            else:
                connection.connect()
                connection.sock.settimeout(None)  # the node takes a file as fast as its disk does
                line = json.dumps(body).encode() + b"\n"
                connection.request(
                    method,
                    path,
                    itertools.chain([line], file),
                    encode_chunked=True,
                    headers={**headers, "Transfer-Encoding": "chunked"},
                )
            sock = connection.sock
            response = connection.getresponse()
            if body is not None:  # the work may take as long as it likes
                sock.settimeout(None)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NodeUnavailable(
                f"no node runs at {self.run_path}", hint="start one with `p2pgz node`"
            ) from error
        except PermissionError as error:
            raise NodeUnavailable(
                f"the node at {self.run_path} belongs to another user",
                hint="name a state directory of your own: --state-dir",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NodeUnavailable(f"the node at {self.run_path} does not answer: {error}") from error
        if response.status != 200:
            raise NodeUnavailable(
                f"the node at {self.run_path} does not know this request (HTTP {response.status})",
                hint="node and command line have different versions? restart the node",
            )
        return response


@contextmanager
def _ended_node() -> Iterator[None]:
    """An answer that breaks off means that the node ended, however that shows."""
    try:
        yield
    except TimeoutError as error:
        raise NodeUnavailable("the node does not go on with its answer", hint="is it stopped?") from error
    except (http.client.HTTPException, ConnectionError, json.JSONDecodeError) as error:
        raise NodeUnavailable(
            "the node ended in the middle of the request", hint="see its log; run the command again"
        ) from error


def _result(event: dict[str, Any]) -> dict[str, Any]:
    if event["event"] == "result":
        return event
    kind = getattr(errors, event.get("type", ""), P2pgzError)
    if not (isinstance(kind, type) and issubclass(kind, P2pgzError)):
        kind = P2pgzError
    raise kind(event["message"], hint=event["hint"])


def running_node(settings: Settings, *, start: bool = True) -> NodeClient:
    """The node of these settings; started for this command if none runs (`start`), ending after its last mount."""
    client = NodeClient(settings.run_path)
    if not start:
        if not client.is_up():
            raise NodeUnavailable(f"no node runs at {settings.run_path}", hint="start one with `p2pgz node`")
        return client
    if not client.is_up():
        _start_node(settings, client)
    return NodeClient(settings.run_path, lambda: _start_node(settings, client))


def _start_node(settings: Settings, client: NodeClient) -> None:
    """Start a node, or find that another command just has; waits for one that holds the lock and is ending."""
    deadline = time.monotonic() + RIVAL_START_SECONDS
    while True:
        try:
            _start_once(settings)
        except StateInUse:
            if client.is_up():
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _start_once(settings: Settings) -> None:
    """Start a node and wait until it answers; raises what keeps it from starting."""
    command = [sys.executable, "-m", "p2pgz"]
    # absolute, since the node has another working directory
    command += ["--config", str(settings.config_path.absolute())] if settings.config_file else []
    command += ["--state-dir", str(settings.state_path)] if settings.state_dir else []
    command += ["-v"] if settings.verbose else []
    ready_read, ready_write = os.pipe()
    command += ["node", "--ephemeral", "--ready-fd", str(ready_write)]
    log_path = settings.state_path / "node.log"
    try:
        settings.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                _in_own_scope(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[ready_write],
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        os.close(ready_read)
        raise StateError(
            f"the state directory {settings.state_path} cannot be used: {error.strerror}",
            hint="choose another one with --state-dir",
        ) from error
    finally:
        os.close(ready_write)
    with os.fdopen(ready_read, "rb") as ready:
        said = _read_ready(ready, process)
    if said.get("event") == "ready":
        return
    if said:
        process.wait()  # it has said why it ends
        _result(said)
    raise NodeUnavailable("the node did not start", hint=f"see {log_path}")


def _read_ready(ready: IO[bytes], process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The node's one line on its ready pipe: `ready`, or the error that keeps it from starting."""
    deadline = time.monotonic() + NODE_START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if select.select([ready], [], [], left)[0]:
            line = ready.readline()
            said: dict[str, Any] = json.loads(line) if line else {}
            return said
    process.kill()
    return {}


def _in_own_scope(command: list[str]) -> list[str]:
    """Under systemd a scope of its own keeps the node alive when the login session of this command ends."""
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemd-run") is None:
        return command
    user = [] if os.geteuid() == 0 else ["--user"]
    probe = subprocess.run(
        ["systemd-run", *user, "--scope", "--quiet", "true"], capture_output=True, check=False, timeout=10
    )
    return ["systemd-run", *user, "--scope", "--quiet", "--", *command] if probe.returncode == 0 else command


def show_warnings(result: dict[str, Any]) -> None:
    """What the node wants people to know about what it gave."""
    for warning in result.get("warnings", ()):
        click.echo(f"warning: {warning}", err=True)


def show_progress(settings: Settings) -> Any:
    """A callback for progress events: one changing line on a terminal, nothing elsewhere."""
    if settings.quiet or not sys.stderr.isatty():
        return None

    def show(event: dict[str, Any]) -> None:
        click.echo(f"\r\033[K{event.get('text', '')}", err=True, nl=event.get("last", False))

    return show
