from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from perseus_plugin.cli.app import COMMANDS, command
from perseus_plugin.profiling.profile import save_profile
from tests.cli.commands import Perseus
from tests.planning.jobs import bundled_profile


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("typer", "cli", ["--help"]),
        ("rich", "cli", ["plan", "profile.csv"]),
        ("ortools", "planner", ["plan", "profile.csv", "--blocking-power", "60", "--microbatches", "4"]),
    ],
)
def test_where_a_package_is_missing_one_line_says_what_to_install(
    tmp_path: Path, package: str, extra: str, words: list[str]
) -> None:
    save_profile(bundled_profile(2), tmp_path / "profile.csv")
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['perseus', *{words!r}]\n"
        "from perseus_plugin.cli.main import run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    needs = f"needs {package}, which is not installed (pip install 'perseus-plugin[{extra}]')"
    assert (done.returncode, done.stderr) == (2, f"perseus: this command cannot be run: {needs}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name: str) -> None:
    assert command(name).help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name]


def test_the_list_of_commands_and_a_command_that_is_not_there(perseus: Perseus) -> None:
    done = perseus("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    done = perseus("plann")
    assert done.returncode == 2
    assert "Did you mean 'plan'?" in done.stderr
