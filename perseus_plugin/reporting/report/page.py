"""`report.html`: one file that needs nothing else, the plotting library included."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from perseus_plugin._version import __version__
from perseus_plugin.errors import ConfigError
from perseus_plugin.reporting.report.findings import Findings
from perseus_plugin.reporting.report.folder import state_of
from perseus_plugin.reporting.report.phrases import (
    Rows,
    comparison,
    headline,
    job_line,
    rates_line,
    worth_rows,
)

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: #1c2733; line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 10px; max-width: 120ch; }
.muted { color: #5b6875; }
section { background: #fff; border: 1px solid #dfe4e8; border-radius: 8px; padding: 18px 20px; margin-top: 18px; }
.note { border-left: 5px solid #d08a1d; background: #fff8ea; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px; margin-top: 18px; }
.card { background: #fff; border: 1px solid #dfe4e8; border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.25; }
table { border-collapse: collapse; margin: 8px 0; }
th, td { text-align: right; padding: 5px 14px; border-bottom: 1px solid #e3e7eb; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
thead th { border-bottom: 2px solid #b9c2cb; }
ul { margin: 4px 0; padding-left: 20px; }
.key { display: inline-block; width: 26px; height: 14px; vertical-align: -2px; margin: 0 4px 0 14px; }
"""

_TITLES = {
    "timeline": "Pipeline timeline",
    "training": "Iteration time and energy over training",
    "frontier": "Time-energy frontier",
    "profile": "Profile",
    "clocks": "Clocks asked for and read back",
}


def page(found: Findings) -> str:
    """The whole file.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("report: needs plotly, which is not installed (pip install plotly)") from None
    parts = [_head(found), _cards(found), _summary(found), _missing(found.folder.missing)]
    parts += [_section(name, figure, text) for name, figure, text in _figures(found)]
    parts += [_worth(found), _origin(found)]
    title = html.escape(f"Perseus report: {found.folder.path.name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


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
    return f'<h1>Perseus report</h1><div class="muted">{html.escape(line)}</div>{banner}'


def _cards(found: Findings) -> str:
    cards = "".join(
        f'<div class="card"><span class="muted">{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f'<span class="muted">{html.escape(more)}</span></div>'
        for name, value, more in headline(found)
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def _summary(found: Findings) -> str:
    rows = comparison(found.folder)
    return f"<section><h2>Per iteration</h2>{_table(rows)}</section>" if rows else ""


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in missing)
    return f'<section class="note" id="missing"><h2>What is missing</h2><ul>{items}</ul></section>'


def _figures(found: Findings) -> list[tuple[str, Any, str]]:
    from perseus_plugin.reporting.report import figures

    made: list[tuple[str, Any, str]] = []
    if found.lanes:
        made.append(("timeline", figures.timeline(found.lanes), _TIMELINE_TEXT))
    if found.series is not None:
        made.append(("training", figures.training(found.series, found.marks, found.per), _TRAINING_TEXT))
    if found.frontier is not None and found.folder.plan is not None:
        made.append(("frontier", figures.frontier(found.frontier, found.folder.plan, found.per), _FRONTIER_TEXT))
    if found.folder.profile is not None:
        made.append(("profile", figures.curves(found.folder.profile), _PROFILE_TEXT))
    if found.clocks:
        text = f"Iteration {found.clocks[0].number}. " + _CLOCKS_TEXT
        made.append(("clocks", figures.clocks(found.clocks), text))
    return made


_TIMELINE_TEXT = (
    "Stages as rows. Taller bars are backwards, lower ones forwards, each with its microbatch; colour is the SM clock. "
    '<span class="key" style="background:#fff;border:2px solid #111"></span>critical path '
    '<span class="key" style="background:#dfe3e7"></span>waiting. Drag to zoom, double-click to reset.'
)
_TRAINING_TEXT = (
    "Dotted: full clocks, in the newest plan's schedule. In long runs a point is the mean of several iterations. "
    "Energy is shown where every rank has a figure."
)
_FRONTIER_TEXT = (
    "The least energy for every iteration time, by the planner from the profile; the bound is exact at the plans and "
    "within 0.5 % between them. The job's plan lies above it by what rounding, margin and limits on clock changes cost."
)
_PROFILE_TEXT = "What one instruction takes at each clock. Bars are two standard errors; often smaller than the marker."
_CLOCKS_TEXT = "Grey: requests as they reached the driver; a gap: no lock, full clock. Blue: read with the counter."


def _section(name: str, figure: Any, text: str) -> str:
    from plotly.io import to_html

    body = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        default_width="100%",
        config={"displaylogo": False, "responsive": True, "displayModeBar": "hover"},
    )
    return f'<section id="{name}"><h2>{_TITLES[name]}</h2><p class="muted">{text}</p>{body}</section>'


def _worth(found: Findings) -> str:
    rows = worth_rows(found)
    if not rows:
        return ""
    return (
        f'<section id="worth"><h2>What it is worth</h2>{_table(rows)}'
        f'<p class="muted">{html.escape(rates_line(found.options.rates))}</p></section>'
    )


def _origin(found: Findings) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in found.origin)
    return (
        f'<section id="origin"><h2>What was measured, what was emulated</h2><ul>{items}</ul>'
        f'<p class="muted">perseus_plugin {html.escape(__version__)}</p></section>'
    )


def _table(rows: Rows) -> str:
    head, *body = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{lines}</tbody></table>"
