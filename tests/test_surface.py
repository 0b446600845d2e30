"""What a user's files and scripts depend on: every configuration key, every command, option and exit status.

Written out in `config_surface.txt` and `cli_surface.txt` beside this file, so that a change is a decision.
`python -m tests.test_surface` writes them anew, and all else that is made from the code: `docs/configuration.md` and
the table of `docs/formats.md`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from perseus_plugin.cli.app import COMMANDS, command
from perseus_plugin.cli.reference import config_reference
from perseus_plugin.cli.targets import ALL, NONE, SOME
from perseus_plugin.config import PerseusConfig
from tests import test_formats

HERE = Path(__file__).parent
PAGES = {page.name: page.read_text() for page in (HERE.parent / "docs").glob("*.md") if page.name != "configuration.md"}


def told_alike(schema: Any) -> Any:
    """A schema as every release of pydantic has it: whole numbers without a point, no word on what is so anyway."""
    if isinstance(schema, dict):
        return {
            key: told_alike(value) for key, value in schema.items() if (key, value) != ("additionalProperties", True)
        }
    if isinstance(schema, list):
        return [told_alike(value) for value in schema]
    return int(schema) if isinstance(schema, float) and schema.is_integer() else schema


def settings(model: type[Any] = PerseusConfig, section: str = "") -> Iterator[tuple[str, str]]:
    """Every setting: its dotted key, and its default, type and allowed values in one line."""
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from settings(field.annotation, f"{section}{name}.")
            continue
        told = {key: value for key, value in schemas[name].items() if key not in ("title", "description", "default")}
        allowed = told.pop("allowed")
        yield section + name, f"{json.dumps(field.default)}; {json.dumps(told_alike(told), sort_keys=True)}; {allowed}"


SETTINGS = dict(settings())


def config_surface() -> str:
    return "".join(f"perseus.{key} = {rest}\n" for key, rest in SETTINGS.items())


def commands(one: Any, name: str) -> Iterator[str]:
    """A line for every command, argument and option."""
    if hasattr(one, "commands"):
        for inner_name in sorted(one.commands):
            yield from commands(one.commands[inner_name], f"{name} {inner_name}")
        return
    yield name
    hints = get_type_hints(one.callback)
    for parameter in one.params:
        names = "/".join([*parameter.opts, *parameter.secondary_opts])
        hint = hints[parameter.name]
        kind = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
        default = (
            parameter.default if isinstance(parameter.default, (int, float, type(None))) else str(parameter.default)
        )
        yield f"    {names}: {kind}, {'required' if parameter.required else f'default {default!r}'}"


def cli_surface() -> str:
    statuses = f"exit status: {ALL} done for all, {SOME} for some, {NONE} for none; 2 wrong usage or input"
    lines = [line for name in sorted(COMMANDS) for line in commands(command(name), f"perseus {name}")]
    return "\n".join([*lines, statuses, ""])


SURFACES = {"config_surface.txt": config_surface, "cli_surface.txt": cli_surface}


@pytest.mark.parametrize("name", SURFACES)
def test_what_users_depend_on_has_not_changed_unnoticed(name: str) -> None:
    assert SURFACES[name]() == (HERE / name).read_text(), "meant? `python -m tests.test_surface`, and tell the users"


def named(key: str, page: str) -> bool:
    """Whether a page names a setting so that nobody can take it for another: in full, or alone in a code span."""
    section, _, last = key.rpartition(".")
    ways = [rf"(?<![\w.])(perseus\.)?{re.escape(key)}(?!\w)", rf'"{section}": {{"{last}"']
    if Counter(other.rpartition(".")[2] for other in SETTINGS)[last] == 1:
        ways += [rf"`{last}[`:]", rf'"{last}"']
    return any(re.search(way, page) for way in ways)


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_a_page_that_says_when_to_use_it(key: str) -> None:
    pages = [name for name, text in PAGES.items() if named(key, text)]
    assert pages, f"{key} stands in the reference only: say on a page who needs it and why, or remove it"


GENERATED: dict[Path, Callable[[], str]] = {
    **{HERE / name: surface for name, surface in SURFACES.items()},
    HERE.parent / "docs" / "configuration.md": config_reference,
    test_formats.PAGE: test_formats.page_anew,
}


if __name__ == "__main__":
    for path, made in GENERATED.items():
        path.write_text(made())
