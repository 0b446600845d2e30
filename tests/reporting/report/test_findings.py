from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.control import wire
from perseus_plugin.iteration.timetable import REFERENCE, Follow, FullClock
from perseus_plugin.planning.frontier import Frontier, make_frontier
from perseus_plugin.planning.plan import save_plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.profiling.kept import save_survey
from perseus_plugin.reporting.report.findings import Options, find, full_clock_figures, marks
from perseus_plugin.reporting.report.folder import ReportError, load_folder
from perseus_plugin.reporting.report.lanes import planned_lanes
from perseus_plugin.reporting.report.origin import explained
from perseus_plugin.reporting.report.page import page
from perseus_plugin.reporting.report.phrases import (
    DRY_RUN,
    budget_rows,
    comparison,
    energy,
    headline,
    job_line,
    least_cost_line,
    rates_line,
    valued_rows,
    worth_rows,
)
from perseus_plugin.reporting.report.worth import Rates
from tests.reporting.job import STEP_S, WAITING_W, Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "out").planned().finished()


def test_a_finished_job_is_told_in_full(job: Job) -> None:
    found = find(load_folder(job.folder))
    assert found.folder.missing == []
    assert [lane.title for lane in found.lanes] == [
        "Full clocks, by the profile",
        "Plan, as predicted",
        f"Plan, as iteration {job.plan_from + 8} ran",
    ]
    assert [(mark.iteration, mark.text) for mark in found.marks] == [
        (2, "profiling"),
        (11, "profiled"),
        (14, "plan 1"),
    ]
    assert found.frontier is not None
    assert found.frontier.baseline_energy_j == pytest.approx(job.plan.baseline_energy_j)
    assert [sample.number for sample in found.clocks] == [job.plan_from + 8] * 2


def test_savings_are_those_of_the_iterations_that_ran(job: Job) -> None:
    found = find(load_folder(job.folder))
    per, run = found.per, found.so_far
    assert per is not None
    assert run is not None
    assert not per.predicted
    assert run.used_j == pytest.approx(sum(job.counters_j), rel=1e-5)
    assert run.saved_j == pytest.approx(12 * (per.full_j - per.plan_j), rel=1e-3)
    # The made-up job runs as planned but for a millisecond around the schedule.
    assert 1 - per.plan_j / per.full_j == pytest.approx(job.plan.saving, abs=0.01)


def rewritten(job: Job, **sections: dict[str, object]) -> list[str]:
    """What is explained with some keys of the summary's sections changed."""
    path = job.folder / "summary.json"
    summary = json.loads(path.read_text())
    for name, keys in sections.items():
        summary[name] |= keys
    path.write_text(json.dumps(summary))
    return find(load_folder(job.folder)).explained


def test_the_headline_says_what_it_is_of_and_why_the_timeline_differs(job: Job) -> None:
    found = find(load_folder(job.folder))
    first, timeline, profile = found.explained
    assert first == (
        "As run: the mean of 11 iterations under plans. Full clocks: the mean of 4 iterations of the sweep, before "
        "there was a plan."
    )
    assert profile == (
        "Against the profile, by which the other rows are drawn, iteration 22 took +0.5 % time: what has changed since "
        "the sweep, other than by the plan, is in that too."
    )
    said = rewritten(job, references={"iterations": 6, "blocks": 2})
    assert said[0].endswith("; 6 iterations at full clocks since then are too few to compare with.")
    number, per = found.clocks[0].number, found.per
    assert per is not None
    assert f"{found.lanes[-1].end_s:.4f} s of iteration {number}, which took {per.plan_s:.4f} s in all" in timeline


def test_what_iterations_and_full_clocks_both_took_longer_than_the_profile_is_told_apart_from_the_plan(
    job: Job,
) -> None:
    assert job.plan.baseline_time_s > 0
    full_s = 1.034 * job.plan.baseline_time_s
    said = rewritten(
        job,
        iteration_time_s={"full_clock": full_s},
        references={"iterations": 9, "blocks": 3, "slowdown_percent": [-0.1, 0.3]},
    )
    assert said[0].endswith("Full clocks: on the same work, by 9 iterations at full clocks in between.")
    assert rewritten(job, iterations={"under_plans": 14})[0].startswith(
        "As run: the mean of 11 of 14 iterations under plans (without the first after a switch or an evaluation, and "
        "those of earlier plans)."
    )
    assert "full clocks as run +3.4 %: what both share is not due to the plan" in said[-1]


