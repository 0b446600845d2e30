"""What the pictures of a report have in common."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from perseus_plugin.reporting.report.palette import GRID, MUTED, TEXT


def escaped(text: str) -> str:
    """Plotly reads a subset of HTML in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def legend_above() -> dict[str, Any]:
    """A legend in one line above the figure."""
    return {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"}


def styled(figure: go.Figure, above: int = 50) -> go.Figure:
    """The figure in the report's look, with so many pixels above it."""
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", "size": 13,
              "color": TEXT},
        margin={"l": 80, "r": 30, "t": above, "b": 55},
        hoverlabel={"bgcolor": "#ffffff", "font": {"color": TEXT, "size": 13}, "bordercolor": MUTED, "align": "left"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="#ffffff",
        dragmode="zoom",
        uirevision="kept",  # what the reader has hidden stays so where a picture is drawn again
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=MUTED, title_font={"size": 13})
    figure.update_yaxes(gridcolor=GRID, zeroline=False, title_font={"size": 13})
    return figure
