from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from perseus_plugin.errors import ProfileError
from perseus_plugin.exchange.messages import RankEstimate, Recheck
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.profiling.observations import StageEstimate
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.profiling.survey import Survey, certain, misfit, rescaled, stage_estimates, survey_of
from tests.factories import BLOCKING_W, CLOCKS_MHZ, placement, profile, rank_estimate, stage_estimate

STREAMS = [
    [Constant("load"), Compute("forward", 0), Constant("reduce", collective=True), Constant("step", collective=True)]
] * 3


def told(rank: int, estimate: StageEstimate, world_size: int = 2) -> RankEstimate:
    return RankEstimate(
        placement=placement(rank, world_size), gpu="test GPU", estimate=estimate.to_dict(), constant_time_s={}
    )


def surveyed(estimates: list[RankEstimate]) -> Survey:
    return survey_of(estimates, stage_estimates(estimates, 2))


def test_in_a_collective_only_the_last_stage_to_arrive_sees_its_time() -> None:
    constants = {
        (0, "load"): 0.004,
        (2, "load"): 0.001,
        (0, "reduce"): 0.5,
        (1, "reduce"): 0.02,
        (2, "reduce"): 0.3,
        (0, "step"): 0.01,
        (1, "step"): 0.40,
        (2, "step"): 0.02,
    }
    survey = Survey(profile(3), BLOCKING_W, constant_time_s=constants)
    assert survey.constants_for(STREAMS) == {
        (0, "load"): 0.004,
        (2, "load"): 0.001,
        **{(stage, "reduce"): 0.02 for stage in range(3)},
        **{(stage, "step"): 0.01 for stage in range(3)},
    }
    assert Survey(profile(), BLOCKING_W).constants_for(STREAMS) == {}


def test_what_is_collective_is_what_the_streams_say() -> None:
    survey = Survey(profile(2), BLOCKING_W, constant_time_s={(0, "step"): 0.1, (1, "step"): 0.2})
    alone = [[Compute("forward", 0), Constant("step")]] * 2
    assert survey.constants_for(alone) == survey.constant_time_s


def test_exact_estimates_give_the_profile_they_were_made_from() -> None:
    constants = [{"load": 0.001, "step": 0.01}, {"step": 0.02}]
    survey = surveyed([rank_estimate(rank, constants=constants[rank]) for rank in range(2)])
    for (stage, kind, row), (_, _, true) in zip(survey.profile.rows(), profile(2).rows(), strict=True):
        assert (row.frequency_mhz, row.time_s, row.energy_j) == (true.frequency_mhz, true.time_s, true.energy_j)
        assert (stage, kind) not in survey.unresolved
    assert survey.blocking_power_w == pytest.approx(BLOCKING_W)
    assert survey.constant_time_s == {(0, "load"): 0.001, (0, "step"): 0.01, (1, "step"): 0.02}


def test_replicas_are_pooled_and_their_constant_times_are_medians() -> None:
    estimates = [
        rank_estimate(rank, 6, 2, {"step": 0.01 * (1 + rank)} | ({"load": 0.001} if rank == 4 else {}), scale)
        for rank, scale in enumerate((0.9, 1.0, 1.1, 1.0, 1.0, 1.0))
    ]
    survey = surveyed(estimates)
    assert survey.profile.stages == 2
    for stage, kind, row in survey.profile.rows():
        true = profile(2).table[stage, kind][CLOCKS_MHZ.index(row.frequency_mhz)]
        assert row.time_s == pytest.approx(true.time_s, rel=1e-6)
        assert row.samples == 60
    # Stage 0 is ranks 0, 2 and 4.
    assert survey.constant_time_s == pytest.approx({(0, "step"): 0.03, (1, "step"): 0.04, (0, "load"): 0.001})


def test_unresolved_kinds_are_named_by_stage() -> None:
    vague = told(1, stage_estimate(1, unresolved=frozenset({"backward"})))
    assert surveyed([rank_estimate(0), vague]).unresolved == {(1, "backward")}


