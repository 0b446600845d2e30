"""The configuration reference is written from the model and kept up to date in the docs."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from perseus_plugin.cli.reference import config_reference
from perseus_plugin.config import PerseusConfig


def keys_of(model: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += keys_of(field.annotation)
    return keys


def test_every_key_has_its_row_with_allowed_values_and_meaning() -> None:
    rows = [line for line in config_reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows].count("enabled") == 2  # the block's own, and that of stragglers
    assert len(rows) == len(keys_of(PerseusConfig))
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4
        assert cells[2], f"{row}: nothing says what is allowed"
        assert len(cells[3]) > 10, f"{row}: nothing says what it means"


def test_the_page_in_the_docs_is_the_one_the_command_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == config_reference(), "run `python -m tests.test_surface`"
