from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from perseus_plugin.config import PerseusConfig
from perseus_plugin.errors import ConfigError
from perseus_plugin.integrations.megatron import adapter as megatron
from perseus_plugin.integrations.megatron.arguments import add_arguments, config_of, patch_arguments_module


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[PerseusConfig]:
    """The configurations that hooks were installed for."""
    made: list[PerseusConfig] = []
    monkeypatch.setattr(megatron, "install", lambda config, arguments: made.append(config))
    return made


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pretrain_gpt.py", allow_abbrev=False)
    parser.add_argument("--lr", type=float)
    return add_arguments(parser).parse_args(list(words))


def test_without_the_flag_nothing_happens(installed: list[PerseusConfig]) -> None:
    assert parse("--lr", "0.1").perseus is False
    assert installed == []


def test_the_flag_alone_is_the_default_configuration(installed: list[PerseusConfig]) -> None:
    parse("--perseus", "--lr", "0.1")
    assert installed == [PerseusConfig()]


def test_flags_go_before_the_file(installed: list[PerseusConfig], tmp_path: Path) -> None:
    file = tmp_path / "perseus.yaml"
    file.write_text("perseus: {slowdown: 0.5, profiling: {clock_count: 4}, gpu: {zeusd_socket: /x}}")
    parse(
        *("--perseus", "--perseus-config", str(file), "--perseus-slowdown", "10%", "--perseus-output", "there"),
        *("--perseus-backend", "off", "--perseus-profile", "p.csv", "--perseus-blocking-power", "75"),
    )
    (config,) = installed
    assert (config.slowdown, config.output_dir) == (0.1, "there")
    assert (config.gpu.backend, config.gpu.zeusd_socket) == ("off", "/x")
    assert (config.profiling.load, config.profiling.blocking_power_w) == ("p.csv", 75.0)
    assert config.profiling.clock_count == 4


def test_a_file_can_turn_it_off(installed: list[PerseusConfig], tmp_path: Path) -> None:
    file = tmp_path / "perseus.yaml"
    file.write_text("enabled: false")
    parse("--perseus", "--perseus-config", str(file))
    assert installed == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--perseus", "--perseus-slowdown", "-1"], "perseus.slowdown: got -1.0; allowed: a number from 0 to 1"),
        (["--perseus", "--perseus-slowdown", "much"], 'perseus.slowdown: got "much"; allowed: a number from 0 to 1'),
        (["--perseus", "--perseus-backend", "rocm"], 'perseus.gpu.backend: got "rocm"; allowed: "auto", "nvml"'),
        (["--perseus", "--perseus-config", "no.yaml"], "no.yaml: cannot read the configuration"),
        (["--perseus", "--perseus-config", "no.toml"], "no.toml: ending '.toml'; allowed: .json, .yaml or .yml"),
        (["--perseus-slowdown", "0.1"], "--perseus-slowdown: needs --perseus"),
        (["--perseus-config", "no.yaml"], "--perseus-config: needs --perseus"),
    ],
)
def test_wrong_settings_end_the_program_with_one_line(
    words: list[str], message: str, installed: list[PerseusConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(*words)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain_gpt.py: error: ")
    assert message in line
    assert installed == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "rank 0: pretrain_gpt.py: error: perseus.slowdown: got -1.0"),
        ({"RANK": "8", "LOCAL_RANK": "0"}, "rank 8: pretrain_gpt.py: error: perseus.slowdown: got -1.0"),
        ({"RANK": "3", "LOCAL_RANK": "3"}, ""),
        ({"RANK": "0"}, "rank 0: pretrain_gpt.py: error: perseus.slowdown: got -1.0"),
        ({"RANK": "3"}, ""),
    ],
)
def test_one_rank_of_each_machine_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], said: str
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse("--perseus", "--perseus-slowdown", "-1")
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert len(err.splitlines()) == (1 if said else 0)


def test_a_fault_of_ours_leaves_the_parser_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(config: object, arguments: object) -> None:
        raise OSError("nothing")

    monkeypatch.setattr(megatron, "install", broken)
    assert parse("--perseus", "--lr", "0.1").lr == 0.1
    (message,) = caplog.messages
    assert message.startswith("perseus is off: it could not start; training goes on at full clocks")


