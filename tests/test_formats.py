"""docs/formats.md lists every format with its version; its table of summary.json is written from the model.

`python -m tests.test_surface` writes the table anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from perseus_plugin.reporting.record.summary import Summary

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "formats.md"
MARK = "<!-- written by `python -m tests.test_surface` -->\n"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, also of one that may be null."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def keys(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, str]]:
    """Every key in full, with its meaning."""
    for name, field in model.model_fields.items():
        key = f"{before}{field.alias or name}"
        yield key, field.description or ""
        inner = section_of(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{key}.")


def summary_table() -> str:
    rows = [f"| `{key}` | {meaning} |\n" for key, meaning in keys(Summary)]
    return "".join(["\n| key | meaning |\n|---|---|\n", *rows])


def page_anew() -> str:
    """The page with its table as the model has it."""
    return PAGE.read_text().partition(MARK)[0] + MARK + summary_table()


def test_the_page_describes_every_key_of_the_summary() -> None:
    assert all(meaning for _, meaning in keys(Summary))
    assert PAGE.read_text() == page_anew(), "run `python -m tests.test_surface`"


def test_the_page_names_every_format_that_the_package_has() -> None:
    code = "".join(file.read_text() for file in (ROOT / "perseus_plugin").rglob("*.py"))
    schemas = set(re.findall(r'(?:SCHEMA\w* = |Literal\[|"schema": )"(perseus-[\w/-]+)"', code))
    assert {"perseus-summary", "perseus-plan", "perseus-record"} <= schemas
    page = PAGE.read_text()
    assert [schema for schema in sorted(schemas) if f"`{schema}`" not in page] == []


def test_the_modules_that_the_page_names_are_there() -> None:
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", PAGE.read_text())
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / "perseus_plugin" / name).is_file()] == []
