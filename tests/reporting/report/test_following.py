"""A page that follows a job, as a program asks for it; `e2e/test_report_browser.py` looks at it in a browser."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseus_plugin.errors import ConfigError
from perseus_plugin.reporting.report.findings import Options
from perseus_plugin.reporting.report.following import Followed, Server
from tests.reporting.job import Job


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    made = Server(Followed(folder, Options(frontier=False)), 0)
    made.start("test")
    yield made
    made.stop()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    caller = http.client.HTTPConnection(server.server_name, server.server_port, timeout=60)
    caller.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = caller.getresponse()
    content = answer.read().decode()
    caller.close()
    return answer.status, content, answer.headers.get("ETag", "")


def test_the_page_is_made_from_what_there_is_and_sent_when_it_has_changed(folder: Path) -> None:
    clock = Clock()
    followed = Followed(folder, Options(frontier=False), clock)

    def shown() -> str:
        clock.now_s += 30.0
        return followed()[1].decode()

    assert "is no output folder of perseus" in (nothing := shown())
    assert " is there. It is looked at again.</section>" in nothing
    job = Job(folder).profiled()
    assert 'id="profile"' in shown()
    assert 'id="timeline"' not in shown()
    job.planned().summarise("running")
    assert 'id="timeline"' in (running := shown())
    assert "running" in running
    (kept := folder / "plan.json").rename(folder / "aside")
    kept.write_text("{")
    assert "plan.json" in shown()
    assert 'id="timeline"' not in shown(), "a damaged file is said, and looked at again"
    (folder / "aside").rename(kept)
    job.finished()
    assert "finished" in shown()


class Processor:
    """Asked before and after a page is made, which takes four seconds.

    Attributes:
        pages: how many have been made.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.pages, self.making = clock, 0, False

    def __call__(self) -> float:
        taken_s = self.clock.now_s
        self.making = not self.making
        if self.making:
            self.clock.now_s += 4.0
            self.pages += 1
        return taken_s


def test_a_page_takes_a_tenth_of_a_processor_at_most(folder: Path) -> None:
    clock = Clock()
    processor = Processor(clock)
    followed = Followed(folder, Options(frontier=False), clock, processor)
    for wait_s, writes, number in ((0, True, 1), (35, True, 1), (1, True, 2), (59, False, 2), (1, False, 3)):
        clock.now_s += wait_s
        if writes:
            (folder / f"{clock.now_s}").touch()
        assert b"Nothing to show" in followed()[1]
        assert processor.pages == number


def test_only_the_page_and_its_library_are_served(server: Server, folder: Path) -> None:
    Job(folder).planned().finished()
    status, page, tag = ask(server, "/")
    assert (status, "Perseus report" in page) == (200, True)
    assert 'src="/plotly.js"' in page
    assert len(page) < 1e6, "the library is fetched once, not with each page"
    assert ask(server, "/", If_None_Match=tag)[:2] == (304, "")
    status, script, tag = ask(server, "/plotly.js")
    assert (status, "plotly.js v" in script[:200]) == (200, True)
    assert ask(server, "/plotly.js", If_None_Match=tag)[0] == 304
    for path in ("/plan.json", "/../out/plan.json", "//etc/passwd", "/%2e%2e/"):
        assert ask(server, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask(server, "/", method)[0] == 501
    elsewhere = ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1]evil", "[::1].evil.example", "")
    malformed = (
        "[::1",
        "[",
        "::1",
        "evil@localhost",
        "localhost/evil",
        "localhost:",
        "localhost:evil",
        "localhost:8:0",
    )
    for host in (*elsewhere, *malformed):
        assert ask(server, "/", Host=host)[0] == 403, host
    for host in ("127.0.0.1", "LOCALHOST", "[::1]:9", "localhost:9"):
        assert ask(server, "/", Host=host)[0] == 200, f"{host}: through a tunnel"


def test_others_cannot_connect_and_a_port_that_is_taken_is_refused(server: Server, folder: Path) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    for port, why in ((server.server_port, "in use"), (70_000, "ports end at 65535")):
        with pytest.raises(ConfigError, match=rf"--serve: got {port}: .*{why}.*; allowed: a free port, or 0 for any"):
            Server(Followed(folder, Options()), port)
    with socket.create_connection(server.server_address[:2], timeout=60) as silent:  # type: ignore[arg-type]
        assert ask(server, "/")[0] == 200, "one who says nothing keeps nobody waiting"
        assert silent.fileno() >= 0
