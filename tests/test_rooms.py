"""Which room may import which: one way, down the list below, and no circle. And no test replaces a class of ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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


# Tests are handed what they need, or plant a fault for real.

TESTS = Path(__file__).parent
PATCHES = ("setattr", "delattr", "object", "patch")


@cache
def classes() -> frozenset[str]:
    """Names of all classes of the package."""
    trees = [ast.parse(path.read_text()) for path in modules().values()]
    return frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """What an expression names, where that is an imported name, an attribute of one, or a string; else empty."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := dotted(node.value, known)) else ""
    return known.get(node.id, "") if isinstance(node, ast.Name) else ""


def replaced(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a test puts something else in the place of."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
            known |= {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names if not alias.asname}
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        nodes = list(ast.walk(function))
        words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for node in nodes:
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
                targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
                yield from (dotted(one, known) for one in targets if isinstance(one, ast.Attribute))
            elif isinstance(node, ast.Call) and node.args and _called(node) in PATCHES:
                owner, name = dotted(node.args[0], known), node.args[1] if len(node.args) > 1 else None
                yield owner
                # A name that is not spelt there may be any that the test spells elsewhere.
                yield from (f"{owner}.{one}" for one in ([name.value] if isinstance(name, ast.Constant) else words))


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def of_ours(tree: ast.AST) -> list[str]:
    """Classes of the package, and what is theirs, that a test replaces."""
    found = (name for name in replaced(tree) if name.split(".")[0] == PACKAGE.name)
    return sorted({name for name in found if not classes().isdisjoint(name.split("."))})


def test_no_test_replaces_a_class_of_ours_or_what_is_its() -> None:
    found = {str(path.relative_to(TESTS)): of_ours(ast.parse(path.read_text())) for path in TESTS.rglob("*.py")}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "monkeypatch.setattr(Leader, 'step', None)",
        "monkeypatch.setattr(leader_module, 'Leader', None)",
        "for name in ('Leader', 'Coordinator'): monkeypatch.setattr(leader_module, name, None)",
        "monkeypatch.setattr('perseus_plugin.leader.leader.Leader.step', None)",
        "mock.patch('perseus_plugin.leader.leader.Leader')",
        "mock.patch.object(leader_module, 'Leader')",
        "setattr(Leader, 'step', None)",
        "Leader.step = None",
        "leader_module.Leader = None",
        "del leader_module.Leader.step",
    ],
)
def test_what_replaces_a_class_is_seen(line: str) -> None:
    imports_ = (
        "from perseus_plugin.leader.leader import Leader\nfrom perseus_plugin.leader import leader as leader_module"
    )
    assert of_ours(ast.parse(f"{imports_}\ndef test():\n    {line}"))
    assert not of_ours(ast.parse(f"{imports_}\ndef test(): leader_module._SUMMARY_EVERY_S = 0.0"))
