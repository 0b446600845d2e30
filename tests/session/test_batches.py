"""What a rank does with announced batches: tell of them, and follow the plans that come of that."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

import perseus_plugin
from perseus_plugin.errors import ConfigError
from perseus_plugin.exchange.messages import BatchPart
from perseus_plugin.exchange.parts import with_batch
from perseus_plugin.iteration.timetable import Follow
from perseus_plugin.session import running as running_module
from tests.session.test_session import Rank


@pytest.fixture
def rank() -> Rank:
    return Rank()


def plan_batch(rank: Rank, iteration: int, clocks_mhz: tuple[int, ...] = (1110, 810), base: int = 1) -> None:
    """A plan for one batch has come."""
    part = BatchPart(
        version=0,
        schedule="A",
        clocks_mhz=clocks_mhz,
        times_s=(0.1, 0.2),
        iteration=iteration,
        base=base,
        pace_s=0.5,
        usual_s=0.4,
    )
    rank.link.use_parts(with_batch(rank.link.parts, part))


def test_an_iteration_follows_its_own_plan_and_the_next_one_the_usual_again(rank: Rank) -> None:
    rank.follow(1, first=0)
    rank.iterate()
    rank.iterate()
    plan_batch(rank, 2)
    rank.helper.take()
    asked, undisturbed, directives = [], [], []
    for _ in range(3):
        finished = rank.iterate()
        assert finished is not None
        asked.append(rank.helper.requests())
        undisturbed.append(finished.record.undisturbed)
        directives.append(finished.directive)
    assert directives == [Follow(1, batch=True), Follow(1), Follow(1)]
    assert asked[0][:2] == [1110, 810]
    assert asked[1] == asked[2]
    assert asked[1][:2] == [810, 1410]
    assert undisturbed == [True, True, True]  # each of them ends at full clocks


def test_a_plan_made_beside_another_one_or_for_other_instructions_is_not_followed(rank: Rank) -> None:
    rank.follow(2, first=0)
    plan_batch(rank, 0, base=1)
    finished = rank.iterate()
    assert finished is not None
    assert finished.directive == Follow(2)
    plan_batch(rank, 1, clocks_mhz=(810,), base=2)
    rank.helper.take()
    finished = rank.iterate()
    assert finished is not None
    assert rank.helper.requests() == [None]  # full clocks
    assert not finished.record.undisturbed


def test_work_is_of_the_step_that_begins_next_or_so_many_later(rank: Rank) -> None:
    assert rank.session.announce([3, 4.5], 0) == ""
    rank.session.begin_iteration()
    assert rank.session.announce([1, 2], 0) == ""
    assert rank.session.announce([1, 2], 3) == ""
    rank.session.end_iteration()
    assert rank.session.announce([1, 2], 0) == ""
    told = rank.link.take_announced()
    assert [one.iteration for one in told] == [0, 1, 4, 1]
    assert told[0].work == (3.0, 4.5)


class OnGpu(list[float]):
    is_cuda = True


class ScalarOnGpu(float):
    is_cuda = True


@pytest.mark.parametrize(
    ("work", "ahead", "why"),
    [
        ([], 0, "work: got nothing; allowed: one finite number above 0 for each microbatch"),
        ([1.0, -2.0], 0, "work: got -2.0; allowed: one finite number above 0"),
        ([1.0, 0.0], 0, "work: got 0.0; allowed: one finite number above 0"),
        ([math.nan], 0, "work: got nan; allowed: one finite number above 0"),
        ([math.inf], 0, "work: got inf; allowed: one finite number above 0"),
        (None, 0, "work: 'NoneType' object is not iterable; allowed"),
        (["many"], 0, "work: could not convert string to float: 'many'; allowed"),
        (OnGpu([1.0]), 0, "work: got a tensor on a GPU, which would have to be waited for"),
        ([ScalarOnGpu(1.0)], 0, "work: got a tensor on a GPU, which would have to be waited for"),
        (itertools.repeat(1.0), 0, "work: got more than 10000 numbers; allowed: one finite number above 0"),
        ([1.0], -1, "ahead: got -1; allowed: a whole number from 0 to 1000"),
        ([1.0], 1001, "ahead: got 1001; allowed: a whole number from 0 to 1000"),
        ([1.0], 0.5, "ahead: got 0.5; allowed: a whole number from 0 to 1000"),
        ([1.0], math.nan, "ahead: got nan; allowed: a whole number from 0 to 1000"),
        ([1.0], "1", 'ahead: got "1"; allowed: a whole number from 0 to 1000'),
        ([1.0], None, "ahead: got null; allowed: a whole number from 0 to 1000"),
    ],
)
def test_what_is_no_work_is_refused_with_its_reason(rank: Rank, work: Any, ahead: Any, why: str) -> None:
    assert rank.session.announce(work, ahead).startswith(why)
    assert rank.link.take_announced() == []
    assert not rank.session.closed


def test_a_forked_process_is_told_that_nobody_hears_it(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for said in (rank.session.announce([1.0], 0), rank.session.set_target(full=True), rank.session.report_straggler()):
        assert said.startswith("this process was forked from the training process")
    assert rank.link.take_announced() == []


def test_a_call_that_is_refused_is_warned_of_once_and_raises_nothing(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(perseus_plugin, "_said_refused", False)
    monkeypatch.setattr(running_module, "running_sessions", lambda: [rank.session])
    assert perseus_plugin.announce([1.0, 2.0])
    assert not perseus_plugin.announce([math.nan])
    assert not perseus_plugin.announce([-1.0])
    assert caplog.text.count("announced work was refused: work: got nan") == 1
    assert "got -1.0" not in caplog.text


@pytest.mark.parametrize("within", [False, True])
def test_batches_that_are_read_ahead_are_announced_for_the_steps_that_run_them(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """Whether the next one is asked for before its step begins or, as by the iterators of frameworks, in it."""
    monkeypatch.setattr(running_module, "running_sessions", lambda: [rank.session])
    read, ran = list[int](), list[int]()

    def loader() -> Iterator[list[int]]:
        for number in range(7):
            read.append(number)
            yield [number, 10]

    batches = perseus_plugin.announced(loader(), lambda batch: [1 + one for one in batch], ahead=3)
    for step in range(7):
        if within:
            rank.session.begin_iteration()
        ran.append(next(batches)[0])
        assert len(read) == min(step + 4, 7)
        if not within:
            rank.session.begin_iteration()
        rank.session.end_iteration()
    assert next(batches, None) is None
    assert ran == list(range(7))
    assert [(one.iteration, one.work) for one in rank.link.take_announced()] == [(i, (1 + i, 11)) for i in range(7)]


@pytest.mark.parametrize(
    "work",
    [
        lambda batch: batch["attention_mask"],
        lambda batch: 1.0,
        lambda batch: [0.0],
    ],
)
def test_a_function_that_tells_no_work_leaves_batches_as_they_are(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, work: Any
) -> None:
    monkeypatch.setattr(perseus_plugin, "_said_refused", False)
    monkeypatch.setattr(running_module, "running_sessions", lambda: [rank.session])
    assert list(perseus_plugin.announced([[1], [2], [3]], work, ahead=1)) == [[1], [2], [3]]
    assert caplog.text.count("announced work was refused: work: ") == 1
    monkeypatch.setattr(running_module, "running_sessions", list)
    assert list(perseus_plugin.announced([[1], [2]], work, ahead=9)) == [[1], [2]]


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_a_loader_that_fails_does_so_in_the_same_step_and_may_go_on(ahead: int) -> None:
    class Loader:
        number = 0

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            self.number += 1
            if self.number == 4:
                raise OSError("not there")
            if self.number == 8:
                raise StopIteration
            return self.number

    batches = perseus_plugin.announced(Loader(), lambda batch: [batch], ahead=ahead)
    assert [next(batches) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(OSError, match="not there"):
        next(batches)
    assert list(batches) == [5, 6, 7]


@pytest.mark.parametrize(("ahead", "shown"), [(-1, "-1"), (1001, "1001"), (None, "null"), (0.5, "0.5"), (True, "true")])
def test_how_far_ahead_is_checked_before_training(ahead: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=rf"ahead: got {shown}; allowed: a whole number from 0 to 1000"):
        perseus_plugin.announced([], list, ahead=ahead)


def test_without_a_session_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(running_module, "running_sessions", list)
    assert not perseus_plugin.announce([1.0])
    assert caplog.text == ""