def test_a_headline_that_is_predicted_says_why(tmp_path: Path, job: Job) -> None:
    early = Job(tmp_path / "early").profiled()
    save_plan(early.plan, early.folder / "plan.json")
    early.finished()
    assert find(load_folder(early.folder)).explained[0].startswith("Predicted: no iteration under the plan has been")
    said = rewritten(job, saving_percent={"measured": None})
    assert said[0].startswith("Predicted: the job has changed since it was profiled")
    assert headline(find(load_folder(job.folder)))[0][0] == "energy saved, predicted", "as the table has it"
    assert "energy of iterations under the plan is not known" in rewritten(job, energy_j={"measured": None})[0]


def test_energy_that_is_known_in_part_is_said_to_be(job: Job) -> None:
    folder = load_folder(job.folder)
    run = folder.series()
    assert run is not None
    run.energy_j[0] = math.nan
    total, unknown = sum(stretch.count for stretch in run.stretches), run.stretches[0].count
    (said,) = explained(folder, None, run, [])
    assert said.startswith(f"The energy of {total - unknown} of {total} iterations is known")


def test_waiting_costs_blocking_power(job: Job) -> None:
    found = find(load_folder(job.folder))
    assert found.waiting_j is not None
    before, after = found.waiting_j
    assert before == pytest.approx(80.0 * found.lanes[0].waiting_s)
    assert after < before
    assert found.lowered_j is None
    assert not any("lower clocks while waiting" in row[0] for row in worth_rows(found))


def test_what_lower_clocks_save_while_waiting_is_named(tmp_path: Path) -> None:
    made = Job(tmp_path / "out", stages=3, switch_latency_s=1e-6).planned().finished()
    assert made.plan.waits
    found = find(load_folder(made.folder))
    assert found.waiting_j is not None
    assert found.lowered_j is not None
    assert found.waiting_j[0] == pytest.approx(WAITING_W[1410] * found.lanes[0].waiting_s, rel=1e-3)
    plain = Job(tmp_path / "plain", stages=3, switch_latency_s=1e-6)
    alone = planned_lanes("", replace(made.plan, waits=()), plain.profile, plain.graph)
    assert found.lowered_j == pytest.approx(alone.waiting_j - found.waiting_j[1], rel=1e-3)
    (row,) = [row for row in worth_rows(found) if "lower clocks while waiting" in row[0]]
    assert row[1] == energy(found.lowered_j)


