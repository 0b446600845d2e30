from __future__ import annotations

import os
import re
import subprocess
import sys
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
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return {name for name in out.split() if name.partition(".")[0] != "perseus_plugin"}


@pytest.mark.parametrize(
    "statement",
    [
        "import perseus_plugin; perseus_plugin.__version__; perseus_plugin.enable",
        "from perseus_plugin import *",
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
    assert set(perseus_plugin.__all__) >= {"__version__", "enable"}
