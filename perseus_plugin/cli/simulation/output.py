"""What `perseus simulate` writes: JSON, CSV and a picture of the same outcomes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perseus_plugin.cli.simulation.scenarios import Outcome
from perseus_plugin.reporting.report.palette import SERIES
from perseus_plugin.reporting.report.still import drawn

SIMULATION_SCHEMA = "perseus-simulation"
SIMULATION_VERSION = 1


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """One outcome as plain data; figures that there are not are None."""
    figures = outcome.figures
    row: dict[str, Any] = {
        "gpu": outcome.gpu or None,
        "stages": outcome.stages,
        "split": None if outcome.split is None else "-".join(map(str, outcome.split)),
        "schedule": outcome.schedule,
        "microbatches": outcome.microbatches,
        "slowdown_allowed": outcome.aim.slowdown,
        "straggler": outcome.aim.straggler,
        "power_budget_w": outcome.aim.power_budget_w,
    }
    names = ("scale", "deadline_s", "full_clock_s", "full_clock_j", "iteration_s", "energy_j", "bound_j", "saving")
    for name in (*names, "slowdown", "gap", "most_changes", "left_alone_j", "graph_saving", "graph_slowdown"):
        row[name] = None if figures is None else getattr(figures, name)
    return {**row, "error": outcome.error or None}


def outcomes_as(ending: str, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> str:
    """The outcomes as CSV for the ending .csv, else as JSON.

    Args:
        ending: of the file.
        outcomes: what was simulated.
        facts: what the JSON says of the whole (source, whether it is modelled).
    """
    rows = [outcome_row(outcome) for outcome in outcomes]
    if ending == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()
    head = {"schema": SIMULATION_SCHEMA, "version": SIMULATION_VERSION, **facts}
    return json.dumps({**head, "outcomes": rows}, indent=2, allow_nan=False) + "\n"


def named(outcome: Outcome) -> dict[str, str]:
    """A scenario in words, by what they are about."""
    split = "" if outcome.split is None else f" ({'-'.join(map(str, outcome.split))})"
    return {
        "GPU": outcome.gpu or "as profiled",
        "stages": f"{outcome.stages}{split}",
        "schedule": outcome.schedule,
        "microbatches": str(outcome.microbatches),
        "target": str(outcome.aim),
    }


def label(outcome: Outcome, *, but: str = "") -> str:
    """A scenario in words.

    Args:
        outcome: which.
        but: "microbatches" or "target" leaves that out.
    """
    split = "" if outcome.split is None else f" ({'-'.join(map(str, outcome.split))})"
    parts = [outcome.gpu, f"{outcome.stages} stages{split}", outcome.schedule]
    if but != "microbatches":
        parts.append(f"{outcome.microbatches} microbatches")
    if but != "target":
        parts.append(str(outcome.aim))
    return ", ".join(part for part in parts if part)


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> bytes:
    """The savings, over the number of microbatches where there are several, else a bar per scenario.

    As a picture for the path, which was checked.
    """
    from matplotlib.figure import Figure

    planned = [outcome for outcome in outcomes if outcome.figures is not None]
    lines: dict[str, list[tuple[int, float]]] = {}
    for outcome in planned:
        assert outcome.figures is not None  # filtered above
        point = (outcome.microbatches or 0, 100 * outcome.figures.saving)
        lines.setdefault(label(outcome, but="microbatches"), []).append(point)
    over_microbatches = max(len(points) for points in lines.values()) > 1
    height = 4.5 if over_microbatches else 1.2 + 0.35 * len(lines)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=SERIES)
    axes.set_title(title, loc="left", fontsize=10)
    if over_microbatches:
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", ms=4, label=name)
        axes.set_xlabel("microbatches per iteration")
        axes.set_ylabel("energy saved against full clocks [%]")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", fontsize=8, ncols=1 if len(lines) < 4 else 2)
    else:
        bars = axes.barh(
            [label(o) for o in planned], [100 * o.figures.saving for o in planned if o.figures is not None]
        )
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("energy saved against full clocks [%]")
    return drawn(figure, path)
