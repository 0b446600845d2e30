"""Reports from outside the job: a unix socket in the output folder, served on rank 0's machine.

Only the job's own user (and root) can use it: the socket file has mode 0600 and the kernel is asked who is calling. One
JSON line per request and per reply:

    {"do": "report", "report": {"rank": 5, "slowdown": 1.25, ...}}   {"ok": true}
    {"do": "list"}                                                   {"ok": true, "reports": [...]}
    {"do": "clear", "rank": 5}                                       {"ok": true, "cleared": 1}

and `{"ok": false, "error": "the reason"}` for whatever is refused.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perseus_plugin.errors import PerseusError
from perseus_plugin.files import parse_json

logger = logging.getLogger(__name__)

SOCKET_NAME = "stragglers.sock"
_MAX_LINE = 65_536
_TIMEOUT_S = 2.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class StragglerSocket:
    """Serves requests on a thread of its own.

    Args:
        folder: the job's output folder.
        answer: gives the reply to a request; raises `PerseusError` to refuse it.

    Raises:
        OSError: there can be no such socket in this folder, or a running job has one there.
    """

    def __init__(self, folder: Path, answer: Answer) -> None:
        self._folder, self._answer = folder, answer
        self._listener = _listen(folder)
        self._inode = (folder / SOCKET_NAME).stat().st_ino
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="perseus-reports", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        with suppress(OSError):
            if (self._folder / SOCKET_NAME).stat().st_ino == self._inode:
                (self._folder / SOCKET_NAME).unlink()
        self._thread.join(timeout=_TIMEOUT_S)

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    logger.warning(
                        "no more reports are taken on %s: %s; all else goes on. Report from Python instead",
                        SOCKET_NAME,
                        error,
                    )
                return
            with connection:
                try:
                    self._serve_one(connection)
                except Exception as error:  # whatever a caller does, the next one is served
                    logger.debug("a caller on %s failed: %r", SOCKET_NAME, error)

    def _serve_one(self, connection: socket.socket) -> None:
        connection.settimeout(_TIMEOUT_S)
        try:
            line = _read_line(connection)  # first, as hanging up on a caller who still writes loses the reply
            if (caller := _caller(connection)) not in (0, os.geteuid()):
                raise PerseusError(f"user {caller} may not use this job's socket")
            request = parse_json(line)
            if not isinstance(request, dict):
                raise ValueError("not an object")
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
                connection.connect(path)
            _send(connection, request)
            reply = parse_json(_read_line(connection))
        except (OSError, ValueError) as error:
            raise PerseusError(
                f"{folder}: no running job takes reports here ({error}); allowed: the output folder of a running job, "
                "on the machine of its rank 0, by its own user"
            ) from error
    if not isinstance(reply, dict) or not reply.get("ok"):
        raise PerseusError(str(reply.get("error")) if isinstance(reply, dict) else "the job's reply is no object")
    return reply


@contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """A path of the socket that fits into the 108 bytes of an address, whatever the folder's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


def _listen(folder: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(folder) as path:
            if os.path.lexists(path):
                _remove_if_dead(path)
            os.fchmod(listener.fileno(), 0o600)  # the file gets this mode as it is made
            listener.bind(path)
            Path(path).chmod(0o600)  # where the line above has no effect
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_if_dead(path: str) -> None:
    if not Path(path).is_socket():
        raise OSError(f"there is another file called {SOCKET_NAME}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
    raise OSError("another running job serves this folder")


def _caller(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


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
