"""Stragglers as a rank's worker hears and tells of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.exchange.messages import NEWS, STRAGGLERS, News, PaceOf, PlanPart, PlanParts, pace_key, part_key
from perseus_plugin.iteration.timetable import Follow
from perseus_plugin.leader.job_socket import SOCKET_NAME, ask
from perseus_plugin.stragglers.book import DETECTION, Report
from tests.session.test_worker import Rank, Ranks, ranks, stats_of
from tests.waiting import came_true

__all__ = ["ranks"]  # the fixture


def tell(rank: Rank, sequence: int, switch: int, version: int, variants: dict[int, int], straggler: bool) -> None:
    """Rank 0 names plans, whose parts are there already."""
    for named in {version, *variants.values()}:
        for stage in range(2):
            times_s = (0.010 + 0.001 * named, 0.020)
            part = PlanPart(version=named, schedule="1F1B", clocks_mhz=(810, 1410), times_s=times_s)
            parts = PlanParts(version=named, parts=(part,))
            rank.exchange.publish(part_key(named, stage), parts.model_dump())
    news = News(
        sequence=sequence, switch=switch, action="follow", version=version, variants=variants, straggler=straggler
    )
    rank.exchange.publish(NEWS, news.model_dump())


def test_all_ranks_switch_at_one_iteration_each_replica_to_its_own_plan(ranks: Ranks) -> None:
    job = [ranks(rank, world_size=6) for rank in range(1, 6)]
    tell(job[0], 1, 3, 1, {}, straggler=False)
    assert came_true(lambda: all(rank.link.timetable.at(3) == Follow(1) for rank in job))
    tell(job[0], 2, 7, 2, {1: 3}, straggler=True)
    for rank in job:
        version = 3 if rank.rank in (2, 3) else 2
        assert came_true(lambda: rank.link.timetable.at(7) == Follow(version, True))  # noqa: B023 - called at once
        assert rank.link.timetable.at(6) == Follow(1), "not before the agreed iteration"
        assert rank.link.parts[version, "1F1B"].times_s[0] == pytest.approx(0.010 + 0.001 * version)
        assert (1, "1F1B") in rank.link.parts, "the plan it still follows is kept"


def test_a_stragglers_iterations_do_not_count_for_the_plan(ranks: Ranks) -> None:
    rank = ranks()
    for sequence, version, straggler, count in ((1, 1, False, 3), (2, 2, True, 4), (3, 1, False, 2)):
        switch = rank.number
        tell(rank, sequence, switch, version, {}, straggler)
        wanted = Follow(version, straggler)
        assert came_true(lambda: rank.link.timetable.at(switch) == wanted)  # noqa: B023 - called at once
        rank.iterate(count)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 9)
    counts = {sort: totals.iterations for sort, totals in stats_of(rank).totals.items()}
    assert (counts["plan"], counts["straggler"]) == (5, 4)


def test_what_is_reported_reaches_the_list(ranks: Ranks) -> None:
    rank = ranks()
    report = Report(rank=1, slowdown=1.25)
    rank.link.report(report)
    told: list[object] = []
    assert came_true(lambda: bool(told.extend(rank.exchange.take_new(STRAGGLERS)) or told))
    assert told == [report.model_dump()]


def test_a_rank_that_becomes_slow_says_so_once(ranks: Ranks) -> None:
    rank = ranks()
    tell(rank, 1, 0, 1, {}, straggler=False)
    assert came_true(lambda: rank.link.timetable.at(0) == Follow(1))
    rank.iterate(20)
    rank.exchange.publish(pace_key(0, 0), PaceOf(pace=dict.fromkeys(range(40), 1.0)).model_dump())
    rank.iterate(20, factor=1.5)
    said: list[Any] = []
    assert came_true(lambda: bool(said.extend(rank.exchange.take_new(STRAGGLERS)) or said))
    (told,) = said
    assert (told["rank"], told["source"]) == (1, DETECTION)
    assert told["slowdown"] == pytest.approx(1.5, rel=0.01)


def test_rank_0_serves_the_command_line_until_it_ends(ranks: Ranks, tmp_path: Path) -> None:
    rank = ranks(0)
    assert ask(tmp_path, {"do": "list"}) == {"ok": True, "reports": []}
    value = Report(rank=1, slowdown=1.25, source="cli").model_dump()
    ask(tmp_path, {"do": "report", "report": value})
    assert ask(tmp_path, {"do": "list"})["reports"] == [value]
    rank.close()
    assert not (tmp_path / SOCKET_NAME).exists()


def test_a_folder_that_cannot_have_a_socket_costs_only_the_command_line(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    logging.getLogger("perseus_plugin").propagate = True
    (tmp_path / SOCKET_NAME).write_text("in the way")
    rank = ranks(0)
    assert caplog.text.count("`perseus target` and `perseus straggler` cannot reach this job") == 1
    rank.iterate(3)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 3)
    assert not rank.failures
