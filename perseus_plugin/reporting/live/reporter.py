"""Rank 0 tells: summary.json, the table at the end, events for the framework's monitor."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from perseus_plugin.errors import figure, os_problem
from perseus_plugin.exchange.messages import RankStats
from perseus_plugin.files import write_atomically
from perseus_plugin.reporting.live.summary import build_summary
from perseus_plugin.reporting.record.summary import SUMMARY_FILE, Changed, Columns, Summary

logger = logging.getLogger(__name__)

_OVERRUN_WARNING = 0.01


class Reporter:
    """Writes the summary and says what is worth saying.

    Args:
        output_dir: where summary.json goes.
        facts: what `build_summary` wants to know beside figures (`world_size`, `stages`, `gpu`, `emulated`, `backend`,
            `dry_run`).
    """

    def __init__(self, output_dir: Path, facts: dict[str, Any]) -> None:
        self._output_dir = output_dir
        self._facts = facts

    def update(
        self, stats: Sequence[RankStats], state: Literal["running", "finished", "crashed"], **of_plan: Any
    ) -> Summary:
        """Write summary.json anew and return its content.

        Args:
            stats: of all ranks heard of.
            state: of the job.
            of_plan: `plan`, `planning_time_s` and `dropped_plans` of `build_summary`.
        """
        summary = build_summary(stats, state=state, **self._facts, **of_plan)
        try:
            write_atomically(self._output_dir / SUMMARY_FILE, summary.to_json())
        except OSError as error:
            logger.warning(
                "cannot write summary.json: %s; training goes on. See to space and permissions of perseus.output_dir",
                os_problem(error),
            )
        return summary

    def finish(
        self, stats: Sequence[RankStats], state: Literal["finished", "crashed"] = "finished", **of_plan: Any
    ) -> Summary:
        """Write the last summary, print it as a table, and return it."""
        summary = self.update(stats, state, **of_plan)
        if summary.iteration_time_s.full_clock is not None:
            print_summary(summary)
        overhead = summary.overhead
        overrun, count = overhead.emulated_instructions_overrun, overhead.emulated_instructions
        if overrun > _OVERRUN_WARNING * count:
            logger.warning(
                "the CPU was too slow for %d of %d emulated instructions, so times and energies above are not the "
                "emulated GPU's; raise perseus.emulation.time_scale or the emulated times",
                overrun,
                count,
            )
        return summary


def events_of(summary: Summary) -> list[tuple[str, float]]:
    """The summary's main figures as (name, value) events for a framework's monitor."""
    sections: dict[str, Columns | Changed] = {
        "iteration_time_s": summary.iteration_time_s,
        "energy_j": summary.energy_j,
        "power_w": summary.power_w,
        "saving_percent": summary.saving_percent,
        "slowdown_percent": summary.slowdown_percent,
    }
    figures = [
        (f"Perseus/{name}/{column}", value)
        for name, section in sections.items()
        for column, value in section
        if value is not None
    ]
    worth = summary.worth
    for name, of in () if worth is None else (("money", worth.money), ("carbon_kg", worth.carbon_kg)):
        if of.total is not None:
            figures.append((f"Perseus/worth/{name}", of.total))
    seen = summary.references
    intervals = (("saving_percent", seen.saving_percent), ("slowdown_percent", seen.slowdown_percent))
    figures += [(f"Perseus/{name}", value) for name, value in summary.metrics.items()]
    return figures + [
        (f"Perseus/{name}/{column}", value)
        for name, interval in intervals
        if interval is not None
        for column, value in zip(("measured_low", "measured_high"), interval, strict=True)
    ]


def print_summary(summary: Summary, to: TextIO | None = None) -> None:
    """Print the table of a summary; to standard error unless told where."""
    kind = "emulated, no real GPU" if summary.emulated else summary.backend
    dry = "; a dry run: outside the sweep no clock was set" if summary.dry_run else ""
    rows = [["per iteration", "full clocks", "predicted", "as run"]]
    for name, columns, unit, digits in (
        ("time", summary.iteration_time_s, "s", 4),
        ("energy", summary.energy_j, "J", 1),
        ("power", summary.power_w, "W", 1),
    ):
        values = (columns.full_clock, columns.predicted, columns.measured)
        rows.append([name, *(_cell(value, unit, digits) for value in values)])
    seen, said = summary.references, summary.predicted_between
    for name, changed, expected, interval in (
        ("slowdown", summary.slowdown_percent, None, seen.slowdown_percent),
        ("energy saved", summary.saving_percent, said.saving_percent, seen.saving_percent),
    ):
        as_run = _cell(changed.measured, "%", 2) + _interval(interval)
        rows.append([name, "", _cell(changed.predicted, "%", 2) + _interval(expected), as_run])
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    table = [
        " | ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    ]
    table.insert(1, "-+-".join("-" * width for width in (name_width, *widths)))
    lines = [f"perseus: {summary.ranks} x {summary.gpu} ({kind}){dry}", *table, _remarks(summary)]
    print("\n".join(lines), file=to or sys.stderr, flush=True)


def _remarks(summary: Summary) -> str:
    remarks = [_counted(summary)]
    references = summary.references
    if references.iterations and (references.energy_not_saved_j or 0.0) > 0:
        remarks.append(f"those to compare with cost {references.energy_not_saved_j:.0f} J of saving")
    extra_s = summary.profiling.extra_time_s
    if extra_s is not None:
        # Iterations vary: lower clocks make none shorter.
        remarks.append(f"profiling cost {extra_s:.1f} s" if extra_s >= 0.05 else "profiling cost no time that shows")
    plan = summary.plan
    if plan is not None:
        above = (
            f"{figure(plan.gap_percent, '.2f')} % above the optimum of a profile whose errors are not known"
            if plan.confidence is None
            else f"{figure(plan.confidence.gap_at_most_percent, '.2f')} % above the optimum"
        )
        remarks.append(f"planned in {plan.planning_time_s:.2f} s, at most {above}")
    stragglers = summary.stragglers
    if stragglers is not None and stragglers.iterations:
        remarks.append(f"about {figure(stragglers.energy_saved_j, '.0f')} J were saved by going at a straggler's pace")
    late = summary.catching_up
    if late.raised_instructions:
        remarks.append(
            f"{late.raised_percent or 0.0:.1f} % of instructions began late and ran faster than planned to catch up, "
            f"for about {late.extra_energy_per_iteration_j or 0.0:.1f} J per iteration"
        )
    waiting = summary.waiting
    if waiting.lowered_waits:
        remarks.append(
            f"{waiting.lowered_waits} waits were spent at a lower clock, of which {waiting.woken_early} ended before "
            "it was back"
        )
    limit = summary.at_power_limit
    if limit.full_clock_percent:
        under = "" if limit.plan_percent is None else f", {limit.plan_percent:.0f} % under the plan"
        remarks.append(
            f"GPUs were at their power limit for {limit.full_clock_percent:.0f} % of the time at full clocks{under}"
        )
    worth = summary.worth
    for of, unit in () if worth is None else ((worth.money, worth.currency), (worth.carbon_kg, "kg of CO2")):
        if of.under_plans is not None and of.full_clocks is not None:
            remarks.append(
                f"by the signals {of.under_plans:.3g} {unit} under plans, and {of.full_clocks:.3g}"
                + ("" if of.full_clocks_between is None else " ({:.3g} to {:.3g})".format(*of.full_clocks_between))
                + " at full clocks"
            )
    if summary.beside.percent is not None:
        remarks.append(f"{summary.beside.percent:.1f} % of an iteration are neither computing nor loading")
    if summary.overhead.hook_time_percent is not None:
        remarks.append(f"hooks took {summary.overhead.hook_time_percent:.3f} % of the time")
    return "; ".join(remarks) + "."


def _counted(summary: Summary) -> str:
    """How many iterations there were of each sort; they add up."""
    counts = summary.iterations
    known = {
        "while profiling": counts.profiling,
        "under plans": counts.under_plans,
        "at full clocks in between to compare with": summary.references.iterations,
        "at a straggler's pace": counts.straggler,
    }
    known["otherwise at full clocks"] = max(0, counts.all - sum(known.values()))
    parts = [f"{count} {of}" for of, count in known.items() if count]
    if 0 < counts.plan < counts.under_plans:
        parts = [f"{part} ({counts.plan} under the newest)" if part.endswith("under plans") else part for part in parts]
    return f"{sum(known.values())} iterations: {', '.join(parts)}"


def _interval(percent: Sequence[float] | None) -> str:
    """Between what the figure lies, with 95 % confidence."""
    return "" if percent is None else f" ({figure(percent[0], '.2f')} to {figure(percent[1], '.2f')})"


def _cell(value: float | None, unit: str, digits: int) -> str:
    return "-" if value is None else f"{figure(value, f'.{digits}f')} {unit}"
