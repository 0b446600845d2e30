from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.stragglers.book import (
    DETECTION,
    Report,
    StragglerBook,
    StragglerError,
    check_report,
    rounded_slowdown,
)

NOW = 1_000_000.0
WORLD = 8


def report(rank: int = 5, slowdown: float | None = 1.25, **more: Any) -> dict[str, Any]:
    return Report(**{"rank": rank, "slowdown": slowdown, "time": NOW, **more}).model_dump()


@pytest.fixture
def book() -> StragglerBook:
    return StragglerBook(WORLD, 100.0)


def test_a_report_comes_back_as_it_went() -> None:
    value = report(until=NOW + 60, source="scheduler", id="a")
    assert check_report(value, WORLD, 100.0, NOW).model_dump() == value
    timed = report(slowdown=None, iteration_time_s=0.5)
    assert check_report(timed, WORLD, 100.0, NOW).iteration_time_s == 0.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 8}, "rank: got 8; allowed: 0 to 7, the ranks of this job"),
        ({"rank": -1}, "rank: got -1; allowed: 0 to 7"),
        ({"slowdown": 0.99}, "slowdown: got 0.99; allowed: 1 to 100"),
        ({"slowdown": 100.1}, "slowdown: got 100.1; allowed: 1 to 100"),
        ({"slowdown": float("nan")}, "malformed report: slowdown"),
        ({"slowdown": float("inf")}, "malformed report: slowdown"),
        ({"slowdown": "1.25"}, 'malformed report: slowdown: got "1.25"; allowed: a valid number'),
        ({"slowdown": None}, "either slowdown or iteration_time_s"),
        ({"iteration_time_s": 1.0}, "either slowdown or iteration_time_s"),
        ({"slowdown": None, "iteration_time_s": 0.0}, "iteration_time_s: got 0; allowed: above 0"),
        ({"rank": "5"}, "malformed report: rank"),
        ({"rank": True}, "malformed report: rank"),
        ({"rank": 5.0}, "malformed report: rank"),
        ({"until": NOW - 1}, "until: got 999999, which has passed"),
        ({"time": NOW - 601}, "time: the report is from 601 s ago"),
        ({"time": NOW + 61}, "time: the report is from -61 s ago"),
        ({"source": ""}, "malformed report: source"),
        ({"source": "a\nb"}, "source and id must be printable"),
        ({"id": "x" * 65}, "malformed report: id"),
        ({"colour": "red"}, "malformed report: colour"),
    ],
)
def test_what_is_wrong_is_refused_with_one_reason(changes: dict[str, Any], reason: str, book: StragglerBook) -> None:
    with pytest.raises(StragglerError) as refused:
        book.take({**report(), **changes}, NOW)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert book.live(NOW) == []


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
        max_leaves=8,
    )
)
def test_rubbish_is_refused_and_nothing_else(value: Any) -> None:
    with pytest.raises(StragglerError, match="malformed report"):
        check_report(value, WORLD, 100.0, NOW)


def test_a_replayed_report_is_refused(book: StragglerBook) -> None:
    value = report(id="once")
    book.take(value, NOW)
    with pytest.raises(StragglerError, match="replayed: a report with the id 'once'"):
        book.take(value, NOW + 1)
    book.clear()
    with pytest.raises(StragglerError, match="replayed"):
        book.take(value, NOW + 500)
    with pytest.raises(StragglerError, match="time"):
        book.take(value, NOW + 10_000)


def test_an_older_report_does_not_replace_a_newer_one(book: StragglerBook) -> None:
    book.take(report(slowdown=1.1, time=NOW), NOW)
    with pytest.raises(StragglerError, match="a newer report"):
        book.take(report(slowdown=3.0, time=NOW - 5), NOW)
    assert book.slow_ranks(NOW)[0].slowdown == 1.1


