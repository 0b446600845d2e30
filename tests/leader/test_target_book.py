"""Who may say what the job is to aim at, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.leader.target_book import (
    CONFIG,
    EVERYONE,
    Entry,
    Goal,
    Standing,
    TargetBook,
    TargetError,
    check_say,
)
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Prices, Target

USUAL, FASTER, SLOWER, FULL = (Target.slowdown(share) for share in (0.0, 0.01, 0.2, 0.5))
COMMAND, SIGNAL = Standing.COMMAND, Standing.SIGNAL
KW = PowerBudget(1000.0)


def book(*entries: Entry, limit: PowerBudget | None = None) -> TargetBook:
    made = TargetBook(USUAL, limit)
    for entry in entries:
        made.take(entry)
    return made


def states(of: TargetBook) -> dict[int, str]:
    return {number: outcome.state for number, outcome in of.outcomes.items()}


@pytest.mark.parametrize(
    ("entries", "goal"),
    [
        ([], Goal(USUAL)),
        ([Entry(1, "a", COMMAND, SLOWER)], Goal(SLOWER)),
        ([Entry(1, "a", COMMAND, SLOWER), Entry(2, "b", SIGNAL, FASTER)], Goal(SLOWER)),
        ([Entry(1, "b", SIGNAL, FASTER)], Goal(FASTER)),
        ([Entry(1, "a", COMMAND, SLOWER), Entry(2, "b", COMMAND, FASTER)], Goal(FASTER)),
        ([Entry(1, "a", COMMAND, SLOWER), Entry(2, "a", COMMAND, FASTER)], Goal(FASTER)),
        ([Entry(1, "a", COMMAND, None, KW)], Goal(USUAL, KW)),
        ([Entry(1, "a", COMMAND, None, KW), Entry(2, "b", COMMAND, Target.full())], Goal(Target.full(), KW)),
        ([Entry(1, "a", COMMAND, None, KW), Entry(2, "a", COMMAND, Target.full())], Goal(Target.full())),
        ([Entry(1, "a", COMMAND, SLOWER), Entry(2, "a", COMMAND)], Goal(USUAL)),
        ([Entry(1, "a", COMMAND, SLOWER), Entry(2, "b", SIGNAL, FASTER), Entry(3, EVERYONE, COMMAND)], Goal(FASTER)),
    ],
)
def test_what_is_in_force(entries: Sequence[Entry], goal: Goal) -> None:
    assert book(*entries).goal == goal


def test_a_live_limit_stands_above_the_configurations_and_gives_way_to_it() -> None:
    of = book(Entry(1, "site", COMMAND, None, KW, until=100.0), limit=PowerBudget(2000.0))
    assert of.goal == Goal(USUAL, KW)
    assert of.next_end == 100.0
    of.expire(99.0)
    assert of.goal == Goal(USUAL, KW)
    of.expire(100.0)
    assert of.goal == Goal(USUAL, PowerBudget(2000.0))
    assert states(of) == {1: "ended"}
    assert of.next_end == float("inf")


def test_each_word_has_an_outcome() -> None:
    of = book(Entry(1, "a", COMMAND, SLOWER))
    assert states(of) == {1: "waiting"}
    of.take(Entry(2, "a", COMMAND, FASTER))
    assert states(of) == {1: "superseded", 2: "waiting"}
    of.reached(40)
    assert (of.outcomes[2].state, of.outcomes[2].iteration) == ("in force", 40)
    of.take(Entry(3, "b", SIGNAL, SLOWER))
    of.reached(40)
    assert (of.outcomes[3].state, of.outcomes[3].reason) == ("behind", "it stands behind a")
    of.take(Entry(4, "a", COMMAND))
    of.reached(50)
    assert states(of) == {1: "superseded", 2: "ended", 3: "in force", 4: "ended"}
    assert of.outcomes[2].iteration == 40, "it was in force from then on"
    assert [outcome.number for outcome in of.take_changed()] == [1, 2, 3, 4]
    assert of.take_changed() == []


def test_what_cannot_be_planned_for_is_refused_and_what_was_before_is_aimed_at() -> None:
    of = book(Entry(1, "a", COMMAND, SLOWER), Entry(2, "b", COMMAND, None, KW))
    assert of.refuse("the lowest budget is 2000 W"), "it is the limit that cannot be kept"
    assert of.goal == Goal(SLOWER)
    assert (of.outcomes[2].state, of.outcomes[2].reason) == ("refused", "the lowest budget is 2000 W")
    assert of.refuse("too short")
    assert of.goal == Goal(USUAL)
    assert not of.refuse("the configuration's is not for anyone to take back")
    assert of.goal == Goal(USUAL)


def test_what_a_refused_word_took_the_place_of_is_its_sources_word_again() -> None:
    tight, tighter = PowerBudget(500.0), PowerBudget(400.0)
    of = book(Entry(1, "site", COMMAND, None, KW, until=100.0))
    of.reached(7)
    of.take(Entry(2, "site", COMMAND, None, tight))
    of.take(Entry(3, "site", COMMAND, None, tighter))
    assert of.goal == Goal(USUAL, tighter)
    assert of.refuse("the lowest budget is 600 W")
    assert of.goal == Goal(USUAL, KW), "a limit that is too tight does not end in none"
    assert states(of) == {1: "waiting", 2: "superseded", 3: "refused"}
    of.reached(7)
    assert (of.outcomes[1].state, of.outcomes[1].iteration) == ("in force", 7)
    of.take(Entry(4, "site", COMMAND, None, tighter))
    of.expire(101.0)
    assert of.refuse("the lowest budget is 600 W")
    assert of.goal == Goal(USUAL), "its time is over"
    of.take(Entry(5, "site", COMMAND, None, KW))
    of.reached(9)
    of.take(Entry(6, "site", COMMAND))
    assert of.goal == Goal(USUAL), "it was taken back"


def test_no_more_than_so_many_sources_have_a_word() -> None:
    of = book(*(Entry(number, f"source {number}", COMMAND, SLOWER) for number in range(1, 100)))
    assert len(of.entries) < 70
    assert of.outcomes[99].state == "refused"
    assert set(of.outcomes) == set(range(1, 100))


WORDS = st.builds(
    lambda source, standing, wish, limit, until: (source, standing, wish, limit, until),
    st.sampled_from(["a", "b", "c", EVERYONE]),
    st.sampled_from([COMMAND, SIGNAL]),
    st.sampled_from([None, FASTER, SLOWER, Target.full()]),
    st.sampled_from([None, KW]),
    st.sampled_from([None, 10.0, 20.0]),
)


@given(st.lists(st.one_of(WORDS, st.sampled_from(["reached", "refuse", 5.0, 10.0, 25.0])), max_size=40))
def test_none_is_lost_and_there_is_always_a_goal(story: list[object]) -> None:
    of, said = TargetBook(USUAL), 0
    for one in story:
        before = of.copy()
        if isinstance(one, tuple):
            said += 1
            source, standing, wish, limit, until = one
            nothing = source == EVERYONE  # only ever said to take all back
            of.take(Entry(said, source, standing, None if nothing else wish, None if nothing else limit, until=until))
        elif one == "reached":
            of.reached(said)
        elif one == "refuse":
            of.refuse("why")
        elif isinstance(one, float):
            of.expire(one)
        assert set(of.outcomes) == set(range(1, said + 1)), "each has an outcome"
        assert of.entries[0].source == CONFIG
        live = {entry.number for entry in of.entries if entry.number}
        for number, outcome in of.outcomes.items():
            gone = outcome.state in ("superseded", "refused", "ended")
            assert gone == (number not in live)
            was_over = number in before.outcomes and number not in {e.number for e in before.entries}
            if was_over and gone:
                assert outcome == before.outcomes[number], "what is over stays as it was"
            elif was_over:
                assert one == "refuse"
                assert before.outcomes[number].state == "superseded", "by what was refused"
        assert of.goal.wish is not None


@pytest.mark.parametrize(
    ("said", "wish", "limit"),
    [
        ({"slowdown": 0.1}, Target.slowdown(0.1), None),
        ({"slowdown": "10 %"}, Target.slowdown(0.1), None),
        ({"deadline_s": 2}, Target.deadline(2.0), None),
        ({"cheapest": True}, Target.cheapest(), None),
        ({"full": True, "for_s": 60}, Target.full(), None),
        ({"money": {"per_kwh": 0.2, "per_gpu_hour": 2}}, Target.money(Prices(0.2, 2.0)), None),
        ({"power_budget_w": 180e3}, None, PowerBudget(180e3)),
        ({"power_budget_w": "180kW", "slowdown": 0.05}, Target.slowdown(0.05), PowerBudget(180e3)),
        (
            {"power_budget_w": {"groups": [{"name": "rack", "of": "0-7", "watts": 2000}]}},
            None,
            PowerBudget(groups=({"name": "rack", "of": "0-7", "watts": 2000.0},)),  # type: ignore[arg-type]
        ),
        ({}, None, None),
    ],
)
def test_what_is_said_in_plain_data(said: dict[str, object], wish: Target | None, limit: PowerBudget | None) -> None:
    checked = check_say(said, 0.0)
    assert checked.wish == wish
    if limit is not None and limit.groups:
        assert checked.power_budget_w is not None
        assert [group.watts for group in checked.power_budget_w.groups] == [2000.0]
    else:
        assert checked.power_budget_w == limit


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"slowdown": -0.1}, "slowdown: got -0.1; allowed: greater than or equal to 0"),
        ({"slowdown": "fast"}, 'got "fast"; allowed: a share, such as 0.1 or "10 %"'),
        ({"slowdown": 0.1, "full": True}, "allowed: one of slowdown, deadline_s, cheapest, money and full"),
        ({"slow": 0.1}, "did you mean 'slowdown'?"),
        ({"power_budget_w": "lots"}, 'got "lots"; allowed: watts, such as 900, "900 W" or "180kW"'),
        ({"power_budget_w": 0}, "allowed: a finite number above 0"),
        ({"power_budget_w": True}, "power_budget_w"),
        ({"power_budget_w": {}}, "allowed: watts of the job, of a group, or of a peak"),
        ({"power_budget_w": {"jobs": 3}}, "jobs"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"until": 50.0}, "until: got 50, which has passed"),
        ({"until": 200.0, "for_s": 3.0}, "either until or for_s"),
        ({"source": CONFIG}, "source: allowed"),
        ({"source": "a\nb"}, "source: allowed"),
        ([], "malformed target"),
        (None, "malformed target"),
        ({"money": {"per_kwh": 0.2}}, "malformed target: money.per_gpu_hour: missing"),
        ({"money": {"per_kwh": 0.2, "per_gpu_hour": 1, "per_hour": 1}}, "money.per_hour: unknown key"),
        ({"power_budget_w": {"groups": [{"name": "a", "of": "0"}]}}, "target: power_budget_w.groups.0.watts: missing"),
    ],
)
def test_rubbish_is_refused_with_the_reason(said: object, reason: str) -> None:
    with pytest.raises(TargetError) as raised:
        check_say(said, 100.0)
    assert reason in str(raised.value)
