"""Which room may import which: one way, down the list below, and no circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

# One process reads the package.
pytestmark = pytest.mark.xdist_group("rooms")

PACKAGE = Path(__file__).parents[1] / "perseus_plugin"
FLOORS = (
    ("__init__", "megatron"),
    ("cli", "integrations"),
    ("session",),
    ("leader",),
    ("stragglers",),
    ("reporting",),
    ("planning",),
    ("profiling",),
    ("control",),
    ("config",),
    ("gpus",),
    ("exchange",),
    ("iteration",),
    ("errors", "files", "_version"),
)
"""From top to bottom: a room imports from floors below its own, and from itself."""
LAZY_FACE = "__init__"
"""The public face names things of every room and loads them when they are asked for."""
FILES = ("curve", "frontier", "inputs", "plan", "streams")
PROCESSES = ("process", "planner_process", "frontier_process", "batch_process", "child", "work")
"""Of `planning`: what keeps plans and frontiers in files, and what runs the planner beside the job and brakes it."""
PURE = (
    "iteration",
    *(
        f"leader/{name}.py"
        for name in ("aiming", "batch_book", "decide", "goal_plans", "observed", "reigns", "state", "target_book")
    ),
    "planning",
)
"""No torch, no clock, no file, no thread."""
IMPURE = ("torch", "time", "pathlib", "os", "threading", "subprocess", "socket", "logging", "random")
ROOMS_AT_MOST, ROOT_FILES = (
    12,
    {
        "__init__.py",
        "megatron.py",
        "config.py",
        "errors.py",
        "files.py",
        "_version.py",
    },
)


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """All of the package's modules that a file names, those for type checkers and those inside functions too."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "perseus_plugin":
            inside = node.module.partition(".")[2]
            names = [".".join(filter(None, (inside, alias.name))) for alias in node.names]
            names = [name if name in known else inside or "__init__" for name in names]
        elif isinstance(node, ast.Import):
            names = [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "perseus_plugin"]
        found |= {name if name in known else f"{name}.__init__" for name in names}
    return frozenset(found)


def floor(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_go_down() -> None:
    upward = [
        f"{module} -> {name}"
        for module, path in modules().items()
        if module != LAZY_FACE
        for name in imports(path)
        if floor(name) < floor(module) or (floor(name) == floor(module) and name.split(".")[0] != module.split(".")[0])
        if name.split(".")[0] not in ("_version", "bounds", "errors", "files", "processes", "serving")
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(path) - {name} for name, path in known.items() if name != LAZY_FACE}
    done: set[str] = set()
    circles: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circles.append(" -> ".join((*above[above.index(name) :], name)))
        elif name not in done:
            for one in graph.get(name, ()):
                visit(one, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert not circles, "\n".join(circles)


def test_the_package_has_few_rooms_and_root_files() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(rooms) <= ROOMS_AT_MOST
    assert rooms <= {room for rooms in FLOORS for room in rooms}
    assert {path.name for path in PACKAGE.glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("room", sorted(path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")))
def test_every_room_says_what_it_answers(room: Path) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))


def test_tests_mirror_the_rooms() -> None:
    tests = Path(__file__).parent
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= {path.parent.name for path in tests.glob("*/__init__.py")}


@pytest.mark.parametrize("place", PURE)
def test_what_decides_touches_nothing(place: str) -> None:
    files = sorted((PACKAGE / place).rglob("*.py")) if (PACKAGE / place).is_dir() else [PACKAGE / place]
    files = [path for path in files if path.stem not in (*FILES, *PROCESSES) or path.parent.name != "planning"]
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & set(IMPURE), path
            assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"), path


SUMS = ("state", "figures", "work", "_work")
"""Parts that are figures which their owner alone keeps; all other parts change by their own methods."""


def test_a_part_is_not_changed_from_outside() -> None:
    changed = []
    for path in modules().values():
        if path.name == "in_memory.py":
            continue  # it stands for the session, whose parts have no methods of their own there
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
                continue
            part = node.value
            if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self" and part.attr not in SUMS:
                changed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert changed == [], "made at the wrong moment, or wants a method that says why"
