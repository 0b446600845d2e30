"""The ranks of one machine, found by the name of an abstract unix socket: one of them talks to the store for all.

Whoever binds the name first leads; the others connect. There is no file, so nothing to find, trust or remove, and ranks
that cannot reach each other (containers with networks of their own) are nodes of their own. The kernel says who is at
the other end: only processes of this user are talked to. A packet is a JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from perseus_plugin.exchange.client import ExchangeError
from perseus_plugin.files import parse_json

_MOST_MEMBERS = 256
_MOST_BYTES = 1 << 20
_SENT_WITHIN = struct.pack("ll", 1, 0)  # seconds, microseconds; who is stopped must not hold up the others
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_REJOIN_S = 1.0  # after who led has gone (where a job ends, all go), or before it serves
_REJOIN_AT_MOST_S = 8.0  # a child that was forked may keep the name of who led bound, and serves nobody

Message = dict[str, Any]


class Node:
    """This rank's place on its machine; for one thread, but for `wake` and `is_ours`.

    Args:
        name: of the job, the same on all its ranks and no other job's; empty: this rank is a node of its own.
        greeting: what a rank that joins is told first.

    Raises:
        ExchangeError: from `receive` and `send`, when our descriptors are not ours any more.
    """

    def __init__(self, name: str, greeting: Callable[[], Message]) -> None:
        self._name, self._greeting = name, greeting
        self._inodes: dict[socket.socket, int] = {}
        self._waiter = select.poll()
        self._listener: socket.socket | None = None
        self._leader: socket.socket | None = None
        self._rejoin_at_s: float | None = None
        self._refused_s = _REJOIN_S
        self._ear, self._mouth = socket.socketpair()
        for end in (self._keep(self._ear), self._keep(self._mouth)):
            end.setblocking(False)
        self._waiter.unregister(self._mouth)  # it is only written to
        self._join()

    @property
    def leads(self) -> bool:
        """Whether this rank talks to the store itself; changes in `receive` and `send` alone."""
        return self._leader is None

    def wake(self) -> None:
        """Have `receive` return; from any thread."""
        with suppress(OSError):  # full: it will return; closed: nobody is in it
            if self.is_ours:
                self._mouth.send(b"w")

    @property
    def is_ours(self) -> bool:
        """Whether this process's descriptors still are what they were, as far as one of them tells; from any thread."""
        with suppress(OSError):
            return os.fstat(self._mouth.fileno()).st_ino == self._inodes.get(self._mouth)
        return False

    def receive(self, timeout_s: float) -> list[Message]:
        """What the others have sent; waits for something, a wake, the time, or until it is to join again."""
        self._check()
        if self._rejoin_at_s is not None:
            timeout_s = min(timeout_s, self._rejoin_at_s - time.monotonic())
        messages: list[Message] = []
        readable = {number for number, _ in self._waiter.poll(1e3 * max(0.0, timeout_s))}
        self._check()
        for ready in [one for one in self._inodes if one.fileno() in readable] if readable else ():
            if ready is self._ear:
                with suppress(BlockingIOError):
                    self._ear.recv(4096)
            elif ready is self._listener:
                self._accept(ready)
            else:
                self._read(ready, messages)
        if self._rejoin_at_s is not None and time.monotonic() >= self._rejoin_at_s:
            self._rejoin_at_s = None
            self._join()
        return messages

    def send(self, message: Message) -> bool:
        """To who leads, or from there to all others; returns whether it may have arrived everywhere."""
        self._check()
        data = json.dumps(message, separators=(",", ":")).encode()
        peers = self._members if self._leader is None else [self._leader]
        written = [self._write(peer, data) for peer in peers]
        return all(written)

    def close(self) -> None:
        """Leave; idempotent."""
        with suppress(ExchangeError):
            self._check()
            for peer in self._members if self._leader is None else [self._leader]:
                self._drop(peer)
            if self._listener is not None:
                with suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)  # for children that were forked too
        self._rejoin_at_s = None
        for one in self._inodes:
            one.close()
        self._inodes.clear()
        self._waiter = select.poll()

    @property
    def _members(self) -> list[socket.socket]:
        return [one for one in self._inodes if one not in (self._ear, self._mouth, self._listener)]

    def _keep(self, one: socket.socket) -> socket.socket:
        self._inodes[one] = os.fstat(one.fileno()).st_ino
        self._waiter.register(one, select.POLLIN)
        return one

    def _check(self) -> None:
        """A script that closes what it does not know and opens files of its own has them where our sockets were."""
        try:
            for one, inode in self._inodes.items():
                if os.fstat(one.fileno()).st_ino != inode:
                    break
            else:
                return
        except OSError:
            pass
        for one in self._inodes:
            one.detach()
        self._inodes.clear()
        self._waiter = select.poll()
        self._leader = self._listener = None
        raise ExchangeError("the training script has closed descriptors of other parts of the process")

    def _join(self) -> None:
        if not self._name or not hasattr(socket, "SO_PEERCRED"):
            return
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.settimeout(_REJOIN_S)
        try:
            try:
                one.bind(f"\0{self._name}")
            except OSError:
                one.connect(f"\0{self._name}")
                if _is_ours(one):
                    self._leader = self._connected(one)
                    return
                one.close()
                return
            one.listen(_MOST_MEMBERS)
            self._listener = self._keep(one)
        except ConnectionRefusedError:  # bound, and not served yet, or no more: where ranks come at once, one is first
            one.close()
            self._rejoin_at_s = time.monotonic() + self._refused_s
            self._refused_s = min(2 * self._refused_s, _REJOIN_AT_MOST_S)
        except OSError:  # it does not answer: this rank is a node of its own
            one.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            caller, _ = listener.accept()
            if _is_ours(caller) and len(self._members) < _MOST_MEMBERS:
                self._write(self._connected(caller), json.dumps(self._greeting()).encode())
            else:
                caller.close()

    def _connected(self, peer: socket.socket) -> socket.socket:
        peer.setblocking(True)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SENT_WITHIN)
        return self._keep(peer)

    def _read(self, peer: socket.socket, messages: list[Message]) -> None:
        try:
            message = parse_json(peer.recv(_MOST_BYTES))  # nothing: it has gone
        except (OSError, ValueError):
            self._drop(peer)
            return
        if isinstance(message, dict):
            messages.append(message)

    def _write(self, peer: socket.socket, data: bytes) -> bool:
        try:
            peer.send(data)
        except OSError as error:
            # A member that has gone may have sent something before.
            if error.errno == errno.EAGAIN or (peer is self._leader and error.errno != errno.EMSGSIZE):
                self._drop(peer)
            return False
        return True

    def _drop(self, peer: socket.socket) -> None:
        del self._inodes[peer]
        self._waiter.unregister(peer)
        with suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)  # for children that were forked too
        peer.close()
        if peer is self._leader:
            self._leader = None
            self._refused_s = _REJOIN_S
            self._rejoin_at_s = time.monotonic() + _REJOIN_S


def _is_ours(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())
