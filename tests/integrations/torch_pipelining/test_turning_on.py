from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import perseus_plugin
from perseus_plugin.errors import ConfigError
from perseus_plugin.integrations.in_memory import InMemorySession
from perseus_plugin.integrations.torch_pipelining import turning_on
from tests.integrations.torch_pipelining.conftest import Script, Untold

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def schedules() -> ModuleType:
    """A module of schedules, patched twice."""

    class _PipelineSchedule:
        """As PyTorch's, as far as turning it on looks at it."""

        def __init__(self) -> None:
            self._stages: list[object] = []

        def _step_microbatches(self) -> None: ...

    module = ModuleType("schedules")
    vars(module)["_PipelineSchedule"] = _PipelineSchedule
    turning_on.patch_schedules_module(module)
    turning_on.patch_schedules_module(module)
    return module


def hooked(schedule: object) -> bool:
    return "_perseus_hooks" in vars(schedule)


def test_the_variable_hooks_what_is_built(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not hooked(schedules._PipelineSchedule())
    (tmp_path / "perseus.yaml").write_text("slowdown: 0.1\n")
    monkeypatch.setenv("PERSEUS_CONFIG", str(tmp_path / "perseus.yaml"))
    assert hooked(schedules._PipelineSchedule())


def test_a_file_that_is_disabled_hooks_nothing(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perseus.yaml").write_text("enabled: false\n")
    monkeypatch.setenv("PERSEUS_CONFIG", str(tmp_path / "perseus.yaml"))
    assert not hooked(schedules._PipelineSchedule())


def test_wrong_settings_end_the_job_when_the_schedule_is_built(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSEUS_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the configuration"):
        schedules._PipelineSchedule()
    (tmp_path / "perseus.yaml").write_text("slowdwn: 0.1\n")
    monkeypatch.setenv("PERSEUS_CONFIG", str(tmp_path / "perseus.yaml"))
    with pytest.raises(ConfigError, match="slowdwn"):
        schedules._PipelineSchedule()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        schedules._PipelineSchedule()


def test_a_fault_of_ours_does_not_keep_a_schedule_from_being_built(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "perseus.yaml").write_text("{}\n")
    monkeypatch.setenv("PERSEUS_CONFIG", str(tmp_path / "perseus.yaml"))
    schedules._PipelineSchedule._step_microbatches = Untold(lambda: None)
    assert not hooked(schedules._PipelineSchedule())
    assert "perseus is off: it could not start" in caplog.text


def test_a_call_does_in_the_place_of_the_variable(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turning_on, "_given", [])
    assert not hooked(schedules._PipelineSchedule())
    (tmp_path / "perseus.yaml").write_text("{}\n")
    turning_on.turn_on(str(tmp_path / "perseus.yaml"))
    assert hooked(schedules._PipelineSchedule())


def test_enable_wants_settings_and_a_schedule(sessions: list[InMemorySession]) -> None:
    with pytest.raises(ConfigError, match="enable: got a schedule and no settings"):
        perseus_plugin.enable(Script().schedule)
    script = Script()
    assert perseus_plugin.enable(script.schedule, {"enabled": False}) is None
    assert not hooked(script.schedule)


def test_a_program_that_does_not_ask_imports_nothing_of_ours() -> None:
    code = """
        import sys
        import torch.distributed.pipelining.schedules as schedules
        assert "_perseus_patched" in vars(schedules._PipelineSchedule)
        heavy = {"pydantic", "ortools", "perseus_plugin.config", "perseus_plugin.integrations.torch_pipelining.adapter"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        print("fine")
    """
    install = "from perseus_plugin.integrations.loading import install_import_hooks; install_import_hooks()\n"
    done = subprocess.run(
        [sys.executable, "-c", install + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr
