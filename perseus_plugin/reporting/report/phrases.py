"""A report's figures as text, for the terminal and the page alike. Pure."""

from __future__ import annotations

import math

from perseus_plugin.errors import figure
from perseus_plugin.reporting.report.findings import Findings
from perseus_plugin.reporting.report.folder import JobFolder
from perseus_plugin.reporting.report.worth import (
    AVERAGE_PUE,
    HOURS_PER_YEAR,
    WORLD_INTENSITY_G,
    Amount,
    Rates,
    SoFar,
    amount,
)

Rows = list[tuple[str, ...]]
"""A table: the head, then the rows."""

BUDGETS = (
    "All iterations while a budget was in force, references and stragglers included. Highest: the average over any "
    "window, of iterations as a whole, and where one was kept whole of what the counter said within it."
)
DRY_RUN = "A dry run (`enforce` is false): no clock is set outside the sweep, and what a plan would save is predicted."
_FULL_SPEED = 0.001  # share of the time at full clocks


def job_line(folder: JobFolder) -> str:
    """What ran where."""
    parts = []
    if folder.world_size:
        parts.append(f"{folder.world_size} × {folder.gpu or 'unknown GPU'}")
    if folder.plan is not None:
        parts.append(f"{folder.stages} stages × {folder.plan.microbatches} microbatches, {folder.plan.schedule}")
    elif folder.stages:
        parts.append(f"{folder.stages} stages")
    return " · ".join(parts) or "a job that has written nothing about itself"


def headline(found: Findings) -> list[tuple[str, str, str]]:
    """The figures that matter most, as (name, value, more)."""
    cards: list[tuple[str, str, str]] = []
    per, plan, run = found.per, found.folder.plan, found.so_far
    if per is not None:
        how = "predicted" if per.predicted else "as run"
        energies = f"{per.full_j:,.0f} J → {per.plan_j:,.0f} J per iteration"
        if per.saved_percent_between is not None:
            low, high = per.saved_percent_between
            energies += f", 95 %: {figure(low, '.1f')} to {figure(high, '.1f')} %"
        cards.append((f"energy saved, {how}", f"{figure(100 * (1 - per.plan_j / per.full_j), '.1f')} %", energies))
        times = f"{per.full_s:.4f} s → {per.plan_s:.4f} s"
        cards.append((f"iteration time, {how}", f"{figure(100 * (per.plan_s / per.full_s - 1), '+.2f')} %", times))
        budget_w = found.reigns[-1].budget_w if found.reigns else math.nan
        watts = f"{per.full_j / per.full_s:,.0f} W at full clocks"
        watts += "" if math.isnan(budget_w) else f", budget {budget_w:,.0f} W"
        cards.append((f"average power, {how}", f"{per.plan_j / per.plan_s:,.0f} W", watts))
    if plan is not None:
        changes = sum(plan.clock_changes(stage) for stage in range(len(plan.stages))) / len(plan.stages)
        more = f"{changes:.1f} clock changes per stage"
        gap = plan.gap
        if plan.confidence is None:
            more += "; of the profile, whose errors are not known"
        else:
            gap = plan.confidence.gap_at_most
        cards.append(("plan above the optimum", f"at most {figure(100 * gap, '.2f')} %", more))
    if run is not None and run.used_j is not None:
        saved = "" if not run.saved_j else f"{energy(run.saved_j)} saved under plans" + left_out(run)
        cards.append((f"used in {run.iterations:,} iterations", energy(run.used_j), saved))
    hooks = None if found.folder.summary is None else found.folder.summary.overhead
    if hooks is not None and hooks.hook_time_percent is not None:
        took = 1e3 * (hooks.hook_time_per_iteration_s or 0.0)
        more = f"{took:.3g} ms of an iteration, on a training thread, mean over ranks"
        cards.append(("hooks took", f"{hooks.hook_time_percent:.3f} % of the time", more))
    paid = payback(found)
    if paid is not None:
        cards.append(paid)
    return cards


def left_out(run: SoFar) -> str:
    """What is not in the saving; empty for nothing."""
    return f" ({run.left_out:,} iterations left out: full clocks unknown for their schedule)" if run.left_out else ""


