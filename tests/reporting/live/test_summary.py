from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.exchange.messages import CaughtUp, RankStats, Totals, Waited
from perseus_plugin.iteration.instructions import Instruction
from perseus_plugin.planning.plan import Plan, PlannedInstruction
from perseus_plugin.reporting.live.comparison import Compared
from perseus_plugin.reporting.live.pairs import Effect
from perseus_plugin.reporting.live.summary import build_summary, energy_per_iteration_j, iteration_time_s
from perseus_plugin.reporting.record.summary import Summary
from tests.factories import placement

PLAN = Plan(
    schedule="1F1B/2x1",
    microbatches=1,
    deadline_s=1.0,
    iteration_time_s=0.98,
    energy_j=720.0,
    energy_lower_bound_j=700.0,
    baseline_time_s=1.0,
    baseline_energy_j=900.0,
    stages=tuple(
        tuple(
            PlannedInstruction(Instruction(stage, kind, 0), clock, 0.0, 1.0)
            for kind, clock in zip(("forward", "backward"), clocks, strict=True)
        )
        for stage, clocks in enumerate(((1410, 1005), (810, 810)))
    ),
)


def stats(rank: int, totals: Mapping[str, tuple[int, float, float | None]], **more: Any) -> RankStats:
    made = {sort: Totals(iterations=n, time_s=t, energy_j=e) for sort, (n, t, e) in totals.items()}
    return RankStats(placement=placement(rank), totals=made, **more)


def summary(ranks: list[RankStats], plan: Plan | None = PLAN, **more: Any) -> dict[str, Any]:
    """As it stands in the file."""
    return cast("dict[str, Any]", json.loads(made(ranks, plan, **more).to_json()))


def made(ranks: list[RankStats], plan: Plan | None = PLAN, **more: Any) -> Summary:
    facts = {
        "world_size": 2,
        "stages": 2,
        "gpu": "test GPU",
        "emulated": True,
        "backend": "emulated",
        "state": "finished",
        "planning_time_s": 0.25,
        "dropped_plans": 1,
    }
    return build_summary(ranks, plan, **{**facts, **more})


RANKS = [
    stats(
        0,
        {"full_clock": (4, 4.4, 2000.0), "profiling": (10, 15.0, 4000.0), "plan": (5, 5.61, 1800.0)},
        overhead_s=0.002,
        hooked_iterations=20,
        overran=3,
        instructions=400,
        requests=50,
        late=1,
        switch_latency_s=(0.012, 0.02),
        caught_up=CaughtUp(iterations=5, instructions=20, late_iterations=3, raised=6, extra_energy_j=3.0),
        waited=Waited(iterations=5, planned=10, lowered=8, woken_early=1),
    ),
    stats(
        1,
        {"full_clock": (4, 4.0, 1600.0), "profiling": (10, 14.0, 3000.0), "plan": (4, 4.4, 1400.0)},
        overhead_s=0.004,
        hooked_iterations=20,
        switch_latency_s=(0.01, 0.03),
        instructions=400,
        requests=70,
        caught_up=CaughtUp(iterations=5, instructions=20, late_iterations=1, raised=1, extra_energy_j=1.0),
        waited=Waited(iterations=4, planned=4, lowered=4),
    ),
]


def test_figures_of_a_whole_job() -> None:
    made = summary(RANKS)
    # Times are rank 0's; energies are all GPUs': 500 + 400 J at full clocks, 360 + 350 J under the plan.
    assert made["iteration_time_s"] == pytest.approx({"full_clock": 1.1, "predicted": 1.1 * 0.98, "measured": 1.122})
    assert made["energy_j"] == pytest.approx({"full_clock": 900.0, "predicted": 720.0, "measured": 710.0})
    assert made["saving_percent"] == pytest.approx({"predicted": 20.0, "measured": 100 * 190 / 900})
    assert made["slowdown_percent"] == pytest.approx({"predicted": -2.0, "measured": 2.0})
    assert made["profiling"] == pytest.approx({"extra_time_s": 10 * 0.4, "extra_energy_j": 10 * (400 + 300 - 900)})
    counts = {"full_clock": 4, "profiling": 10, "plan": 5, "under_plans": 0, "straggler": 0, "all": 0}
    assert made["iterations"] == counts
    assert made["overhead"] == pytest.approx(
        {
            "hook_time_per_iteration_s": 0.006 / 40,
            "hook_time_percent": 100 * 0.006 / 40 / 1.122,
            "switch_latency_p50_s": 0.012,
            "switch_latency_p95_s": 0.03,
            "clock_requests": 120,
            "late_switches": 1,
            "emulated_instructions": 800,
            "emulated_instructions_overrun": 3,
        }
    )
    assert made["catching_up"] == pytest.approx(
        {
            "late_iterations": 3,
            "iterations": 5,
            "raised_instructions": 7,
            "raised_percent": 17.5,
            "extra_energy_per_iteration_j": 0.8,
        }
    )
    assert made["at_power_limit"] == {"full_clock_percent": None, "plan_percent": None}
    assert made["waiting"] == {"iterations": 5, "planned_waits": 14, "lowered_waits": 12, "woken_early": 1}
    assert made["plan"] == {
        "schedule": "1F1B/2x1",
        "saving_percent": pytest.approx(20.0),
        "gap_percent": pytest.approx(100 * 20 / 700),
        "confidence": None,
        "planning_time_s": 0.25,
        "clock_changes_per_iteration": [2, 0],
        "dropped_plans": 1,
    }