def test_several_ranks_and_sources_at_once(book: StragglerBook) -> None:
    book.take(report(1, 1.2), NOW)
    book.take(report(1, 1.3, source="scheduler"), NOW)
    book.take(report(6, None, iteration_time_s=0.7), NOW)
    slow = book.slow_ranks(NOW)
    assert [(s.rank, s.slowdown, s.iteration_time_s) for s in slow] == [(1, 1.3, 0.0), (6, 1.0, 0.7)]
    assert slow[0].sources == ("python", "scheduler")
    book.take(report(1, 1.0, source="scheduler"), NOW)
    assert book.slow_ranks(NOW)[0].slowdown == 1.2


def test_the_newest_report_of_a_source_counts(book: StragglerBook) -> None:
    book.take(report(1, 1.5), NOW)
    book.take(report(1, 1.2, time=NOW + 1), NOW + 1)
    assert [s.slowdown for s in book.slow_ranks(NOW + 1)] == [1.2]
    book.take(report(1, 1.0, time=NOW + 2), NOW + 2)
    assert book.slow_ranks(NOW + 2) == []


def test_a_report_expires(book: StragglerBook) -> None:
    book.take(report(1, 1.5, until=NOW + 10), NOW)
    assert len(book.slow_ranks(NOW + 9.9)) == 1
    assert book.slow_ranks(NOW + 10) == []


def test_clearing_leaves_what_is_seen(book: StragglerBook) -> None:
    for rank in (1, 2):
        book.take(report(rank), NOW)
    book.take(report(3, source=DETECTION), NOW)
    assert [r.rank for r in book.clear(1)] == [1]
    assert [r.rank for r in book.clear()] == [2]
    assert [s.rank for s in book.slow_ranks(NOW)] == [3]


def test_an_iteration_time_is_judged_by_that_at_full_clocks(book: StragglerBook) -> None:
    book.judge_by(0.5)
    with pytest.raises(
        StragglerError, match=r"iteration_time_s: got 0.4; allowed: 0.5 \(an iteration at full clocks\)"
    ):
        book.take(report(slowdown=None, iteration_time_s=0.4), NOW)
    with pytest.raises(StragglerError, match="100 times"):
        book.take(report(slowdown=None, iteration_time_s=51.0), NOW)
    book.take(report(slowdown=None, iteration_time_s=0.6), NOW)


def test_when_most_ranks_are_seen_to_be_slow_nobody_straggles(book: StragglerBook) -> None:
    for rank in range(4):
        book.take(report(rank, source=DETECTION), NOW)
    assert len(book.slow_ranks(NOW)) == 4
    book.take(report(4, source=DETECTION), NOW)
    book.take(report(7, 2.0), NOW)
    assert [(s.rank, s.slowdown) for s in book.slow_ranks(NOW)] == [(7, 2.0)], "what was reported still holds"
    book.take(report(4, 1.0, source=DETECTION), NOW)
    assert len(book.slow_ranks(NOW)) == 5


def test_one_rank_cannot_be_reported_by_sources_without_end(book: StragglerBook) -> None:
    for number in range(16):
        book.take(report(1, source=f"s{number}"), NOW)
    with pytest.raises(StragglerError, match="16 sources have reported it already"):
        book.take(report(1, source="one more"), NOW)


def test_ids_are_forgotten_once_the_time_alone_refuses_a_replay(book: StragglerBook) -> None:
    for second in range(2000):
        book.take(report(1, time=NOW + second), NOW + second)
    assert len(book._seen) < 700


def test_threads_lose_nothing(book: StragglerBook) -> None:
    def tell(rank: int) -> None:
        for second in range(100):
            book.take(report(rank, 1.0 + second / 100, time=NOW + second / 100), NOW + 1)

    threads = [threading.Thread(target=tell, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [s.slowdown for s in book.slow_ranks(NOW + 1)] == [1.99] * WORLD


@given(st.floats(1.0, 100.0))
def test_a_rounded_slowdown_is_never_larger_and_near(slowdown: float) -> None:
    rounded = rounded_slowdown(slowdown)
    assert 1.0 <= rounded <= slowdown + 1e-6
    assert slowdown - rounded < 0.0100001
    assert rounded_slowdown(rounded) == rounded
