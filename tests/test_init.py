from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import perseus_plugin

REPOSITORY = Path(__file__).parents[1]
HEAVY = {"torch", "ortools", "pydantic", "pydantic_core", "numpy", "deepspeed", "yaml", "rich", "typer", "pynvml"}


def loaded_by(statement: str) -> set[str]:
    """Modules in a fresh interpreter after `statement` that were not there before, without our own."""
    code = f"import sys; before = set(sys.modules); {statement}; print('\\n'.join(set(sys.modules) - before))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    return {name for name in out.split() if name.partition(".")[0] != "perseus_plugin"}


@pytest.mark.parametrize(
    "statement",
    [
        "import perseus_plugin; perseus_plugin.__version__; perseus_plugin.enable",
        "import perseus_plugin; dir(perseus_plugin)",
        "from perseus_plugin.integrations.loading import install_import_hooks; install_import_hooks()",
    ],
)
def test_only_the_standard_library_is_loaded(statement: str) -> None:
    loaded = {name.partition(".")[0] for name in loaded_by(statement)}
    assert not loaded & HEAVY
    assert loaded <= set(sys.stdlib_module_names)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", perseus_plugin.__version__)
    assert version("perseus-plugin") == perseus_plugin.__version__
    assert f"\nversion: {perseus_plugin.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"\n## {perseus_plugin.__version__} " in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_public_name_is_there_documented_and_known_to_type_checkers() -> None:
    public = set(perseus_plugin.__all__) - {"__version__"}
    documented = re.findall(r"^::: perseus_plugin\.(\S+)$", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted({*public, "errors"}), "each once"
    for name in public:
        assert callable(getattr(perseus_plugin, name)), name
    assert public <= set(dir(perseus_plugin))
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = perseus_plugin.no_such_name  # type: ignore[attr-defined]


def test_type_checkers_see_what_a_running_program_gets() -> None:
    tree = ast.parse(Path(perseus_plugin.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: getattr(import_module(str(node.module)), alias.name) for node in imports for alias in node.names
    }
    own = {
        name: function
        for name, function in vars(perseus_plugin).items()
        if name in ("announce", "announced", "enable", "replaying", "report_straggler", "set_target")
    }
    assert {**seen, **own} == {
        "PipelineSession": seen["PipelineSession"],  # in the signature of `enable`, and made by nobody else
        **{name: getattr(perseus_plugin, name) for name in perseus_plugin.__all__ if name != "__version__"},
    }
