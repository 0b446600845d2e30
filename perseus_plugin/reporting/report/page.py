"""`report.html`: one file that needs nothing else, the plotting library included."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from perseus_plugin._version import __version__
from perseus_plugin.reporting.report.document import (
    TIMELINE_TEXT,
    cards,
    contents,
    document,
    listed,
    picture,
    plotting,
    table,
)
from perseus_plugin.reporting.report.findings import Findings
from perseus_plugin.reporting.report.folder import state_of
from perseus_plugin.reporting.report.phrases import (
    BUDGETS,
    DRY_RUN,
    budget_rows,
    comparison,
    headline,
    job_line,
    least_cost_line,
    rates_line,
    valued_rows,
    worth_rows,
)

_TITLES = {
    "timeline": "Pipeline timeline",
    "training": "Iteration time, energy and power over training",
    "frontier": "Time-energy frontier",
    "profile": "Profile",
    "clocks": "Clocks asked for and read back",
    "budgets": "Power budgets",
    "worth": "What it is worth",
    "origin": "What was measured, what was emulated",
}


def page(found: Findings, head: str | None = None) -> str:
    """The whole file; needs plotly, see `document.check_plotly`.

    Args:
        found: what is shown.
        head: what draws its pictures, as HTML; None: the plotting library itself.
    """
    emulated = found.folder.emulated
    sections = {name: picture(name, _TITLES[name], figure, text, emulated) for name, figure, text in _figures(found)}
    sections |= {"budgets": _budgets(found), "worth": _worth(found), "origin": _origin(found)}
    links = contents({name: _TITLES[name] for name, section in sections.items() if section})
    parts = [_head(found), cards(headline(found)), links, _summary(found), _missing(found.folder.missing)]
    parts += sections.values()
    return document(f"Perseus report: {found.folder.path.name}", parts, plotting() if head is None else head)


def _head(found: Findings) -> str:
    folder = found.folder
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.written_s))
    line = f"{job_line(folder)} · {state_of(folder)} · last written {when} · {folder.path.resolve()}"
    banner = ""
    if folder.emulated:
        banner = (
            '<section class="note"><b>Emulated GPUs.</b> Times, clocks and energies below come from a model, not from '
            "a GPU; see <a href='#origin'>what was measured</a>.</section>"
        )
    if folder.dry_run:
        banner += f'<section class="note">{html.escape(DRY_RUN)}</section>'
    return f'<h1>Perseus report</h1><div class="muted">{html.escape(line)}</div>{banner}'


def _summary(found: Findings) -> str:
    rows = comparison(found.folder)
    if not rows:
        return ""
    return (
        f'<section><h2>Per iteration</h2><div class="beside">{table(rows)}'
        f'<div class="muted">{listed(found.explained)}</div></div></section>'
    )


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f'<section class="note" id="missing"><h2>What is missing</h2>{listed(missing)}</section>'


def _figures(found: Findings) -> list[tuple[str, Any, str]]:
    from perseus_plugin.reporting.report import figures
    from perseus_plugin.reporting.report.training import training

    made: list[tuple[str, Any, str]] = []
    if found.lanes:
        made.append(("timeline", figures.timeline(found.lanes), TIMELINE_TEXT))
    if found.series is not None:
        text = f"Points: as run, {'emulated' if found.folder.emulated else 'measured'}. " + _TRAINING_TEXT
        made.append(("training", training(found.series, found.marks, found.per, found.reigns), text))
    if found.frontier is not None and found.folder.plan is not None:
        drawn = figures.frontier(found.frontier, found.folder.plan, found.per, found.least_cost)
        made.append(("frontier", drawn, f"{_FRONTIER_TEXT} {least_cost_line(found)}".strip()))
    if found.folder.profile is not None:
        made.append(("profile", figures.curves(found.folder.profile), _PROFILE_TEXT))
    if found.clocks:
        text = f"Iteration {found.clocks[0].number}. " + _CLOCKS_TEXT
        made.append(("clocks", figures.clocks(found.clocks), text))
    return made


_TRAINING_TEXT = (
    "Dotted: full clocks, in the newest plan's schedule. In long runs a point is the mean of several iterations. "
    "Energy and power, of all GPUs together, are shown where every rank has a figure. "
    "Black: the power budget in force; green: the power that was predicted when a target came into force. "
    "Upright lines: what happened, named on wider screens."
)
_FRONTIER_TEXT = (
    "The least energy for every iteration time, and the average power that makes, by the planner from the profile: of "
    "one GPU per stage. The bound is exact at the plans and within 0.5 % between them. The job's plan lies above it by "
    "what rounding, margin and limits on clock changes cost."
)
_PROFILE_TEXT = "What one instruction takes at each clock. Bars are two standard errors; often smaller than the marker."
_CLOCKS_TEXT = "Grey: requests as they reached the driver; a gap: no lock, full clock. Blue: read with the counter."


def _budgets(found: Findings) -> str:
    rows = budget_rows(found)
    if not rows:
        return ""
    return f'<section id="budgets"><h2>{_TITLES["budgets"]}</h2>{table(rows)}<p class="muted">{BUDGETS}</p></section>'


def _worth(found: Findings) -> str:
    rows, valued = worth_rows(found), valued_rows(found)
    if not rows:
        return ""
    return (
        f'<section id="worth"><h2>{_TITLES["worth"]}</h2>{table(valued) if valued else ""}{table(rows)}'
        f'<p class="muted">{html.escape(rates_line(found.options.rates))}</p></section>'
    )


def _origin(found: Findings) -> str:
    return (
        f'<section id="origin"><h2>{_TITLES["origin"]}</h2>{listed(found.origin)}'
        f'<p class="muted">perseus_plugin {html.escape(__version__)}</p></section>'
    )
