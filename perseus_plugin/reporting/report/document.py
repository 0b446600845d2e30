"""What the pages have in common: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from perseus_plugin.errors import ConfigError, lacking
from perseus_plugin.reporting.report.phrases import Rows

_STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --paper: #fff; --text: #1c2733; --muted: #5b6875; --line: #dfe4e8;
  --rule: #b9c2cb; --note: #fff8ea; --link: #2f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #10151a; --paper: #191f26; --text: #dfe6ec; --muted: #9aa7b3; --line: #2c353e; --rule: #465361;
    --note: #2b2416; --link: #7fb4e6; }
  /* Pictures are drawn for white paper: turned over, with their hues as they were. */
  .js-plotly-plot, .key { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 10px; max-width: 120ch; }
a { color: var(--link); }
nav { margin-top: 14px; display: flex; flex-wrap: wrap; gap: 2px 16px; }
.tag { font-size: 12px; font-weight: normal; border: 1px solid #d08a1d; border-radius: 4px; padding: 1px 6px;
  vertical-align: 2px; margin-left: 8px; }
.muted { color: var(--muted); overflow-wrap: anywhere; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; }
.note { border-left: 5px solid #d08a1d; background: var(--note); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(200px, 30%), 1fr)); gap: 14px;
  margin-top: 18px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.25; }
.wide { overflow-x: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 8px 32px; align-items: flex-start; }
.beside > .wide { max-width: 100%; }
.beside > .muted { flex: 1 1 300px; font-size: 14px; }
.beside li { margin-bottom: 6px; }
table { border-collapse: collapse; margin: 8px 0; }
th, td { text-align: right; padding: 5px 14px; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
thead th { border-bottom: 2px solid var(--rule); }
ul { margin: 4px 0; padding-left: 20px; }
@media (max-width: 700px) {
  main { padding: 16px 8px 40px; }
  section { padding: 12px 10px; }
  th, td { padding: 4px 7px; font-size: 13px; }
  #figure-training .annotation { display: none; }
}
.key { display: inline-block; width: 26px; height: 14px; vertical-align: -2px; margin: 0 4px 0 14px; }
"""


def document(title: str, parts: Iterable[str], head: str = "") -> str:
    """The whole file.

    Args:
        title: as text.
        parts: of the body, as HTML; empty ones are left out.
        head: what else goes into the head, as HTML.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n{head}</head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def cards(headline: Iterable[tuple[str, str, str]]) -> str:
    """The figures that matter most, as (name, value, more)."""
    made = "".join(
        f'<div class="card"><span class="muted">{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f'<span class="muted">{html.escape(more)}</span></div>'
        for name, value, more in headline
    )
    return f'<div class="cards">{made}</div>' if made else ""


def table(rows: Rows) -> str:
    """A table, its first row the head."""
    head, *body = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    head = f"<thead><tr>{head.replace('td>', 'th>')}</tr></thead>"
    return f"<div class='wide'><table>{head}<tbody>{lines}</tbody></table></div>"


def contents(titles: Mapping[str, str]) -> str:
    """Links to sections, their titles by id."""
    links = "".join(f'<a href="#{name}">{html.escape(title)}</a>' for name, title in titles.items())
    return f"<nav>{links}</nav>" if len(titles) > 1 else ""


def check_plotly(who: str) -> None:
    """Refuse a page whose pictures cannot be drawn, before hours go into what it shows.

    Args:
        who: asks for it, for the error.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{who}: {lacking(error)}") from error


def library() -> str:
    """The plotting library, as a script."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def plotting() -> str:
    """What the head of a page with pictures holds: the plotting library."""
    return f"<script>{library()}</script>\n"


def picture(name: str, title: str, figure: Any, text: str, emulated: bool | None = None) -> str:
    """A section with a plotly figure.

    Args:
        name: of the section, to link to.
        title: above it, as text.
        figure: of plotly.
        text: below the title, as HTML.
        emulated: whether what is shown is of emulated GPUs.
    """
    from plotly.io import to_html

    body = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        default_width="100%",
        config={"displaylogo": False, "responsive": True, "displayModeBar": "hover"},
    )
    tag = '<span class="tag">emulated GPUs</span>' if emulated else ""  # a picture may be cut out and shown around
    return f'<section id="{name}"><h2>{html.escape(title)}{tag}</h2><p class="muted">{text}</p>{body}</section>'


def listed(items: Iterable[str]) -> str:
    """A list of texts; nothing without any."""
    made = "".join(f"<li>{html.escape(text)}</li>" for text in items)
    return f"<ul>{made}</ul>" if made else ""


TIMELINE_TEXT = (
    "Stages as rows. Taller bars are backwards, lower ones forwards, each with its microbatch; colour is the SM clock. "
    '<span class="key" style="background:#fff;border:2px solid #111"></span>critical path '
    '<span class="key" style="background:#dfe3e7"></span>waiting. Drag to zoom, double-click to reset.'
)
"""What `figures.timeline` shows, as HTML."""
