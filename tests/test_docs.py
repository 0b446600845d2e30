"""README and docs: links lead somewhere, and nothing was left to be filled in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_pictures_are_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []
    assert not re.search(r"^[A-Z]+_[A-Z_]+$|^OBSERVE$|@@|\bTODO\b|\bTBD\b", text, flags=re.MULTILINE)


def test_the_readme_names_the_commands_that_exist() -> None:
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^    make (\S+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert named == ["quickstart", "test"]
    assert set(named) <= set(targets)
