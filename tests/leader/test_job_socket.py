from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.errors import PerseusError
from perseus_plugin.leader import job_socket
from perseus_plugin.leader.job_socket import SOCKET_NAME, JobSocket, ask


class Desk:
    """Notes requests; refuses what it is told to."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.refusal: Exception | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(request)
        if self.refusal is not None:
            raise self.refusal
        return {"number": len(self.seen)}


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose path is longer than a socket's may be."""
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    return deep


@pytest.fixture
def served(folder: Path, desk: Desk) -> Iterator[JobSocket]:
    server = JobSocket(folder, desk.answer)
    yield server
    server.close()


def raw(folder: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection, job_socket._short_path(folder) as path:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


@pytest.mark.usefixtures("served")
def test_a_request_is_answered(folder: Path, desk: Desk) -> None:
    assert ask(folder, {"do": "list"}) == {"ok": True, "number": 1}
    assert ask(folder, {"do": "list"}) == {"ok": True, "number": 2}
    assert desk.seen == [{"do": "list"}] * 2


@pytest.mark.usefixtures("served")
def test_a_refusal_is_an_error_with_the_reason(folder: Path, desk: Desk) -> None:
    desk.refusal = PerseusError("rank: got 9; allowed: 0 to 3")
    with pytest.raises(PerseusError, match=r"^rank: got 9; allowed: 0 to 3$"):
        ask(folder, {"do": "report"})


@pytest.mark.usefixtures("served")
def test_only_the_owner_may_use_it(folder: Path) -> None:
    mode = (folder / SOCKET_NAME).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.usefixtures("served")
def test_another_user_is_refused_by_the_kernels_word(folder: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_socket, "_caller", lambda connection: os.geteuid() + 1)
    with pytest.raises(PerseusError, match="may not use this job's socket"):
        ask(folder, {"do": "list"})
    assert desk.seen == []


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]\n", b"null\n", b"\xff\xfe\n", b"[" * 5000 + b"\n", b"x" * 100_000, b'{"do": 1'],
)
def test_rubbish_is_refused_and_the_next_caller_served(folder: Path, desk: Desk, data: bytes) -> None:
    try:
        reply = json.loads(raw(folder, data) or b'{"ok": false}')
        assert reply["ok"] is False
    except OSError:
        pass  # it hung up in the middle of a line without end
    assert desk.seen == []
    assert ask(folder, {"do": "list"})["ok"]


@pytest.mark.usefixtures("served")
def test_a_caller_who_says_nothing_does_not_hold_up_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_socket, "_TIMEOUT_S", 1.0)
    with socket.socket(socket.AF_UNIX) as silent, job_socket._short_path(folder) as path:
        silent.connect(path)
        assert ask(folder, {"do": "list"})["ok"]


@pytest.mark.usefixtures("served")
def test_an_answer_that_fails_does_not_end_the_service(folder: Path, desk: Desk) -> None:
    desk.refusal = RuntimeError("bug")
    with pytest.raises(PerseusError):
        ask(folder, {"do": "list"})
    desk.refusal = None
    assert ask(folder, {"do": "list"})["ok"]


def test_closing_removes_it(folder: Path, desk: Desk) -> None:
    server = JobSocket(folder, desk.answer)
    server.close()
    assert list(folder.iterdir()) == []
    server.close()
    with pytest.raises(PerseusError, match="no running job answers here"):
        ask(folder, {"do": "list"})


def test_a_missing_folder_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(PerseusError, match="no running job answers here"):
        ask(tmp_path / "missing", {"do": "list"})


def test_what_a_dead_job_left_is_replaced_and_a_live_jobs_is_not(folder: Path, desk: Desk) -> None:
    with socket.socket(socket.AF_UNIX) as dead, job_socket._short_path(folder) as path:
        dead.bind(path)
    server = JobSocket(folder, desk.answer)
    assert ask(folder, {"do": "list"})["ok"]
    with pytest.raises(OSError, match="another running job serves this folder"):
        JobSocket(folder, desk.answer)
    assert ask(folder, {"do": "list"})["ok"]
    server.close()


def test_a_file_of_that_name_is_not_removed(folder: Path, desk: Desk) -> None:
    (folder / SOCKET_NAME).write_text("mine")
    with pytest.raises(OSError, match=r"there is another file called stragglers\.sock"):
        JobSocket(folder, desk.answer)
    assert (folder / SOCKET_NAME).read_text() == "mine"


@pytest.mark.usefixtures("served")
def test_many_slow_callers_do_not_lock_out_the_others(folder: Path) -> None:
    slow = []
    for _ in range(50):
        connection = socket.socket(socket.AF_UNIX)
        with job_socket._short_path(folder) as path:
            connection.connect(path)
        connection.sendall(b"{")
        slow.append(connection)
    assert ask(folder, {"do": "list"})["ok"]
    for connection in slow:
        connection.close()


def test_a_link_of_that_name_is_not_followed(folder: Path, desk: Desk, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        (folder / SOCKET_NAME).symlink_to(tmp_path / "other")
        with pytest.raises(OSError, match="there is another file called"):
            JobSocket(folder, desk.answer)