def comparison(folder: JobFolder) -> Rows:
    """The summary's table; empty without a summary."""
    summary = folder.summary
    if summary is None or summary.iteration_time_s.full_clock is None:
        return []

    def row(name: str, form: str, *values: float | None) -> tuple[str, ...]:
        number, unit = form.split()
        return (name, *("" if value is None else f"{figure(value, number)} {unit}" for value in values))

    def between(cells: tuple[str, ...], *intervals: tuple[float, float] | None) -> tuple[str, ...]:
        """The last cells, each with its interval."""
        first = len(cells) - len(intervals)
        return (
            *cells[:first],
            *(
                cell
                if interval is None or not cell
                else f"{cell} ({figure(interval[0], '.2f')} to {figure(interval[1], '.2f')})"
                for cell, interval in zip(cells[first:], intervals, strict=True)
            ),
        )

    times, energies, powers = summary.iteration_time_s, summary.energy_j, summary.power_w
    slower, saved = summary.slowdown_percent, summary.saving_percent
    return [
        ("per iteration", "full clocks", "predicted", "as run"),
        row("time", ".4f s", times.full_clock, times.predicted, times.measured),
        row("energy", ",.1f J", energies.full_clock, energies.predicted, energies.measured),
        row("power", ",.1f W", powers.full_clock, powers.predicted, powers.measured),
        between(row("slowdown", ".2f %", None, slower.predicted, slower.measured), summary.references.slowdown_percent),
        between(
            row("energy saved", ".2f %", None, saved.predicted, saved.measured),
            summary.predicted_between.saving_percent,
            summary.references.saving_percent,
        ),
    ]


def worth_rows(found: Findings) -> Rows:
    """Energy, money and carbon, so far and projected; empty if no energy is known."""
    rates, run = found.options.rates, found.so_far
    money = [] if rates.price is None else [rates.currency]
    rows: Rows = [("", "GPUs", "at the meter", *money, "CO2")]
    if run is not None and run.used_j is not None:
        rows.append(_worth(f"this run, {run.iterations:,} iterations", amount(run.used_j, rates)))
    if run is not None and run.saved_j:
        rows.append(_worth("saved under plans" + left_out(run), amount(run.saved_j, rates)))
    stragglers = None if found.folder.summary is None else found.folder.summary.stragglers
    if stragglers is not None and stragglers.iterations:
        name = f"saved at a straggler's pace, {stragglers.iterations:,} iterations, estimated"
        rows.append(_worth(name, amount(stragglers.energy_saved_j, rates)))
    if run is not None and run.profiling_j:
        rows.append(_worth(_profiling(run), amount(abs(run.profiling_j), rates)))
    if found.waiting_j is not None:
        before, after = found.waiting_j
        rows.append(_worth("waiting per iteration, full clocks", amount(before, rates)))
        rows.append(_worth("waiting per iteration, plan", amount(after, rates)))
    if found.lowered_j is not None:
        rows.append(_worth("saved per iteration by lower clocks while waiting", amount(found.lowered_j, rates)))
    for projection in found.projections:
        what = f"{_span(projection.hours)} on {projection.gpus:,} GPUs"
        rows.append(_worth(f"{what}: full clocks", projection.full))
        rows.append(_worth(f"{what}: saved", projection.saved))
    rows += _per_sample(found)
    return rows if len(rows) > 1 else []


def _profiling(run: SoFar) -> str:
    """What profiling cost, in words: it runs at lower clocks, so that it takes longer and mostly less energy."""
    of = (
        "profiling took less than full clocks"
        if (run.profiling_j or 0.0) < 0
        else "profiling took more than full clocks"
    )
    return f"{of}, in {run.profiling_s:.1f} s more" if run.profiling_s is not None and run.profiling_s > 0 else of


def payback(found: Findings) -> tuple[str, str, str] | None:
    """After how long under the plan profiling has paid for itself, as a card; None: that is not known."""
    per, run = found.per, found.so_far
    if per is None or run is None or run.profiling_j is None or run.profiling_s is None or per.plan_j >= per.full_j:
        return None
    saved_w = (per.full_j - per.plan_j) / per.plan_s
    hour = f"saves {energy(3600 * saved_w)} an hour"
    if run.profiling_j <= 0:
        return (
            "profiling",
            f"{max(0.0, run.profiling_s):.0f} s longer",
            f"took no more energy than full clocks; the plan {hour}",
        )
    took = (
        f"took {energy(run.profiling_j)} and {max(0.0, run.profiling_s):.0f} s more than full clocks; the plan {hour}"
    )
    return "profiling paid for itself in", _duration(run.profiling_j / saved_w), took


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def budget_rows(found: Findings) -> Rows:
    """Power budgets that were in force against what was drawn; empty where there were none, or nothing is known."""

    def watts(value: float, allowed_w: float = math.nan) -> str:
        most = "" if math.isnan(allowed_w) else f" of {allowed_w:,.0f} W"
        return "" if math.isnan(value) else f"{value:,.0f} W{most}"

    rows: Rows = [("power budgets as run", "iterations", "may draw", "drew on average", "highest")]
    for one in found.budgets:
        highest = watts(one.highest_w, one.peak_allowed_w)
        highest += f" over {one.window_s:g} s" if highest else ""
        rows.append((one.whose, f"{one.iterations:,}", watts(one.allowed_w), watts(one.average_w), highest))
    return rows if len(rows) > 1 else []


