from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest

from perseus_plugin.reporting.live import events as events_module
from perseus_plugin.reporting.live.events import EventLog


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    logging.getLogger("perseus_plugin").propagate = True
    return caplog


def test_one_line_per_event_with_its_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    before_s = time.time()
    log.write("report", rank=5, slowdown=1.25)
    log.write("switch", iteration=7)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line.pop("time") for line in lines] == pytest.approx([before_s] * 2, abs=60)
    assert lines == [{"event": "report", "rank": 5, "slowdown": 1.25}, {"event": "switch", "iteration": 7}]


def test_what_a_killed_run_left_of_a_line_takes_none_with_it(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"time": 1.0, "event": "report"}\n{"time": 2.0, "ev')
    log = EventLog(tmp_path)
    log.write("report", rank=5)
    log.write("switch")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"time": 2.0, "ev'
    assert [json.loads(line)["event"] for line in lines[2:]] == ["report", "switch"]


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path / "missing")
    for _ in range(3):
        log.write("report")
    assert heard.text.count("cannot write events.jsonl") == 1


def test_it_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "_MAX_BYTES", 1000)
    log = EventLog(tmp_path)
    for number in range(1000):
        log.write("report", number=number)
    assert 900 < (tmp_path / "events.jsonl").stat().st_size < 1100
    assert heard.text.count("nothing more is written") == 1


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    threads = [
        threading.Thread(target=lambda: [log.write("report", text="x" * 500) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 200
    assert all(json.loads(line)["event"] == "report" for line in lines)