def test_a_stage_that_nobody_measured_is_named() -> None:
    with pytest.raises(ProfileError, match="stage 1: no rank sent measurements"):
        surveyed([rank_estimate(0)])
    with pytest.raises(ProfileError, match="stage 0"):
        surveyed([told(0, StageEstimate((), math.nan, math.nan, math.nan, math.nan, frozenset())), rank_estimate(1)])


@pytest.mark.parametrize("watts", [math.nan, 0.0, -3.0])
def test_without_a_blocking_power_there_is_no_survey(watts: float) -> None:
    estimates = [
        told(rank, replace(stage_estimate(rank), blocking_power_w=watts, blocking_power_se_w=1.0)) for rank in (0, 1)
    ]
    with pytest.raises(ProfileError, match="blocking power: no energy counter moved"):
        surveyed(estimates)


def hot(kind: str, clock: int, watts: float, error: float = 1e-4) -> RankEstimate:
    estimate = stage_estimate(1)
    rows = tuple(
        replace(row, energy_j=watts * row.time_s, energy_se_j=error * watts * row.time_s)
        if (row.kind, row.frequency_mhz) == (kind, clock)
        else row
        for row in estimate.instructions
    )
    return told(1, replace(estimate, instructions=rows))


def limited(limit_w: float, *estimates: RankEstimate) -> list[RankEstimate]:
    return [estimate.model_copy(update={"power_limit_w": limit_w}) for estimate in estimates]


def test_a_clock_whose_energy_the_card_cannot_draw_is_not_in_the_profile() -> None:
    low = CLOCKS_MHZ[-1]
    survey = surveyed(limited(410.0, rank_estimate(0), hot("forward", low, 430.0)))
    (wrong,) = survey.too_high
    assert (wrong.stage, wrong.kind, wrong.frequency_mhz, wrong.limit_w) == (1, "forward", low, 410.0)
    assert wrong.power_w == pytest.approx(430.0)
    for kind in ("forward", "backward"):
        assert [row.frequency_mhz for row in survey.profile.table[1, kind]] == list(CLOCKS_MHZ[:-1])
        assert [row.frequency_mhz for row in survey.profile.table[0, kind]] == list(CLOCKS_MHZ)
    assert survey.unresolved == frozenset()
    # Without a limit that is known, 2000 W hold.
    assert surveyed([rank_estimate(0), hot("forward", low, 430.0)]).too_high == ()
    assert len(surveyed([rank_estimate(0), hot("forward", low, 2100.0)]).too_high) == 1
    given = [rank_estimate(0), hot("forward", low, 430.0)]
    assert survey_of(given, stage_estimates(given, 2), 410.0).too_high == (wrong,)


def test_the_highest_clock_stays_and_its_kind_is_unresolved() -> None:
    top = CLOCKS_MHZ[0]
    survey = surveyed(limited(405.0, rank_estimate(0), hot("backward", top, 530.0)))
    row = survey.profile.table[1, "backward"][0]
    assert row.energy_j == pytest.approx(405.0 * row.time_s)
    assert survey.unresolved == {(1, "backward")}


def test_an_energy_above_the_limit_by_no_more_than_its_error_is_taken_for_the_limit() -> None:
    top = CLOCKS_MHZ[0]
    survey = surveyed(limited(405.0, rank_estimate(0), hot("backward", top, 412.0, error=0.01)))
    row = survey.profile.table[1, "backward"][0]
    assert row.energy_j == pytest.approx(405.0 * row.time_s)
    assert survey.too_high == ()
    assert survey.unresolved == frozenset()


def test_no_work_draws_less_than_waiting_at_its_clock() -> None:
    low = CLOCKS_MHZ[-1]
    survey = surveyed([rank_estimate(0), hot("forward", low, 0.5 * BLOCKING_W)])
    row = survey.profile.table[1, "forward"][-1]
    assert row.energy_j == pytest.approx(row.blocking_power_w * row.time_s)
    assert row.blocking_power_w == pytest.approx(BLOCKING_W)