def valued_rows(found: Findings) -> Rows:
    """What energy was worth at the value of each moment, by the job's signals; empty where they told none."""
    summary, pue = found.folder.summary, found.options.rates.pue
    worth = None if summary is None else summary.worth
    if worth is None:
        return []
    rows: Rows = [("at the value of each moment", "as run", "under plans", "full clocks instead", "of the energy")]
    for name, unit, of in (("money", worth.currency, worth.money), ("CO2", "kg", worth.carbon_kg)):
        if of.total is None:
            continue

        def valued(value: float | None, unit: str = unit) -> str:
            return "" if value is None else f"{_figure(pue * value)} {unit}".strip()

        between = of.full_clocks_between
        full = valued(of.full_clocks)
        if full and between is not None:
            full += f" ({_figure(pue * between[0])} to {_figure(pue * between[1])})"
        known = "" if of.known_percent is None else f"{of.known_percent:.0f} %"
        rows.append((name, valued(of.total), valued(of.under_plans), full, known))
    return rows if len(rows) > 1 else []


def _per_sample(found: Findings) -> Rows:
    per, samples, rates = found.per, found.samples, found.options.rates
    if per is None or not samples:
        return []
    names = [(f"per sample ({samples} an iteration)", float(samples))]
    if found.options.tokens_per_sample:
        names.append(("per 1,000 tokens", samples * found.options.tokens_per_sample / 1000))
    rows: Rows = []
    for name, count in names:
        rows.append(_worth(f"{name}: full clocks", amount(per.full_j / count, rates)))
        rows.append(_worth(f"{name}: plan", amount(per.plan_j / count, rates)))
    return rows


def _worth(name: str, what: Amount) -> tuple[str, ...]:
    money = [] if what.money is None else [_figure(what.money)]
    site = energy(what.site_kwh * 3.6e6)
    carbon_kg = what.carbon_kg
    carbon = f"{_figure(carbon_kg)} kg" if abs(carbon_kg) >= 0.1 else f"{_figure(1000 * carbon_kg)} g"
    return (name, energy(what.energy_j), site, *money, carbon)


def energy(energy_j: float) -> str:
    """Joules below 0.1 kWh, kWh above."""
    return f"{_figure(energy_j)} J" if abs(energy_j) < 3.6e5 else f"{_figure(energy_j / 3.6e6)} kWh"


def _figure(value: float) -> str:
    return figure(value, ",.0f" if abs(value) >= 100 else ".3g")


def _span(hours: float) -> str:
    if hours == HOURS_PER_YEAR:
        return "a year"
    return "a day" if hours == 24 else f"{hours:,.6g} hours"


def least_cost_line(found: Findings) -> str:
    """Which plan costs least at the reader's prices; empty where they tell nothing of time."""
    best, curve, rates = found.least_cost, found.frontier, found.options.rates
    if best is None or curve is None:
        return ""
    slower, saved = best.iteration_time_s / curve.baseline_time_s - 1, 1 - best.energy_j / curve.baseline_energy_j
    at = (
        "at full speed"
        if slower <= _FULL_SPEED
        else f"with iterations of {best.iteration_time_s:.4f} s ({figure(slower, '+.1%')})"
    )
    return (
        f"At {rates.price:g} {rates.currency} per kWh at the meter and {rates.gpu_hour:g} per GPU-hour training costs "
        f"least {at}, by a plan that takes {figure(saved, '.1%')} less energy than full clocks."
    )


def rates_line(rates: Rates) -> str:
    """The factors behind the worth."""
    pue = f"PUE {rates.pue:g}" + (" (average of 2025, Uptime Institute)" if rates.pue == AVERAGE_PUE else "")
    grid = f"{rates.intensity_g:g} g CO2 per kWh"
    if rates.intensity_g == WORLD_INTENSITY_G:
        grid += " (world average of 2024, IEA)"
    price = "no price given (--price)" if rates.price is None else f"{rates.price:g} {rates.currency} per kWh"
    return (
        f"Computed with {pue}, {grid}, {price}. Operational carbon only; GPUs only, not the rest of the computers. "
        "Waiting is of one GPU per stage, by the profile."
    )
