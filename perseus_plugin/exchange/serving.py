"""Serving callers on a socket: few at a time, none for long, and nobody after the process that serves has gone."""

from __future__ import annotations

import logging
import os
import socket as sockets
import socketserver
import threading
import time
import weakref
from contextlib import suppress
from typing import Any

from perseus_plugin.files import identity

logger = logging.getLogger(__name__)

_PAUSE_S = 0.5
_LOOK_S = 2.0
"""From one look at how long callers have been served to the next; callers themselves, and the end, wake the thread."""


class SocketTakenError(Exception):
    """The listening socket is not ours any more: something in this process has closed it."""


class Bounded(socketserver.ThreadingMixIn):
    """Mixed into a server of the standard library: each caller has a thread, and there are bounds on both.

    Attributes:
        most_callers: at a time; one more, and the one who has been there longest is hung up on.
        longest_s: that a caller is served; then it is hung up on, whatever it has said so far.
    """

    daemon_threads = True
    block_on_close = False
    most_callers = 16
    longest_s = 10.0
    request_queue_size = 128
    socket: Any
    _identity: tuple[int, int] | None = None

    def start(self, name: str) -> None:
        """Serve on a thread of its own, once the socket listens."""
        self._begun_s: dict[Any, float] = {}
        self._counting = threading.Lock()
        self._stopping = False
        self._identity = identity(self.socket.fileno())
        _serving.add(self)
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def stop(self) -> None:
        """Serve nobody any more, and free the address."""
        self._stopping = True
        if self._is_ours():
            with suppress(OSError):
                self.socket.shutdown(sockets.SHUT_RDWR)  # wakes the thread
        self.shutdown()  # type: ignore[attr-defined]
        self.server_close()
        with self._counting:
            for caller in list(self._begun_s):
                self._hang_up(caller)

    def lost(self, why: str) -> None:
        """Nobody is served any more."""

    def get_request(self) -> Any:
        """Accept a caller."""
        try:
            if not (self._stopping or self._is_ours()):  # a socket of the script's has callers of its own
                raise SocketTakenError("something in this process has closed its socket")
            return super().get_request()  # type: ignore[misc]
        except OSError:
            if not self._stopping:
                time.sleep(_PAUSE_S)  # there is no descriptor left for a caller, who waits
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a caller on a thread."""
        with self._counting:
            while len(self._begun_s) >= self.most_callers:
                self._hang_up(next(iter(self._begun_s)))
            self._begun_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Now and then: hang up on callers who have been here for long."""
        with self._counting:
            for caller, begun_s in list(self._begun_s.items()):
                if time.monotonic() - begun_s > self.longest_s:
                    self._hang_up(caller)

    def shutdown_request(self, request: Any) -> None:
        """A caller has been served."""
        with self._counting:
            self._begun_s.pop(request, None)
        super().shutdown_request(request)  # type: ignore[misc]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whatever a caller does, the next one is served."""
        logger.debug("a caller of %s failed", type(self).__name__, exc_info=True)

    def server_close(self) -> None:
        """Close the listening socket, if it is still ours."""
        if self._identity is not None and not self._is_ours():
            self.socket.detach()
        super().server_close()

    def _serve(self) -> None:
        try:
            self.serve_forever(_LOOK_S)  # type: ignore[attr-defined]
        except Exception as error:
            if not self._stopping:
                self.lost(str(error) or repr(error))

    def _hang_up(self, caller: Any) -> None:
        """Its thread then finds that nothing more comes; called under the lock."""
        self._begun_s.pop(caller, None)
        with suppress(OSError):
            caller.shutdown(sockets.SHUT_RDWR)

    def _is_ours(self) -> bool:
        with suppress(OSError):
            return identity(self.socket.fileno()) == self._identity
        return False

    def _forget_after_fork(self) -> None:
        # A forked worker may outlive this process, and would keep the address taken and callers waiting.
        ours = self._is_ours()
        for held in (self.socket, *self._begun_s):
            held.close() if ours else held.detach()


_serving: weakref.WeakSet[Bounded] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for server in list(_serving):
        server._forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)


class BoundedHttp(Bounded):
    """As `Bounded`, mixed into a server of HTTP."""

    def server_bind(self) -> None:
        """Without a look at the name service for what this machine is called, which may take its time."""
        socketserver.TCPServer.server_bind(self)  # type: ignore[arg-type]
        address: tuple[Any, ...] = self.server_address  # type: ignore[attr-defined]
        self.server_name, self.server_port = str(address[0]), int(address[1])