def test_a_clock_at_which_a_kind_ran_once_is_not_certain() -> None:
    once = Profile.from_rows(
        (s, k, replace(row, samples=1 if (k, row.frequency_mhz) == ("forward", CLOCKS_MHZ[1]) else 20))
        for s, k, row in profile(2).rows()
    )
    known = certain(Survey(once, BLOCKING_W), 0.02).profile
    for rows in known.table.values():
        assert CLOCKS_MHZ[1] not in {row.frequency_mhz for row in rows}
        assert len(rows) == len(CLOCKS_MHZ) - 1


def test_an_estimate_that_cannot_be_read_is_a_profile_error() -> None:
    broken = rank_estimate(0).model_copy(update={"estimate": {"instructions": [[1]]}})
    with pytest.raises(ProfileError, match="cannot be read"):
        surveyed([broken, rank_estimate(1)])


def test_instructions_that_take_longer_now_are_scaled_at_every_clock() -> None:
    before = Survey(profile(2), BLOCKING_W, frozenset({(0, "forward")}), {(0, "load"): 0.1})
    top_s = {key: rows[0].time_s for key, rows in before.profile.table.items()}
    rechecks = [
        Recheck(stage=0, time_s={"forward": 1.5 * top_s[0, "forward"], "backward": 1.005 * top_s[0, "backward"]}),
        Recheck(stage=1, time_s={"forward": 0.5 * top_s[1, "forward"]}),
        Recheck(stage=1, time_s={"forward": 0.8 * top_s[1, "forward"]}),
        Recheck(stage=1, time_s={"forward": 3.0 * top_s[1, "forward"], "unheard_of": 1.0}),
    ]
    after = rescaled(before, rechecks)
    # Within 1 % counts as unchanged; of replicas the median counts; what nobody saw stays.
    factors = {(0, "forward"): 1.5, (0, "backward"): 1.0, (1, "forward"): 0.8, (1, "backward"): 1.0}
    for key, rows in after.profile.table.items():
        for row, old in zip(rows, before.profile.table[key], strict=True):
            assert row.time_s == pytest.approx(factors[key] * old.time_s)
            assert row.energy_j == pytest.approx(factors[key] * old.energy_j)
    assert replace(after, profile=before.profile) == before


def test_a_profile_of_something_else_is_recognised() -> None:
    survey = Survey(profile(2), BLOCKING_W)
    top_s = survey.profile.table[1, "backward"][0].time_s
    fits = [Recheck(stage=1, time_s={"backward": factor * top_s}) for factor in (0.8, 1.0, 1.2)]
    assert misfit(survey, fits) == ""
    nothing_seen = "no undisturbed iteration at full clocks was seen"
    assert misfit(survey, []) == nothing_seen
    assert misfit(survey, [Recheck(stage=0, time_s={})]) == nothing_seen
    for factor in (0.7, 1.3):
        wrong = Recheck(stage=1, time_s={"backward": factor * top_s})
        assert misfit(survey, [*fits, wrong]).startswith("stage 1 backward takes")
    assert misfit(survey, [Recheck(stage=1, time_s={"weight": 1.0})]) == (
        "stage 1 runs weight, which the profile does not have"
    )
    assert "stage 2" in misfit(survey, [Recheck(stage=2, time_s={"forward": 1.0})])


def with_time_errors(shares: dict[tuple[int, str, int], float], otherwise: float) -> Survey:
    rows = (
        (stage, kind, replace(m, time_se_s=shares.get((stage, kind, m.frequency_mhz), otherwise) * m.time_s))
        for stage, kind, m in profile(2).rows()
    )
    return Survey(Profile.from_rows(rows), BLOCKING_W)


