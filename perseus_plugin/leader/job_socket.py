"""Requests from outside the job: a unix socket in the output folder, served on rank 0's machine.

Only the job's own user (and root) can use it: the socket file has mode 0600 and the kernel is asked who is calling. One
JSON line per request and per reply:

    {"do": "report", "report": {"rank": 5, "slowdown": 1.25, ...}}   {"ok": true}
    {"do": "list"}                                                   {"ok": true, "reports": [...]}
    {"do": "clear", "rank": 5}                                       {"ok": true, "cleared": 1}
    {"do": "target", "target": {"slowdown": 0.1, ...}}               {"ok": true, "number": 7}
    {"do": "targets"}                                                {"ok": true, "outcomes": [...], ...}
    {"do": "clear_target", "source": "cli"}                          {"ok": true, "number": 8}

and `{"ok": false, "error": "the reason"}` for whatever is refused.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perseus_plugin.errors import PerseusError, plain
from perseus_plugin.exchange.serving import Bounded
from perseus_plugin.files import opened_folder, parse_json

logger = logging.getLogger(__name__)

SOCKET_NAME = "stragglers.sock"
_MAX_LINE = 65_536
_TIMEOUT_S = 2.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class JobSocket:
    """Serves requests on threads of its own.

    Args:
        folder: the job's output folder.
        answer: gives the reply to a request, one at a time on any thread; raises `PerseusError` to refuse it.

    Raises:
        OSError: there can be no such socket in this folder, or a running job has one there.
    """

    def __init__(self, folder: Path, answer: Answer) -> None:
        self._folder = folder
        self._server = _Server(folder, answer)
        with _short_path(folder) as path:
            self._inode = os.lstat(path).st_ino
        self._server.start("perseus-socket")

    def close(self) -> None:
        """Stop serving and remove the socket."""
        self._server.stop()
        with suppress(OSError), _short_path(self._folder) as path:
            if os.lstat(path).st_ino == self._inode:
                Path(path).unlink()


class _Server(Bounded, socketserver.UnixStreamServer):
    def __init__(self, folder: Path, answer: Answer) -> None:
        self._folder, self._answer = folder, answer
        self._answering = threading.Lock()
        super().__init__(SOCKET_NAME, socketserver.BaseRequestHandler)

    def server_bind(self) -> None:
        """In the folder, with a path that is short enough."""
        with _short_path(self._folder) as path:
            if os.path.lexists(path):
                _remove_if_dead(path)
            os.fchmod(self.socket.fileno(), 0o600)  # the file gets this mode as it is made
            self.socket.bind(path)
            Path(path).chmod(0o600)  # where the line above has no effect

    def lost(self, why: str) -> None:
        """Said once."""
        logger.warning(
            "nobody is heard on %s any more: %s; all else goes on. Report stragglers and set targets from Python",
            SOCKET_NAME,
            why,
        )

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one request."""
        self._serve_one(request)

    def _serve_one(self, connection: socket.socket) -> None:
        connection.settimeout(_TIMEOUT_S)
        try:
            line = _read_line(connection)  # first, as hanging up on a caller who still writes loses the reply
            if (caller := _caller(connection)) not in (0, os.geteuid()):
                raise PerseusError(f"user {caller} may not use this job's socket")
            request = parse_json(line)
            if not isinstance(request, dict):
                raise ValueError("not an object")
            with self._answering:
                reply = {"ok": True, **self._answer(request)}
        except ValueError as error:
            reply = {"ok": False, "error": f"malformed request: {error}"}
        except PerseusError as error:
            reply = {"ok": False, "error": str(error)}
        _send(connection, reply)


def ask(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request to the job whose output folder this is, and return its reply.

    Raises:
        PerseusError: no job serves this folder on this machine, or it refused; the message is the reason.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(2 * _TIMEOUT_S)
        try:
            with _short_path(folder) as path:
                _connect(connection, path)
            _send(connection, request)
            reply = parse_json(_read_line(connection))
        except (OSError, ValueError) as error:
            raise PerseusError(
                f"{folder}: no running job answers here ({error}); allowed: the output folder of a running job, "
                "on the machine of its rank 0, by its own user"
            ) from error
    if not isinstance(reply, dict) or not reply.get("ok"):
        raise PerseusError(
            plain(str(reply.get("error"))) if isinstance(reply, dict) else "the job's reply is no object"
        )
    return reply


def is_served(folder: Path) -> bool:
    """Whether somebody listens on the socket of this folder, be it without answering; never where it is of another
    machine."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            with _short_path(folder) as path:
                _connect(connection, path)
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False
    return True


@contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """A path of the socket that fits into the 108 bytes of an address, whatever the folder's."""
    with opened_folder(folder) as descriptor:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"


def _remove_if_dead(path: str) -> None:
    """Make room, where the job that served here has gone; a worker that it forked may still hold its socket."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(f"there is another file called {SOCKET_NAME}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        try:
            _connect(probe, path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        # Whoever began to listen. 0: it is, or was, in another container, so that only an answer can tell.
        server = _credentials(probe)[0]
        if (server and not _lives(server)) or (not server and not _answers(probe)):
            Path(path).unlink()
            return
    raise OSError("another running job serves this folder")


def _connect(connection: socket.socket, path: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            connection.connect(path)
            return
        except BlockingIOError:  # as many wait to be heard as may
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _answers(connection: socket.socket) -> bool:
    with suppress(OSError, ValueError):
        _send(connection, {"do": "list"})
        return bool(_read_line(connection))
    return False


def _caller(connection: socket.socket) -> int:
    return _credentials(connection)[1]


def _credentials(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(raw)
    return pid, user


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(4096)
        if not part:
            break
        data += part
        if len(data) > _MAX_LINE:
            raise ValueError(f"longer than {_MAX_LINE} bytes")
    return data


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
