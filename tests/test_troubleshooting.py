"""Every warning and error of the source has an entry on one of the pages docs/troubleshooting*.md."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perseus_plugin import errors

# One process looks through the source.
pytestmark = pytest.mark.xdist_group("messages")

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("troubleshooting*.md"))
VALUE = "\0"
LOGGED = {"warning": 0, "error": 0, "exception": 0}
# Other calls whose argument at this place is shown to the user.
TOLD = {"_give_up": 0, "_lose": 1, "Trouble": 1, "_warn": 0}
SHORTEST = 12


@dataclass(frozen=True)
class Message:
    """A message of the source: its text with a NUL where values go."""

    where: str
    text: str

    @property
    def explains_itself(self) -> bool:
        """Names key, value and what is allowed; the page has one entry for all of these."""
        return "allowed" in self.text or "missing;" in self.text

    @property
    def clause(self) -> str:
        """The first part that is long enough to be recognised; empty if there is none, as in `{path}: {error}`."""
        parts = re.split(rf"[{VALUE};:(.]\s?", self.text)
        return next((part.strip(" ,") for part in parts if len(part.strip(" ,")) >= SHORTEST), "")


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[a-z]", VALUE, node.value).replace("%%", "%")
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else VALUE for v in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return VALUE


def name_of(function: ast.expr) -> str:
    return str(getattr(function, "attr", getattr(function, "id", "")))


def messages() -> Iterator[Message]:
    ours = {name for name, value in vars(errors).items() if isinstance(value, type)}
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "perseus_plugin").rglob("*.py"))}
    # Errors that other modules derive from ours.
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and {name_of(base) for base in node.bases} & ours:
                ours.add(node.name)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = name_of(node.func)
            is_ours = name in ours or name in TOLD or (name in LOGGED and name_of(node.func.value) == "logger")  # type: ignore[attr-defined]
            at = TOLD.get(name, 0)
            if name == "Say" and text_of(node.args[0]) == "warning":
                is_ours, at = True, 1
            if is_ours and len(node.args) > at:
                yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", text_of(node.args[at]))


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


@functools.cache
def everything() -> list[Message]:
    """Found once, by the tests: looking through the whole source takes seconds."""
    return list(messages())


ENTRIES = "\n".join(page.read_text() for page in PAGES)
TEXT = plain(ENTRIES)


def test_the_source_is_understood() -> None:
    assert len(everything()) > 150
    assert any("back to full clocks" in message.text for message in everything())
    assert any(message.explains_itself for message in everything())
    assert {m.clause for m in everything() if "restart of the job" in m.text} == {
        "Training stays at full clocks",
        "perseus is off from here on",
    }


def test_every_message_has_an_entry() -> None:
    without = [
        f"{message.where}: no entry for {message.text.replace(VALUE, '…')!r}: one must quote {message.clause!r}"
        for message in everything()
        if message.clause and not message.explains_itself and plain(message.clause) not in TEXT
    ]
    assert without == [], "docs/troubleshooting*.md"


def test_messages_that_explain_themselves_have_an_entry_together() -> None:
    assert "## Anything with" in ENTRIES


def test_every_entry_says_what_to_do() -> None:
    rows = [line for line in ENTRIES.splitlines() if line.startswith("| ") and not line.startswith("| message")]
    assert len(rows) > 60
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 2, row
        assert cells[1].endswith((".", "`", ")")), row