def test_a_clock_whose_time_is_not_known_is_left_out_for_its_stage() -> None:
    top, *_, low = CLOCKS_MHZ
    survey = certain(with_time_errors({(0, "forward", low): 0.02, (1, "forward", top): 0.5}, 0.005), 0.01)
    clocks = {key: [m.frequency_mhz for m in rows] for key, rows in survey.profile.table.items()}
    for kind in ("forward", "backward"):
        assert clocks[0, kind] == list(CLOCKS_MHZ[:-1])
        assert clocks[1, kind] == list(CLOCKS_MHZ)
    assert {len(rows) for rows in certain(with_time_errors({}, 0.02), 0.01).profile.table.values()} == {1}


def test_times_without_errors_are_taken_at_their_word() -> None:
    survey = Survey(profile(2), BLOCKING_W)
    assert certain(survey, 0.01).profile.table == survey.profile.table


def varying_steps(spread: float) -> Survey:
    rows = ((stage, kind, replace(m, spread_between=spread)) for stage, kind, m in profile(2).rows())
    return Survey(Profile.from_rows(rows), BLOCKING_W)


def seen_again(survey: Survey, size: float, slower: float = 1.0, steps: int = 10) -> list[Recheck]:
    """All ranks saw steps of that size; the forward of stage 1 takes longer on top of it."""
    found = []
    for stage in range(2):
        times = {kind: size * rows[0].time_s for (s, kind), rows in survey.profile.table.items() if s == stage}
        if stage == 1:
            times["forward"] *= slower
        found.append(Recheck(stage=stage, time_s=times, steps=steps))
    return found


def test_steps_that_happened_to_be_longer_are_no_change_of_the_job() -> None:
    survey = varying_steps(0.24)
    for changed in (rescaled(survey, seen_again(survey, 1.1)), rescaled(survey, seen_again(survey, 0.93))):
        assert [m.time_s for _, _, m in changed.profile.rows()] == [m.time_s for _, _, m in survey.profile.rows()]
    even = varying_steps(0.002)
    for (*_, new), (*_, old) in zip(
        rescaled(even, seen_again(even, 1.1)).profile.rows(), even.profile.rows(), strict=True
    ):
        assert new.time_s == pytest.approx(1.1 * old.time_s)


def test_growth_beyond_chance_is_the_jobs() -> None:
    survey = varying_steps(0.24)
    grown = rescaled(survey, seen_again(survey, 1.6))
    for (*key, new), (*_, old) in zip(grown.profile.rows(), survey.profile.rows(), strict=True):
        assert new.time_s == pytest.approx(1.6 * old.time_s), key


def test_an_instruction_is_held_against_the_others_of_the_same_steps() -> None:
    survey = varying_steps(0.24)
    changed = rescaled(survey, seen_again(survey, 1.1, slower=1.3))
    for (stage, kind, new), (*_, old) in zip(changed.profile.rows(), survey.profile.rows(), strict=True):
        factor = 1.3 if (stage, kind) == (1, "forward") else 1.0
        assert new.time_s == pytest.approx(factor * old.time_s)


def test_a_kept_profile_fits_a_job_whose_steps_vary() -> None:
    survey = varying_steps(0.24)
    assert misfit(survey, seen_again(survey, 1.35)) == ""
    assert misfit(survey, seen_again(survey, 1.6)) != ""
    assert misfit(varying_steps(0.0), seen_again(survey, 1.35)) != ""


def test_without_rechecks_nothing_changes() -> None:
    before = Survey(profile(2), BLOCKING_W)
    assert rescaled(before, []) == before


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((1, value) for value in (0, 10**9, "x")),
        *((2, value) for value in (0.0, -1.0, 1e30, math.inf, True, [1])),
        *((3, -1e-3), (4, 1e30), (5, -1.0), (6, -1), (7, -0.5)),
    ],
)
def test_absurd_figures_of_one_rank_name_it_and_stop_nothing_else(column: int, value: Any) -> None:
    faulty = rank_estimate(0)
    faulty.estimate["instructions"][0][column] = value
    with pytest.raises(ProfileError, match=r"rank 0: stage estimate: cannot be read: .*got"):
        surveyed([faulty, rank_estimate(1)])


