from __future__ import annotations

import sys

import pytest

from perseus_plugin.cli import main
from tests.cli.commands import Done, Perseus
from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]


@pytest.fixture
def perseus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Perseus:
    """The command in this process: starting it dozens of times would take minutes."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["perseus", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run