def test_before_the_plan_has_run_its_prediction_is_told_as_such(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned(0).finished()
    found = find(load_folder(job.folder))
    assert found.per is not None
    assert found.per.predicted
    assert ("energy saved, predicted", f"{100 * job.plan.saving:.1f} %") in [card[:2] for card in headline(found)]
    assert any("no iteration under the plan was kept whole" in text for text in found.folder.missing)


def test_a_dry_run_says_that_it_is_one_and_promises_no_more(tmp_path: Path) -> None:
    job = Job(tmp_path / "out", dry_run=True).planned().finished()
    found = find(load_folder(job.folder))
    cards = headline(found)
    assert [name for name, *_ in cards if name.startswith("energy saved")] == ["energy saved, predicted"]
    said = [*found.explained, *found.folder.missing, *(" ".join(card) for card in cards)]
    said += [" ".join(row) for row in worth_rows(found)]
    assert "Predicted: what the plan would do. In a dry run no iteration is run under it." in said
    assert [text for text in said if "yet" in text or "saved under plans" in text or "-0" in text] == []
    assert found.folder.missing == []
    assert DRY_RUN.replace("`", "") in page(found).replace("`", "")


@pytest.mark.parametrize(("state", "yet"), [("running", True), ("finished", False), ("crashed", False)])
def test_what_may_still_come_is_told_from_what_will_not(tmp_path: Path, state: str, yet: bool) -> None:
    job = Job(tmp_path / "out").profiled().finished()
    job.summarise(state)
    (text,) = [one for one in load_folder(job.folder).missing if "there is no plan" in one]
    assert ("(yet)" in text) is yet


def test_of_steps_that_are_one_graph_what_is_known_is_told(tmp_path: Path) -> None:
    job = Job(tmp_path / "out", facts={"training step": "one CUDA graph"}).planned().finished()
    for whole in (job.folder / "records").glob("*.samples.json"):
        whole.unlink()  # of such steps there are none
    found = find(load_folder(job.folder))
    (text,) = [one for one in found.folder.missing if "CUDA graph" in one]
    known = found.folder.summary
    assert known is not None
    assert f"they took {known.iteration_time_s.measured:.4g} s each and {known.energy_j.measured:.4g} J" in text
    assert not any("(yet)" in one for one in found.folder.missing)


def test_a_job_that_still_profiles_is_told_as_far_as_it_came(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").profiled()
    job.finished()
    job.summarise("running")
    found = find(load_folder(job.folder))
    assert found.frontier is None
    assert found.series is not None
    assert [lane.title for lane in found.lanes] == ["Full clocks, as iteration 10 ran"]
    assert any("plan.json is not there" in text for text in found.folder.missing)


def test_events_stand_at_the_iteration_at_which_they_came(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned()
    job.timetable = job.timetable.switched(job.number, FullClock("iterations take 2 s instead of 1 s"))
    job.iterate(3)
    job.timetable = job.timetable.switched(job.number, Follow(2, straggler=True))
    job.iterate(3)
    recorder = job.recorders[1]
    number = job.plan_from + 4
    seen = job.records[1, number]
    for _ in range(2):
        recorder.helper_event(wire.Deviation(seen.begin_s + 0.01, 1110, 900))
    job.finished()
    event = {"time": time.time() + 5, "event": "detection", "rank": 1}
    (job.folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    told = {mark.text: mark.iteration for mark in find(load_folder(job.folder)).marks}
    assert told["full clocks: iterations take 2 s instead of 1 s"] == job.plan_from + 12
    assert told["plan 2 for a straggler's pace"] == job.plan_from + 15
    assert told["rank 1 capped: 900 MHz where 1110 were asked for (2 times)"] == number
    assert told["rank 1 is seen to be slow"] == job.number - 1


def test_emulated_figures_are_called_that(tmp_path: Path, job: Job) -> None:
    assert find(load_folder(job.folder)).origin[0].startswith("Emulated: GPU times, clocks, powers and energies.")
    real = Job(tmp_path / "real", emulated=False).planned().finished()
    said = find(load_folder(real.folder)).origin
    assert said[0].startswith("Measured: iteration and instruction times on the GPUs, energies by the GPUs' own")
    assert not any("mulated" in text for text in said)


def test_worth_is_told_per_run_projection_and_sample(job: Job) -> None:
    options = Options(Rates(price=0.2, currency="EUR"), hours=100.0, gpus=64, tokens_per_sample=1000)
    found = find(load_folder(job.folder), options)
    rows = {row[0]: row[1:] for row in worth_rows(found)}
    assert rows[""] == ("GPUs", "at the meter", "EUR", "CO2")
    assert found.per is not None
    assert rows["per sample (12 an iteration): plan"][0] == energy(found.per.plan_j / 12)
    assert rows["per 1,000 tokens: plan"][0] == energy(found.per.plan_j / 12)
    iterations = 100 * 3600 / found.per.plan_s * 64 / 2
    assert rows["100 hours on 64 GPUs: full clocks"][0] == energy(iterations * found.per.full_j)
    assert "a day on 64 GPUs: saved" in rows
    assert "0.2 EUR per kWh" in rates_line(options.rates)


@pytest.mark.parametrize(("gpu_hour", "slower"), [(0.0, True), (1000.0, False)])
def test_what_costs_least_is_the_slowest_worth_having_where_time_is_free_and_the_fastest_where_it_is_dear(
    job: Job, gpu_hour: float, slower: bool
) -> None:
    found = find(load_folder(job.folder), Options(Rates(price=0.2, gpu_hour=gpu_hour)))
    assert found.frontier is not None
    assert found.least_cost is not None
    samples = found.frontier.samples
    assert found.least_cost == (min(samples, key=lambda one: one.energy_j) if slower else samples[0])
    assert (f"{gpu_hour:g} per GPU-hour" in least_cost_line(found), "at full speed" in least_cost_line(found)) == (
        True,
        not slower,
    )
    assert least_cost_line(find(load_folder(job.folder), Options(Rates(price=0.2)))) == ""


def test_without_a_price_no_column_of_money(job: Job) -> None:
    found = find(load_folder(job.folder))
    assert worth_rows(found)[0] == ("", "GPUs", "at the meter", "CO2")
    assert "no price given" in rates_line(found.options.rates)


def test_intervals_stand_beside_predicted_and_measured_figures(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned(6).finished()
    path = job.folder / "summary.json"
    plain = comparison(load_folder(job.folder))
    summary = json.loads(path.read_text())
    summary["references"] |= {"slowdown_percent": [-0.5, 1.25], "saving_percent": [7.0, 9.5]}
    summary["predicted_between"] = {"saving_percent": [8.0, 8.75]}
    path.write_text(json.dumps(summary))
    slowdown, saving = comparison(load_folder(job.folder))[-2:]
    assert slowdown == (*plain[-2][:-1], plain[-2][-1] + " (-0.50 to 1.25)")
    assert saving == (*plain[-1][:-2], plain[-1][-2] + " (8.00 to 8.75)", plain[-1][-1] + " (7.00 to 9.50)")
    assert headline(find(load_folder(job.folder)))[0][2].endswith("J per iteration, 95 %: 7.0 to 9.5 %")
    path.write_text(json.dumps({**summary, "energy_j": {**summary["energy_j"], "measured": None}}))
    assert headline(find(load_folder(job.folder)))[0][2].endswith("J per iteration, 95 %: 8.0 to 8.8 %"), "predicted"
    for name in ("references", "predicted_between", "planned_schedules"):
        del summary[name]
    path.write_text(json.dumps(summary))
    assert comparison(load_folder(job.folder)) == plain, "a summary of an earlier version"


def test_what_energy_was_worth_at_each_moment_stands_beside_full_clocks(job: Job) -> None:
    path = job.folder / "summary.json"
    assert valued_rows(find(load_folder(job.folder))) == []
    money = {"total": 20.0, "under_plans": 10.0, "full_clocks": 12.0, "full_clocks_between": [11.0, 13.0]}
    worth = {"energy_kwh": 100.0, "currency": "EUR", "money": {**money, "known_percent": 99.6}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "worth": worth}))
    found = find(load_folder(job.folder), Options(Rates(pue=2.0)))
    assert valued_rows(found)[1:] == [("money", "40 EUR", "20 EUR", "24 EUR (22 to 26)", "100 %")]
    assert "24 EUR (22 to 26)" in page(found)


def test_references_are_no_changes_worth_a_mark(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned(3)
    before = marks(find(load_folder(job.finished().folder)).series.stretches, load_folder(job.folder))  # type: ignore[union-attr]
    first = job.number
    for directive in (REFERENCE, REFERENCE, Follow(1)):
        job.timetable = job.timetable.switched(job.number, directive)
        job.iterate(1)
    found = find(load_folder(job.finished().folder))
    assert found.series is not None
    assert [s.sort.reason for s in found.series.stretches if s.first >= first][:2] == ["reference", "reference"]
    assert [mark.text for mark in marks(found.series.stretches, found.folder)] == [mark.text for mark in before]


def test_a_folder_without_energies_has_no_worth(tmp_path: Path) -> None:
    job = Job(tmp_path / "out", silent=(1,))
    job.iterate(1)
    for recorder in job.recorders:
        recorder.step()
    found = find(load_folder(job.folder))
    assert worth_rows(found) == []
    assert comparison(found.folder) == []
    assert headline(found) == []
    assert job_line(found.folder) == "2 × test GPU · 2 stages"


def test_a_frontier_is_sampled_again_where_what_it_is_made_from_has_changed(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[float] = []

    def sample(planner: Planner, *, tolerance: float) -> Frontier:
        sampled.append(planner.problem.full_clock_time_s)
        return make_frontier(planner, tolerance=tolerance)

    monkeypatch.setattr("perseus_plugin.planning.frontier.make_frontier", sample)
    monkeypatch.setattr("perseus_plugin.reporting.report.findings._sampled", {})
    first, second = (find(load_folder(job.folder)).frontier for _ in range(2))
    assert first is second is not None
    folder = load_folder(job.folder)
    assert folder.survey is not None
    folder.survey = replace(folder.survey, blocking_power_w=1 + folder.survey.blocking_power_w)
    assert find(folder).frontier not in (None, first)
    assert len(sampled) == 2


def test_the_frontier_is_left_out_on_request(job: Job) -> None:
    assert find(load_folder(job.folder), Options(frontier=False)).frontier is None


@pytest.mark.parametrize(
    ("energy_j", "text"),
    [(0.0, "0 J"), (12.345, "12.3 J"), (3.5e5, "350,000 J"), (7.2e6, "2 kWh"), (-7.2e8, "-200 kWh")],
)
def test_energies_are_told_in_joules_or_kwh(energy_j: float, text: str) -> None:
    assert energy(energy_j) == text


def test_the_frontier_that_the_job_has_left_is_taken_if_it_is_of_its_plan(job: Job) -> None:
    def kept(**baseline: float) -> float:
        """Bound at the only point, by a report on the job with such a file."""
        point = {"deadline_s": 1.0, "iteration_time_s": 1.0, "energy_j": 8.0, "energy_lower_bound_j": 7.0}
        content = {"schema": "perseus-frontier", "version": 1, "baseline": baseline, "points": [point]}
        (job.folder / "frontier.json").write_text(json.dumps(content))
        found = find(load_folder(job.folder)).frontier
        assert found is not None
        return found.samples[0].bound_j

    of_plan = {"iteration_time_s": job.plan.baseline_time_s, "energy_j": job.plan.baseline_energy_j}
    assert kept(**of_plan) == 7.0
    assert kept(**{**of_plan, "energy_j": 2 * job.plan.baseline_energy_j}) != 7.0, "of another plan: computed anew"
    (job.folder / "frontier.json").write_text("{")
    with pytest.raises(ReportError, match=r"frontier\.json"):
        load_folder(job.folder)


def _events(job: Job, *rows: dict[str, object]) -> dict[str, int]:
    text = "".join(json.dumps({"time": time.time() + 5, **row}) + "\n" for row in rows)
    (job.folder / "events.jsonl").write_text(text)
    return {mark.text: mark.iteration for mark in find(load_folder(job.folder), Options(frontier=False)).marks}


def test_targets_are_named_where_they_come_into_force_and_the_budget_stands_beside_the_power(job: Job) -> None:
    begin = job.plan_from
    events: list[dict[str, object]] = [
        {"event": "goal", "iteration": begin, "says": "slowdown 0 %"},
        {"event": "goal", "iteration": begin + 4, "says": "slowdown 0 %, within 700 W", "limit": {"job_w": 700.0}},
    ]
    marks = _events(job, *events)
    assert {text: at for text, at in marks.items() if "target" in text} == {
        "target: slowdown 0 %, within 700 W": begin + 4
    }, "what the configuration says is no change"
    found = find(load_folder(job.folder), Options(frontier=False))
    assert found.per is not None
    full_w, run_w = found.per.full_j / found.per.full_s, found.per.plan_j / found.per.plan_s
    (card,) = [card for card in headline(found) if card[0] == "average power, as run"]
    assert card[1:] == (f"{run_w:,.0f} W", f"{full_w:,.0f} W at full clocks, budget 700 W")
    head, row = budget_rows(found)
    assert len(head) == len(row)
    assert row[:3] == ("the job", f"{found.budgets[0].iterations:,}", "700 W")
    assert row[3].endswith(" W")
    assert row[4].endswith(" W over 1 s")
    assert "Power budgets" in page(found)


def test_what_ends_a_straggler_is_told_as_a_recovery(job: Job) -> None:
    told = _events(
        job,
        {"event": "detection", "rank": 1, "slowdown": 1.2},
        {"event": "detection", "rank": 1, "slowdown": 1.0},
        {"event": "report", "rank": 0, "slowdown": 1.5},
        {"event": "report", "rank": 0, "slowdown": 1.0},
        {"event": "report", "rank": 2, "iteration_time_s": 3.0},
    )
    assert {text for text in told if "rank" in text} == {
        "rank 1 is seen to be slow",
        "rank 1 is seen to be back to normal",
        "rank 0 is reported slow",
        "rank 0 is reported back to normal",
        "rank 2 is reported slow",
    }


def test_of_many_marks_the_first_and_the_newest_are_told(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned()
    for turn in range(30):
        job.timetable = job.timetable.switched(job.number, FullClock(f"reason {turn}"))
        job.iterate(1)
        job.timetable = job.timetable.switched(job.number, Follow(1))
        job.iterate(1)
    job.finished()
    told = find(load_folder(job.folder), Options(frontier=False)).marks
    assert len(told) == 41
    assert (told[0].text, told[-1].text) == ("profiling", "plan 1")
    assert told[-2].text == "full clocks: reason 29"
    assert told[20].text == "23 more, left out here"
    assert [mark.iteration for mark in told] == sorted(mark.iteration for mark in told)


def test_more_deviations_than_are_kept_are_told_as_such(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned()
    seen = job.records[1, job.plan_from]
    for _ in range(300):
        job.recorders[1].helper_event(wire.Deviation(seen.begin_s + 0.01, 1110, 900))
    told = [mark.text for mark in find(load_folder(job.finished().folder), Options(frontier=False)).marks]
    assert "rank 1 capped: 900 MHz where 1110 were asked for (at least 200 times)" in told


def test_what_was_saved_at_a_stragglers_pace_stands_beside(job: Job) -> None:
    path = job.folder / "summary.json"
    content = json.loads(path.read_text())
    content["stragglers"] = {"iterations": 7, "energy_saved_j": 123.0}
    path.write_text(json.dumps(content))
    rows = {row[0]: row[1] for row in worth_rows(find(load_folder(job.folder), Options(frontier=False)))}
    assert rows["saved at a straggler's pace, 7 iterations, estimated"] == "123 J"


def test_full_clocks_are_scaled_where_instructions_were_timed_again(job: Job) -> None:
    save_survey(replace(job.survey, profile=job.profile.scaled(1 / 1.25)), {}, job.folder)
    found = find(load_folder(job.folder))
    assert found.lanes[0].title == "Full clocks, by the profile times 1.25"
    assert found.lanes[0].end_s == pytest.approx(job.plan.baseline_time_s - STEP_S, rel=1e-4)
    assert any("were timed again" in text and "times 1.25" in text for text in found.origin)
    assert found.frontier is not None
    assert found.frontier.baseline_energy_j == pytest.approx(job.plan.baseline_energy_j, rel=1e-4)


def test_without_its_profile_a_job_is_told_all_the_same(job: Job) -> None:
    (job.folder / "profile.json").unlink()
    text = (job.folder / "profile.csv").read_text().replace("backward", "recompute")
    (job.folder / "profile.csv").write_text(text)
    found = find(load_folder(job.folder))
    assert found.lanes[0].title.startswith("Full clocks, as iteration")
    assert found.frontier is None
    assert len(found.folder.missing) == 2  # profile.json, and profile.csv, which is another's


def test_a_schedule_that_changes_is_compared_with_its_own_full_clocks(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned(6)
    longer = Job(tmp_path / "longer", microbatches=12)
    for number in range(job.number, job.number + 8):
        for recorder, account in zip(job.recorders, job.accounts, strict=True):
            seen = replace(job.records[0, job.number - 1], number=number, schedule="longer")
            recorder.iteration(Follow(2), seen, job.timetable, {})
            recorder.energy(number, longer.plan.energy_j / 2)
            account.add(number, [], 0.1)
    job.recorders[0].use_schedule("longer", longer.streams.__getitem__, 2)
    job.finished()
    (job.folder / "schedule.json").write_text((job.folder / "records/schedules/1F1B.json").read_text())
    found = find(load_folder(job.folder), Options(frontier=False))
    assert found.per is not None
    assert found.so_far is not None
    scale = found.per.full_j / job.plan.baseline_energy_j
    expected = 6 * (found.per.full_j - found.per.plan_j)
    expected += 8 * (scale * longer.plan.baseline_energy_j - longer.plan.energy_j)
    assert found.so_far.saved_j == pytest.approx(expected, rel=1e-3)
    # Where both are in the summary's means, their own figures are such that they make up those.
    summary = json.loads((job.folder / "summary.json").read_text())
    summary["planned_schedules"] = {"1F1B": 6, "longer": 8}
    (job.folder / "summary.json").write_text(json.dumps(summary))
    mixed = full_clock_figures(load_folder(job.folder), found.per, found.series)
    assert (6 * mixed["1F1B"].energy_j + 8 * mixed["longer"].energy_j) / 14 == pytest.approx(found.per.full_j)
    assert (6 * mixed["1F1B"].time_s + 8 * mixed["longer"].time_s) / 14 == pytest.approx(found.per.full_s)
    assert mixed["longer"].energy_j / mixed["1F1B"].energy_j == pytest.approx(
        longer.plan.baseline_energy_j / job.plan.baseline_energy_j
    )
    assert mixed[""].energy_j == found.per.full_j
    (job.folder / "summary.json").write_text(json.dumps({**summary, "planned_schedules": {}}))
    (job.folder / "records/schedules/longer.json").unlink()
    found = find(load_folder(job.folder), Options(frontier=False))
    assert found.so_far is not None
    assert found.so_far.left_out == 8
    assert any("8 iterations left out" in row[0] for row in worth_rows(found))
    assert any("8 iterations left out" in more for _, _, more in headline(found))
    assert "8 iterations left out" in page(found)