@pytest.mark.parametrize(("at", "value"), [(3, 0.0), (3, math.inf), (1, -1), (4, 0)])
def test_steps_of_no_time_are_refused(at: int, value: float) -> None:
    faulty = rank_estimate(0)
    faulty.estimate["steps"] = [[1, 1410, "forward", 0.1, 4, None]]
    surveyed([faulty, rank_estimate(1)])
    faulty.estimate["steps"][0][at] = value
    with pytest.raises(ProfileError, match="rank 0"):
        surveyed([faulty, rank_estimate(1)])


def test_an_energy_of_nothing_is_one_that_is_not_known() -> None:
    """As a counter that moves once in a while may give."""
    row = replace(stage_estimate(0).instructions[0], energy_j=0.0)
    assert math.isnan(row.lasting(0.1, 0.01).energy_se_j)


@pytest.mark.parametrize("held_mhz", [CLOCKS_MHZ[0], CLOCKS_MHZ[1]])
def test_where_the_gpu_says_that_its_limit_held_it_work_amid_waits_draws_what_was_measured(held_mhz: int) -> None:
    """Cut to the limit, what the iteration has really drawn would be lost: on an H100 a seventh."""
    estimate = hot("backward", held_mhz, 405.0 * 816 / 700, error=0.007)
    estimate.estimate["held_mhz"] = [held_mhz]
    survey = surveyed(limited(405.0, rank_estimate(0), estimate))
    row = next(row for row in survey.profile.table[1, "backward"] if row.frequency_mhz == held_mhz)
    assert row.energy_j == pytest.approx(405.0 * 816 / 700 * row.time_s)
    assert survey.too_high == ()
    beyond = hot("backward", held_mhz, 405.0 * 1.3, error=0.007)
    beyond.estimate["held_mhz"] = [held_mhz]
    assert len(surveyed(limited(405.0, rank_estimate(0), beyond)).too_high) == 1


def test_work_amid_waits_on_a_gpu_at_its_limit_is_taken_for_the_limit_and_can_be_slowed() -> None:
    """As estimated on an H100 of 700 W: 816 W, to within 0.7 %, and 30 W more that seemed to be waiting; where the GPU
    does not say that its limit held it."""
    top = CLOCKS_MHZ[0]
    survey = surveyed(limited(405.0, rank_estimate(0), hot("backward", top, 405.0 * 846 / 700, error=0.007)))
    row = survey.profile.table[1, "backward"][0]
    assert row.energy_j == pytest.approx(405.0 * row.time_s)
    assert survey.too_high == ()
    assert survey.unresolved == frozenset()


def test_stages_that_run_different_instructions_make_one_profile() -> None:
    """As where the first stage computes no gradient of its input."""
    kinds = {0: {"forward"}, 1: {"forward", "backward"}}
    estimates = []
    for stage in range(2):
        whole = stage_estimate(stage)
        estimates.append(
            told(stage, replace(whole, instructions=tuple(r for r in whole.instructions if r.kind in kinds[stage])))
        )
    survey = surveyed(estimates)
    assert set(survey.profile.table) == {(stage, kind) for stage, of in kinds.items() for kind in of}
    assert certain(survey, 0.5).profile.table == survey.profile.table
    seen = [
        Recheck(stage=stage, steps=5, time_s={kind: survey.profile.table[stage, kind][0].time_s for kind in of})
        for stage, of in kinds.items()
    ]
    assert misfit(survey, seen) == ""
    assert rescaled(survey, seen).profile.table == survey.profile.table
    wrong = [seen[0].model_copy(update={"time_s": {"backward": 1.0}}), seen[1]]
    assert misfit(survey, wrong) == "stage 0 runs backward, which the profile does not have"