@pytest.mark.parametrize(("references_s", "known"), [(1.01, True), (1.25, False)])
def test_a_job_that_has_changed_since_it_was_profiled_is_not_put_on_the_plan(references_s: float, known: bool) -> None:
    """A loader that stalls now and then, say; two references do not tell what the plan does."""
    totals = {
        "full_clock": (10, 10.0, 1000.0),
        "plan": (30, 37.5, 2850.0),
        "reference": (2, 2 * references_s, 2 * 101.0),
    }
    made = summary([stats(0, totals), stats(1, totals)])
    assert (made["slowdown_percent"]["measured"] is not None) == known
    assert (made["saving_percent"]["measured"] is not None) == known
    full_s = 1.0 if known else references_s
    assert made["iteration_time_s"]["full_clock"] == pytest.approx(full_s)
    assert made["iteration_time_s"]["measured"] == pytest.approx(1.25)


def test_with_references_full_clocks_are_those_on_the_same_work() -> None:
    compared = Compared(
        Effect(math.log(1.02), 0.002, blocks=10, iterations=120), Effect(math.log(0.8), 0.01, blocks=10, iterations=120)
    )
    ranks = [replaced(one, "reference", (30, 33.0, None)) for one in RANKS]
    made = summary(ranks, compared=compared)
    assert made["iteration_time_s"]["measured"] == pytest.approx(1.122)
    assert made["iteration_time_s"]["full_clock"] == pytest.approx(1.122 / 1.02)
    assert made["energy_j"]["full_clock"] == pytest.approx(710 / 0.8)
    assert made["energy_j"]["predicted"] == pytest.approx(710 / 0.8 * 0.8)
    assert made["slowdown_percent"]["measured"] == pytest.approx(2.0)
    assert made["saving_percent"]["measured"] == pytest.approx(20.0)
    references = made["references"]
    assert (references["iterations"], references["blocks"]) == (30, 10)
    assert references["energy_not_saved_j"] == pytest.approx(30 * (710 / 0.8 - 710))
    for name, estimate in (("slowdown_percent", 2.0), ("saving_percent", 20.0)):
        low, high = references[name]
        assert low < estimate < high
    assert made["profiling"] == summary(RANKS)["profiling"], "the sweep's cost is against the sweep's own full clocks"


def test_without_references_nothing_is_said_of_them() -> None:
    assert summary(RANKS)["references"] == {
        "iterations": 0,
        "blocks": 0,
        "saving_percent": None,
        "slowdown_percent": None,
        "energy_not_saved_j": 0.0,
    }


def replaced(of_rank: RankStats, sort: str, totals: tuple[int, float, float | None]) -> RankStats:
    count, time_s, energy_j = totals
    more = {sort: Totals(iterations=count, time_s=time_s, energy_j=energy_j)}
    return of_rank.model_copy(update={"totals": {**of_rank.totals, **more}})


def test_who_and_what_is_told() -> None:
    made = summary(RANKS[:1], state="running", emulated=False, backend="nvml")
    expected = {
        "schema": "perseus-summary",
        "version": 1,
        "state": "running",
        "emulated": False,
        "gpu": "test GPU",
        "backend": "nvml",
        "ranks": 2,
        "ranks_reporting": 1,
        "stages": 2,
    }
    assert {key: made[key] for key in expected} == expected


def test_before_anything_is_known_all_figures_are_null() -> None:
    for ranks in ([], [stats(0, {}), stats(1, {})]):
        made = summary(ranks, None)
        for name in ("iteration_time_s", "energy_j", "saving_percent", "slowdown_percent", "profiling"):
            assert set(made[name].values()) == {None}, name
        assert made["plan"] is None
        assert set(made["iterations"].values()) == {0}
        assert made["overhead"]["hook_time_percent"] is None


def test_after_a_recheck_full_clocks_are_what_was_measured_then() -> None:
    """The job has become slower: saving and slowdown are against what it would take now."""
    again = [
        ranks.model_copy(update={"totals": {**ranks.totals, "recheck": Totals(iterations=2, time_s=4.0, energy_j=e)}})
        for ranks, e in zip(RANKS, (2000.0, 1600.0), strict=True)
    ]
    made = summary(again)
    assert made["iteration_time_s"]["full_clock"] == pytest.approx(2.0)
    assert made["energy_j"]["full_clock"] == pytest.approx(1800.0)
    assert made["saving_percent"]["measured"] == pytest.approx(100 * (1 - 710 / 1800))
    assert made["profiling"] == summary(RANKS)["profiling"], "the sweep is compared with what it ran beside"


def test_without_a_plan_nothing_is_predicted() -> None:
    made = summary(RANKS, None)
    assert made["energy_j"]["predicted"] is None
    assert made["energy_j"]["measured"] == pytest.approx(710)
    assert made["saving_percent"]["predicted"] is None