def test_adding_twice_adds_once(installed: list[PerseusConfig]) -> None:
    parser = add_arguments(add_arguments(argparse.ArgumentParser()))
    parser.parse_known_args(["--perseus", "--unknown"])
    assert len(installed) == 1


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_foreign_parse_runs_whether_it_came_before_or_after(
    installed: list[PerseusConfig], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    calls = 0

    class Parser(argparse.ArgumentParser):
        pass

    def foreign(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return argparse.ArgumentParser.parse_known_args(self, *args, **kwargs)  # type: ignore[call-overload]

    parser = Parser()
    if where == "instance":
        vars(parser)["parse_known_args"] = foreign.__get__(parser)
    add_arguments(parser)
    if where == "class":
        monkeypatch.setattr(Parser, "parse_known_args", foreign)
    assert parser.parse_args(["--perseus"]).perseus
    assert calls == 1
    assert len(installed) == 1


def test_megatrons_parser_is_patched_once(installed: list[PerseusConfig]) -> None:
    module = ModuleType("megatron.training.arguments")
    module.add_megatron_arguments = lambda parser: parser  # type: ignore[attr-defined]
    patch_arguments_module(module)
    patched = module.add_megatron_arguments
    patch_arguments_module(module)
    assert module.add_megatron_arguments is patched
    module.add_megatron_arguments(argparse.ArgumentParser()).parse_args(["--perseus"])
    assert len(installed) == 1


def test_a_module_without_the_function_is_left_alone() -> None:
    module = ModuleType("megatron.training.arguments")
    patch_arguments_module(module)
    assert not hasattr(module, "add_megatron_arguments")


def test_arguments_made_elsewhere_will_do() -> None:
    """A namespace that never knew the flags is one without them."""
    assert config_of(argparse.Namespace()) is None
    with pytest.raises(ConfigError):
        config_of(argparse.Namespace(perseus_output="x"))


def test_flags_cost_no_import() -> None:
    code = (
        "import argparse, sys; from perseus_plugin.integrations.megatron import add_arguments; "
        "add_arguments(argparse.ArgumentParser()).parse_args([]); "
        "print([m for m in ('torch', 'ortools', 'pydantic', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, ""),
        ({"cuda_graph_impl": "none", "cuda_graph_scope": "full", "cuda_graph_modules": "full"}, ""),
        ({"cuda_graph_impl": None, "enable_cuda_graph": False, "external_cuda_graph": False}, ""),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": ["attn"]}, "(--cuda-graph-impl local) are not tested on"),
        ({"cuda_graph_impl": "transformer_engine"}, "(--cuda-graph-impl transformer_engine) are not tested on"),
        ({"enable_cuda_graph": True, "cuda_graph_scope": "full"}, "(--enable-cuda-graph) are not tested on"),
        ({"external_cuda_graph": True}, "(--external-cuda-graph) are not tested on"),
        ({"optimizer_cuda_graph": True, "cuda_graph_impl": "none"}, "(--optimizer-cuda-graph) are not tested on"),
        ({"cuda_graph_impl": "full_iteration"}, ""),
        (
            {"cuda_graph_impl": "full_iteration", "optimizer_cuda_graph": True},
            "(--optimizer-cuda-graph) are not tested",
        ),
        ({"cuda_graph_scope": "full_iteration"}, ""),
        ({"cuda_graph_scope": [SimpleNamespace(name="full_iteration")]}, ""),
        ({"hybrid_context_parallel": True}, "hybrid-context-parallel"),
        ({"encoder_pipeline_model_parallel_size": 1}, "encoder"),
        ({"encoder_pipeline_model_parallel_size": None}, ""),
    ],
)
def test_jobs_that_cannot_be_controlled_are_told_apart(settings: dict[str, object], reason: str) -> None:
    found = megatron.why_not(SimpleNamespace(**settings))
    assert bool(found) == bool(reason)
    assert reason in found


@pytest.mark.parametrize(
    ("impl", "said"),
    [("local", "CUDA graphs (--cuda-graph-impl local)"), ("full_iteration", "a CUDA graph of the full")],
)
def test_such_a_job_is_not_hooked_and_told_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, impl: str, said: str
) -> None:
    """One graph of the full iteration only on a real GPU of which nothing has been verified."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = argparse.Namespace(cuda_graph_impl=impl)
    assert megatron.install(PerseusConfig(), arguments) is None
    (message,) = caplog.messages
    assert message.startswith(f"perseus is off: {said}")
    assert "training goes on at full clocks" in message


@pytest.mark.parametrize(
    ("rank", "local_rank", "everywhere", "prefix"),
    [
        ("0", "0", False, "perseus is off: why"),
        ("8", "0", False, ""),
        ("0", "0", True, "rank 0: perseus is off: why"),
        ("8", "0", True, "rank 8: perseus is off: why"),
        ("9", "1", True, ""),
    ],
)
def test_a_reason_of_one_machine_is_said_there(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: str,
    local_rank: str,
    everywhere: bool,
    prefix: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    megatron.say_off("why", everywhere)
    assert caplog.messages == ([f"{prefix}; training goes on at full clocks"] if prefix else [])
