"""The picture of a run: time, energy and power of its iterations, with what happened and what was aimed at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from perseus_plugin.reporting.record.iterations import FULL, PLAN, PROFILING, STRAGGLER, UNKNOWN, WARM_UP, Stretch
from perseus_plugin.reporting.record.records import Series
from perseus_plugin.reporting.report.findings import Happening
from perseus_plugin.reporting.report.palette import AMBER, BLUE, GREEN, MUTED, RED, TEXT, VIOLET
from perseus_plugin.reporting.report.reigns import Reign
from perseus_plugin.reporting.report.style import escaped, styled
from perseus_plugin.reporting.report.worth import PerIteration

STATE_COLOURS = {
    WARM_UP: "#9aa5b1",
    PROFILING: VIOLET,
    FULL: RED,
    PLAN: BLUE,
    STRAGGLER: AMBER,
    UNKNOWN: "#5c6670",
}
STATE_NAMES = {
    WARM_UP: "warm-up",
    PROFILING: "profiling",
    FULL: "full clocks",
    PLAN: "plan",
    STRAGGLER: "plan for a straggler's pace",
    UNKNOWN: "clocks not known",
}


def training(
    run: Series, marks: Sequence[Happening], per: PerIteration | None, reigns: Sequence[Reign] = ()
) -> go.Figure:
    """Time, energy and power of iterations over training, with what happened, and what was aimed at in each.

    Args:
        run: the job's iterations.
        marks: what happened when.
        per: an iteration at full clocks and under the plan, None: not known.
        reigns: what was in force when, by rising iteration.
    """
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    rows: tuple[tuple[Callable[[Stretch, float], float], str], ...] = (
        (lambda stretch, energy_j: stretch.time_s, "%{y:.4f} s"),
        (lambda stretch, energy_j: energy_j, "%{y:.1f} J"),
        (lambda stretch, energy_j: energy_j / stretch.time_s, "%{y:.1f} W"),
    )
    for state, colour in STATE_COLOURS.items():
        pairs = run.of(state)
        if not pairs:
            continue
        spans = [
            f"{s.first}" if s.count == 1 else f"{s.first} to {s.first + s.count - 1} (longest {s.longest_s:.4f} s)"
            for s, _ in pairs
        ]
        about = [f"iteration {span}, {_ran_as(s)}" for span, (s, _) in zip(spans, pairs, strict=True)]
        for row, (value_of, shown) in enumerate(rows, 1):
            values = [value_of(*pair) for pair in pairs]
            figure.add_trace(
                go.Scatter(
                    name=STATE_NAMES[state], legendgroup=state, showlegend=row == 1, mode="markers",
                    x=[stretch.first + (stretch.count - 1) / 2 for stretch, _ in pairs],
                    y=[None if math.isnan(value) else value for value in values],
                    customdata=about, marker={"color": colour, "size": 6},
                    hovertemplate=f"%{{customdata}}<br>{shown}<extra></extra>",
                ), row=row, col=1,
            )  # fmt: skip
    if per is not None:
        for row, value in ((1, per.full_s), (2, per.full_j), (3, per.full_j / per.full_s)):
            figure.add_hline(value, row=row, col=1, line={"color": RED, "width": 1, "dash": "dot"})
    end = run.stretches[-1].first + run.stretches[-1].count
    full_w = math.nan if per is None else per.full_j / per.full_s
    _steps(figure, "power budget", reigns, end, lambda reign: reign.budget_w, {"color": "#111111", "width": 2})
    look = {"color": GREEN, "width": 1.5, "dash": "dash"}
    _steps(figure, "power predicted for the target", reigns, end, lambda reign: full_w * reign.power_ratio, look)
    levels = _write_marks(figure, run, marks)
    figure.update_yaxes(title_text="time (s)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="energy (J)", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title_text="power (W)", rangemode="tozero", row=3, col=1)
    # Labels would widen it.
    figure.update_xaxes(range=[-0.01 * end - 0.5, 1.01 * end])
    figure.update_xaxes(title_text="iteration", row=3, col=1)
    figure.update_layout(height=720, legend={"orientation": "h", "y": -0.1, "x": 0})
    return styled(figure, above=24 + 21 * levels)


def _steps(
    figure: go.Figure,
    name: str,
    reigns: Sequence[Reign],
    end: int,
    watts_of: Callable[[Reign], float],
    line: dict[str, Any],
) -> None:
    """A line beside the power of iterations, as far as it is known: level while one target is in force."""
    spans = list(zip(reigns, [*(reign.first for reign in reigns[1:]), end], strict=False))
    known = [(reign, until, watts_of(reign)) for reign, until in spans if reign.first < until]
    if not any(math.isfinite(watts) for _, _, watts in known):
        return
    xs: list[float] = []
    ys: list[float | None] = []
    about: list[str] = []
    for reign, until, watts in known:
        xs += [reign.first - 0.5, until - 0.5]
        ys += [watts if math.isfinite(watts) else None] * 2
        about += [escaped(reign.says)] * 2
    figure.add_trace(
        go.Scatter(
            name=name, mode="lines", x=xs, y=ys, customdata=about, line=line, connectgaps=False,
            hovertemplate=f"{name}: %{{y:.1f}} W<br>%{{customdata}}<extra></extra>",
        ), row=3, col=1,
    )  # fmt: skip


def _ran_as(stretch: Stretch) -> str:
    sort = stretch.sort
    if sort.state == PROFILING:
        return f"profiling {sort.clock_mhz} MHz"
    if sort.plan:
        return f"{STATE_NAMES[sort.state]}, version {sort.plan}"
    return STATE_NAMES[sort.state] + (f" ({sort.reason})" if sort.reason else "")


def _write_marks(figure: go.Figure, run: Series, marks: Sequence[Happening]) -> int:
    """Lines at what happened, their labels on as many levels as keep them apart; returns how many."""
    last = run.stretches[-1]
    wide = max(1, last.first + last.count)
    free_from = [-math.inf] * 4
    lines: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    for mark in marks:
        text = mark.text if len(mark.text) <= 48 else mark.text[:47] + "…"
        share, width = mark.iteration / wide, 0.0075 * len(text) + 0.02
        right = share > 0.75
        begin = share - width if right else share
        level = next((k for k, free in enumerate(free_from) if begin >= free), None)
        at = mark.iteration - 0.5
        for axis in ("", "2", "3"):
            ends = {"x0": at, "x1": at, "xref": f"x{axis}", "y0": 0, "y1": 1, "yref": f"y{axis} domain"}
            lines.append({"type": "line", "line": {"color": MUTED, "width": 1, "dash": "dash"}, **ends})
        if level is None:
            continue
        free_from[level] = begin + width
        labels.append({
            "x": at, "y": 1.0, "yref": "paper", "yanchor": "bottom", "yshift": 4 + 20 * level, "showarrow": False,
            "xanchor": "right" if right else "left", "text": escaped(text), "hovertext": escaped(mark.text),
            "font": {"size": 12, "color": TEXT}, "bgcolor": "#f3f5f7", "borderpad": 2,
        })  # fmt: skip
    # Each call for one alone would copy all that there are.
    figure.update_layout(
        shapes=[*figure.layout.shapes, *lines], annotations=[*figure.layout.annotations, *labels], overwrite=True
    )
    return sum(math.isfinite(free) for free in free_from)