@pytest.mark.parametrize(
    "other",
    [{}, {"full_clock": (4, 4.0, None)}, {"full_clock": (0, 0.0, 0.0)}],
    ids=["no iteration", "no counter", "none finished"],
)
def test_an_energy_that_one_rank_does_not_know_is_not_known(other: dict[str, tuple[int, float, float | None]]) -> None:
    ranks = [RANKS[0], stats(1, other)]
    assert energy_per_iteration_j(ranks, "full_clock") is None
    made = summary(ranks)
    assert made["energy_j"]["full_clock"] is None
    assert made["energy_j"]["predicted"] is None
    assert made["saving_percent"] == {"predicted": None, "measured": None}
    assert made["iteration_time_s"]["full_clock"] == pytest.approx(1.1), "times are known all the same"


def test_the_iteration_time_is_rank_0s() -> None:
    assert iteration_time_s(RANKS[::-1], "full_clock") == pytest.approx(1.1)
    assert iteration_time_s(RANKS[1:], "full_clock") is None
    assert iteration_time_s(RANKS, "unheard of") is None


def test_a_counter_that_never_moved_gives_no_saving() -> None:
    """Iterations shorter than the counter's tick, or a counter that is stuck."""
    made = summary([stats(0, {"full_clock": (1, 0.001, 0.0), "plan": (1, 0.001, 0.0)})])
    assert made["saving_percent"] == {"predicted": None, "measured": None}


TIMES = st.one_of(st.just(0.0), st.floats(1e-6, 1e4))
TOTALS = st.dictionaries(
    st.sampled_from(["full_clock", "profiling", "plan"]),
    st.tuples(st.integers(0, 50), TIMES, st.one_of(st.none(), st.floats(-1e4, 1e8))),
)


@given(st.lists(TOTALS, max_size=3), st.sampled_from([None, PLAN]), st.integers(0, 5))
def test_figures_follow_from_the_totals(
    all_totals: list[dict[str, tuple[int, float, float | None]]], plan: Plan | None, hooked: int
) -> None:
    ranks = [
        stats(rank, totals, overhead_s=0.001 * rank, hooked_iterations=hooked) for rank, totals in enumerate(all_totals)
    ]
    made = summary(ranks, plan)
    text = json.dumps(made, allow_nan=False)  # raises for what is no JSON
    assert json.loads(text) == json.loads(json.dumps(made))
    for column, sort in (("full_clock", "full_clock"), ("measured", "plan")):
        own = all_totals[0].get(sort, (0, 0.0, None)) if all_totals else (0, 0.0, None)
        expected_s = own[1] / own[0] if own[0] else None
        assert made["iteration_time_s"][column] == (None if expected_s is None else pytest.approx(expected_s))
        rows = [totals.get(sort, (0, 0.0, None)) for totals in all_totals]
        known = rows and all(n and e for n, _, e in rows)
        expected_j = math.fsum(e / n for n, _, e in rows if n and e is not None) if known else None
        assert made["energy_j"][column] == (None if expected_j is None else pytest.approx(expected_j, abs=1e-6))
    full, run = made["energy_j"]["full_clock"], made["energy_j"]["measured"]
    if full is not None and run is not None and full > 0:
        saving = 100 - 100 * run / full
        assert made["saving_percent"]["measured"] == (pytest.approx(saving) if math.isfinite(saving) else None)
    else:
        assert made["saving_percent"]["measured"] is None
    if plan is None or full is None:
        assert made["energy_j"]["predicted"] is None
    else:
        assert made["energy_j"]["predicted"] == pytest.approx(0.8 * full)


def test_figures_of_stragglers_stand_beside_what_was_measured_meanwhile() -> None:
    assert summary(RANKS)["stragglers"] is None
    ranks = [stats(rank, {"straggler": (4, 5.0, 1000.0)}) for rank in range(2)]
    made = summary(ranks, stragglers={"iterations": 4, "energy_saved_j": 12.0, "switches": 2})["stragglers"]
    assert made == {
        "reports": 0,
        "detections": 0,
        "refused": 0,
        "replans": 0,
        "switches": 2,
        "iterations": 4,
        "energy_saved_j": 12.0,
        "time_saved_s": 0.0,
        "measured": {"iteration_time_s": 1.25, "energy_j": pytest.approx(500.0)},
    }


def test_the_share_of_the_time_at_the_power_limit_is_that_of_all_gpus_that_tell() -> None:
    def held(rank: int, full_s: float, plan_s: float) -> RankStats:
        full = Totals(iterations=4, time_s=4.0, held_s=full_s, told_s=4.0)
        return stats(rank, {}).model_copy(
            update={"totals": {"full_clock": full, "plan": Totals(iterations=1, time_s=1.0, held_s=plan_s, told_s=1.0)}}
        )

    told = [held(0, 3.0, 0.2), held(1, 1.0, 0.0), stats(2, {"full_clock": (4, 4.0, 1.0)})]
    assert summary(told)["at_power_limit"] == pytest.approx({"full_clock_percent": 50.0, "plan_percent": 10.0})
