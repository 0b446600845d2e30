"""Where comes in what a job is to aim at: the socket, ranks, and a file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import TARGETS
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.leader.target_book import Entry, Goal, Standing, TargetBook, TargetError
from perseus_plugin.leader.target_desk import FILE, SIGNALS, TargetDesk
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Target


class Desk:
    """A desk at which it is 1,000 s, and ten seconds later at every look."""

    def __init__(self, file: Path | None = None, signals: list[dict[str, Any]] | None = None) -> None:
        self.exchange, self.woken, self.now_s = LocalExchange(), 0, 1000.0
        self.desk = TargetDesk(
            self.exchange,
            signals=None if signals is None else SignalDesk(signals, now=lambda: self.now_s),
            file=file,
            wake=self._wake,
            now=lambda: self.now_s,
            monotonic=lambda: self.now_s,
        )

    def _wake(self) -> None:
        self.woken += 1

    def look(self) -> list[Entry]:
        self.now_s += 10.0
        return list(self.desk.collect())

    def wishes(self) -> list[tuple[str, Target | None]]:
        return [(entry.source, entry.wish) for entry in self.look()]


def test_what_the_socket_says_is_numbered_and_comes_in_order() -> None:
    desk = Desk()
    said: list[dict[str, Any]] = [{"slowdown": 0.1, "source": "a", "for_s": 60}, {"full": True, "source": "b"}]
    assert [desk.desk.request({"do": "target", "target": one}) for one in said] == [{"number": 1}, {"number": 2}]
    assert [entry["number"] for entry in desk.desk.request({"do": "targets"})["heard"]] == [1, 2]
    assert desk.desk.request({"do": "clear_target", "source": "a"}) == {"number": 3}
    assert desk.woken == 3
    first, second, third = desk.look()
    assert (first.number, first.source, first.wish, first.since, first.until) == (
        1,
        "a",
        Target.slowdown(0.1),
        1000.0,
        1060.0,
    )
    assert (second.wish, second.until) == (Target.full(), None)
    assert (third.source, third.says_nothing) == ("a", True)
    assert desk.look() == []


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"do": "target"},
        {"do": "target", "target": {"slowdown": -1}},
        {"do": "target", "target": {"slowdown": 0.1}, "more": 1},
        {"do": "clear_target"},
        {"do": "clear_target", "source": 1},
        {"do": "clear_target", "source": ""},
    ],
)
def test_other_requests_are_refused(request_: dict[str, Any]) -> None:
    desk = Desk()
    with pytest.raises(TargetError, match="malformed"):
        desk.desk.request(request_)
    assert desk.look() == []


def test_ranks_say_theirs_through_the_store_and_rubbish_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("perseus_plugin").propagate = True
    desk = Desk()
    for value in ({"slowdown": 0.2, "source": "rank 3"}, {"slowdown": "x"}, [], {"cheapest": True}):
        desk.exchange.append(TARGETS, value)
    assert desk.wishes() == [("rank 3", Target.slowdown(0.2)), ("python", Target.cheapest())]
    assert caplog.text.count("a target was refused: malformed target") == 2


def test_a_live_budget_has_what_the_configuration_says_beside_it() -> None:
    config = parse_config({"power_budget_groups_w": {"0-3": 900.0}, "node_overhead_w": 300.0, "peak_w": 5000.0})
    desk = TargetDesk(LocalExchange(), complete=lambda limit: limit.completed(config))
    desk.request({"do": "target", "target": {"power_budget_w": "2 kW"}})
    desk.request({"do": "target", "target": {"power_budget_w": {"job_w": 3e3, "node": {"watts": 100.0}}}})
    first, second = (entry.limit for entry in desk.collect())
    assert first is not None
    assert second is not None
    assert (first.job_w, [group.of for group in first.groups], first.node.watts) == (2000.0, ["0-3"], 300.0)
    assert (second.job_w, second.node.watts, second.peaks.job_w) == (3000.0, 100.0, 5000.0)


def test_what_is_shown_is_what_the_job_aims_at() -> None:
    desk, book = Desk(), TargetBook(Target.slowdown())
    desk.desk.request({"do": "target", "target": {"slowdown": 0.1}})
    for entry in desk.look():
        book.take(entry)
    desk.desk.show(book, TargetBook(Target.slowdown()).goal, "following", 12)
    told = desk.desk.request({"do": "targets"})
    assert told["in_force"]["says"] == "slowdown 0 %"
    assert (told["aimed_at"], told["iteration"], told["heard"]) == ("slowdown 10 %", 12, [])
    assert [(one["number"], one["state"]) for one in told["outcomes"]] == [(1, "waiting")]
    assert [one["says"] for one in told["entries"]] == ["slowdown 0 %", "slowdown 10 %"]


def write(file: Path, text: str) -> None:
    beside = file.with_name("beside")
    beside.write_text(text)
    beside.replace(file)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("perseus_plugin").propagate = True
    file = tmp_path / "target.json"
    desk = Desk(file)
    assert desk.wishes() == []
    write(file, '{"slowdown": 0.1}')
    assert desk.wishes() == [(FILE, Target.slowdown(0.1))]
    assert desk.wishes() == [], "it has not changed"
    write(file, '{"slowdown": 20}')
    assert desk.wishes() == [], "what it said before stays"
    assert desk.wishes() == []
    assert caplog.text.count("slowdown: got 20; allowed") == 1
    for rubbish in ("{", "[]", "\xff", "[" * 5000):
        write(file, rubbish)
        assert desk.wishes() == []
    assert caplog.text.count("What it said before stays; correct the file") == 5
    write(file, '{"full": true, "source": "somebody"}')
    assert desk.wishes() == [(FILE, Target.full())]
    file.unlink()
    assert desk.wishes() == [(FILE, None)]
    assert desk.wishes() == []
    file.mkdir()
    assert desk.wishes() == []
    assert caplog.text.count("What it said before stays; correct the file") == 6
    file.rmdir()
    os.mkfifo(file)  # that nobody writes to: rank 0 must not wait for it
    assert desk.wishes() == []
    assert caplog.text.count("target.json: it is no regular file. What it said before stays") == 2, "nor was the folder"


def test_signals_stand_below_commands_and_above_the_configuration_and_are_heard_as_they_change(tmp_path: Path) -> None:
    day = tmp_path / "day.csv"
    day.write_text("time,power_budget_w\n1970-01-01T00:17Z,900\n1970-01-01T00:18Z,\n")
    desk = Desk(signals=[{"source": "schedule", "file": str(day)}])
    book = TargetBook(Target.slowdown(0.0), PowerBudget(2000.0))

    def goal() -> Goal:
        for entry in desk.look():
            book.take(entry)
        return book.goal

    def limit_w() -> float | None:
        limit = goal().limit
        return None if limit is None else limit.job_w

    assert limit_w() == 2000.0, "it is 00:16:50"
    desk.now_s = 1020.0
    assert limit_w() == 900.0
    assert [(entry.source, entry.standing) for entry in book.entries[1:]] == [(SIGNALS, Standing.SIGNAL)]
    limit = book.entries[1].limit
    assert limit == PowerBudget(900.0, or_nearest=True), "nobody is there to be refused"
    desk.desk.request({"do": "target", "target": {"power_budget_w": 1000, "source": "site"}})
    assert limit_w() == 1000.0
    desk.desk.request({"do": "clear_target", "source": None})
    assert limit_w() == 900.0, "what a signal asks for no command takes back"
    desk.now_s = 1080.0
    assert limit_w() == 2000.0
