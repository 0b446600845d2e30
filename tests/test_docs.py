"""README and docs: links lead somewhere, commands exist, and nothing was left to be filled in.

`make docs` builds the site and checks links and anchors between its pages.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from perseus_plugin.cli.app import COMMANDS, command

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Programs of the reader's own machine, which the docs may use.
OTHERS = {"pip", "curl", "cd", "cc", "docker", "nvidia-smi"}


def blocks(page: Path) -> Iterator[list[str]]:
    """Code blocks: fenced, or indented by four spaces after an empty line."""
    fenced = indented = False
    before, block = "", list[str]()
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("```"):
            fenced = not fenced
            if not fenced:
                yield block
            block = []
        elif fenced:
            block.append(line)
        elif line.startswith("    ") and (indented or not before.strip()):
            indented = True
            block.append(line[4:])
        elif indented:
            indented = False
            yield block
            block = []
        before = line


def commands(page: Path) -> Iterator[list[str]]:
    """Shell commands in code blocks, as words without what is assigned in front of them."""
    for block in blocks(page):
        for line in "\n".join(block).replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if re.match(r"([A-Z_]+=\S+ )*(perseus|make|python|torchrun|pytest|pip|curl) ", line):
                words = shlex.split(line, comments=True)
                while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                yield words


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []
    assert all(re.match(r"https://[\w.-]+\.[a-z]+(/|$)", link) for link in links if "://" in link)
    assert not re.search(r"^[A-Z]+_[A-Z_]+$|^OBSERVE$|@@|\bTODO\b|\bTBD\b", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_in_code_blocks_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *arguments in commands(page):
        if program == "perseus":
            check_perseus(arguments)
        elif program == "make":
            assert arguments[0] in targets
        elif program in ("python", "torchrun", "pytest"):
            for path in [word for word in arguments if re.fullmatch(r"(benchmarks|tests|examples)/[\w/.]+", word)]:
                assert (ROOT / path).exists(), path
        else:
            assert program in OTHERS, program


def check_perseus(arguments: list[str]) -> None:
    """The subcommand and every option are there, and files of the repository too."""
    words = list(arguments)
    if words[0] == "--help":
        return
    assert words[0] in COMMANDS, words
    one = command(words.pop(0))
    while words and hasattr(one, "commands"):
        assert words[0] in one.commands, words
        one = one.commands[words.pop(0)]
    known = {option for parameter in one.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        assert not word.startswith("-") or word in {*known, "--help"}, f"perseus {shlex.join(arguments)}: no {word}"
        assert not word.startswith(("examples/", "docs/")) or (ROOT / word).exists(), word


def test_code_blocks_are_found() -> None:
    found = [shlex.join(command) for command in commands(ROOT / "docs" / "quickstart.md")]
    assert found[0] == "make quickstart"
    assert "perseus doctor" in found
    assert sum(len(list(commands(page))) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_configurations_in_code_blocks_are_valid(page: Path) -> None:
    """A block of one line that is the `perseus` key must be accepted."""
    from perseus_plugin.config import parse_config

    for block in blocks(page):
        if len(block) == 1 and block[0].startswith('"perseus": {'):
            parse_config(json.loads("{" + block[0].rstrip(",") + "}")["perseus"])


def test_the_readme_names_the_commands_that_exist() -> None:
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        named = re.findall(r"^    make (\S+)", page.read_text(), flags=re.MULTILINE)
        assert named == ["quickstart", "test"]
        assert set(named) <= set(targets)


def test_pages_say_which_python_setup_cfg_asks_for() -> None:
    asked = re.search(r"^python_requires = >=(\S+)$", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)
    assert asked is not None
    said = {page.name: re.findall(r"Needs Linux, Python ([^,]+),", page.read_text()) for page in PAGES}
    said = {name: versions for name, versions in said.items() if versions}
    assert {"README.md", "installation.md", "quickstart.md"} <= set(said)
    assert {version for versions in said.values() for version in versions} == {f"{asked[1]} or later"}


def test_ci_runs_the_command_that_the_readme_names_for_tests_and_more() -> None:
    assert "exec make test-all\n" in (ROOT / ".ci" / "run").read_text()
    for target, parts in {"test": ["lint", "types", "docs", "unit", "e2e"], "test-all": ["test", "rest"]}.items():
        recipe = re.search(rf"^{target}:(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert recipe is not None
        assert recipe[1].split() == parts


def test_the_table_of_promises_names_tests_that_exist_and_who_runs_them() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `([\w/.]+)(?:::(\w+))?` \| `make (test|test-all)` \|$", page, flags=re.MULTILINE)
    assert len(rows) == len([line for line in page.splitlines() if line.startswith("|")]) - 2
    for file, name, target in rows:
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, f"{file} has no {name}"
        assert target == "test" or "pytest.mark.matrix" in text or "pytest.mark.repeated" in text
    real = {path.name for path in (ROOT / "tests" / "e2e").glob("test_*.py")}
    assert real <= {Path(file).name for file, _, _ in rows}, "a file of real jobs is not in the table"


def test_warnings_end_the_build_of_the_site() -> None:
    recipe = re.search(r"^docs: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None
    assert recipe[1].endswith("mkdocs build --strict"), "--quiet would hide warnings from --strict too"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100, "two screens"


def test_every_page_has_a_place_in_the_site() -> None:
    class Loader(yaml.SafeLoader):
        """Passes over the tags of mkdocs.yml."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    assert sorted(re.findall(r"[\w-]+\.md", json.dumps(nav))) == sorted(page.name for page in ROOT.glob("docs/*.md"))


def test_the_tests_that_hold_what_happens_in_the_field_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "situations.md").read_text())
    assert len(named) > 25
    for file, name in named:
        path = ROOT / file
        assert path.is_file(), file
        assert not name or f"def {name}(" in path.read_text(), f"{file}::{name}"


def test_the_tree_in_contributing_is_the_package() -> None:
    """Every room with the question that it answers, as its `__init__` asks it."""
    package = ROOT / "perseus_plugin"
    rooms = {
        path.parent.name: path.read_text().partition("?")[0].strip('"') + "?" for path in package.glob("*/__init__.py")
    }
    lines = re.findall(r"^      (\S+)(?: +(.*))?$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert {name.rstrip("/"): text for name, text in lines if name.endswith("/")} == rooms
    assert {name for name, _ in lines if name.endswith(".py")} == {path.name for path in package.glob("*.py")}
