"""How figures are shown to people."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest

import perseus_plugin
from perseus_plugin.errors import figure

PACKAGE = Path(perseus_plugin.__file__).parent


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-0.0, ".3g", "0"),
        (-0.0, "+.1f", "+0.0"),
        (-0.004, ".2f", "0.00"),
        (-0.00004, "+.2%", "+0.00%"),
        (-0.006, ".2f", "-0.01"),
        (-100.4, ",.0f", "-100"),
        (-1234.0, ",.0f", "-1,234"),
        (0.5, "+.1%", "+50.0%"),
        (math.nan, ".2f", "nan"),
        (-math.inf, ".2f", "-inf"),
    ],
)
def test_what_rounds_to_nothing_is_not_negative(value: float, form: str, text: str) -> None:
    assert figure(value, form) == text


def test_what_can_be_negative_is_shown_as_a_figure() -> None:
    """Whatever is shown with its sign, and what is saved or slower by fixed digits."""
    shown = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FormattedValue) or node.format_spec is None:
                continue
            form, what = ast.unparse(node.format_spec), ast.unparse(node.value)
            form = form.removeprefix("f").strip("'\"")
            signed = form.startswith("+") and what != "percent"  # ticks of an axis, of which 0 has a name
            changed = re.search(r"\b(saving|slowdown)(\.\w+)?$", what) and re.search(r"\.\d[f%]$", form)
            if signed or (changed and "entry" not in what):
                shown.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {what}")
    assert shown == [], "use perseus_plugin.errors.figure"
