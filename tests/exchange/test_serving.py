"""What listens has few callers at a time, none for long, and touches nothing that is not its own."""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.exchange.serving import Bounded
from perseus_plugin.leader.job_socket import SOCKET_NAME, JobSocket, ask
from tests.waiting import came_true, wait_until


class Echo(Bounded, socketserver.TCPServer):
    """Answers a line with itself."""

    most_callers = 4

    def __init__(self, longest_s: float = 60.0) -> None:
        self.longest_s = longest_s
        self.told: list[str] = []
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.start("echo")

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(60)
        line = request.makefile("rb").readline()
        request.sendall(line)

    def lost(self, why: str) -> None:
        self.told.append(why)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.stop()


def caller(server: Echo) -> socket.socket:
    return socket.create_connection(server.server_address, timeout=30)  # type: ignore[arg-type]


def echoed(server: Echo) -> bool:
    with caller(server) as connection:
        connection.sendall(b"hello\n")
        return connection.makefile("rb").readline() == b"hello\n"


def callers_threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_callers_who_say_nothing_lock_nobody_out_and_take_a_bounded_number_of_threads(echo: Echo) -> None:
    before = callers_threads()
    silent = [caller(echo) for _ in range(40)]
    assert echoed(echo)
    wait_until(lambda: callers_threads() - before <= Echo.most_callers)
    # The oldest were hung up on.
    assert all(connection.recv(1) == b"" for connection in silent[:36])
    for connection in silent:
        connection.close()


def test_a_caller_who_takes_his_time_is_hung_up_on() -> None:
    server = Echo(longest_s=0.05)
    with caller(server) as slow:
        slow.sendall(b"h")
        assert slow.makefile("rb").readline() in (b"", b"h"), "what had come is all that is answered"
    server.stop()


def test_stopping_ends_the_threads_of_callers_too(echo: Echo) -> None:
    with caller(echo) as silent:
        wait_until(lambda: callers_threads() > 0)
        echo.stop()
        assert silent.recv(1) == b""
    assert came_true(lambda: callers_threads() == 0)


def test_without_descriptors_callers_wait_and_the_thread_does_not_spin(
    echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    really = socketserver.TCPServer.get_request

    def none_left(server: Echo) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(24, "Too many open files")
        return really(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", none_left)
    assert echoed(echo)
    assert len(tries) <= 4


def test_a_file_of_the_script_in_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    server = Echo()
    number = server.fileno()
    theirs = os.open(tmp_path / "theirs", os.O_RDWR | os.O_CREAT)
    os.dup2(theirs, number)
    assert came_true(lambda: bool(server.told))
    assert "closed its socket" in server.told[0]
    server.stop()
    assert os.fstat(number).st_ino == os.fstat(theirs).st_ino, "it is still open"
    os.close(number)
    os.close(theirs)


def test_callers_of_a_socket_that_the_script_has_opened_in_its_place_are_the_scripts() -> None:
    server = Echo()
    number = server.fileno()
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        theirs.settimeout(30)
        os.dup2(theirs.fileno(), number)
        with socket.create_connection(theirs.getsockname()) as caller_of_theirs:
            assert came_true(lambda: bool(server.told))
            with theirs.accept()[0] as accepted:
                assert accepted.getpeername() == caller_of_theirs.getsockname()
        server.stop()
        os.close(number)


def test_a_forked_worker_keeps_what_the_script_has_opened_in_place_of_the_socket(tmp_path: Path) -> None:
    server = Echo()
    number = server.fileno()
    with (tmp_path / "theirs").open("w") as theirs:
        os.dup2(theirs.fileno(), number)
        pid = os.fork()
        if pid == 0:
            os.write(number, b"of the worker")
            os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / "theirs").read_text() == "of the worker"
    server.stop()
    os.close(number)


# The next job, where the last one was killed.

KILLED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from perseus_plugin.leader.job_socket import JobSocket

server = JobSocket(Path(sys.argv[1]), lambda request: {})
if sys.argv[2] == "forked":
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
else:  # by something that does not run what Python has to be done after a fork
    number = server._server.fileno()
    pid = subprocess.Popen(["sleep", "60"], pass_fds=[number], stdout=subprocess.DEVNULL).pid
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["forked", "passed on"])
def test_a_worker_that_outlives_a_killed_trainer_does_not_keep_its_socket(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        assert trainer.wait(60) == -signal.SIGKILL
    try:
        assert (tmp_path / SOCKET_NAME).is_socket()
        os.kill(worker, 0)
        server = JobSocket(tmp_path, lambda request: {"here": True})
        assert ask(tmp_path, {"do": "list"})["here"]
        server.close()
        assert not (tmp_path / SOCKET_NAME).exists()
    finally:
        os.kill(worker, signal.SIGKILL)
