from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from perseus_plugin.config import PerseusConfig
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.integrations.in_memory import sessions_in_memory
from perseus_plugin.integrations.megatron import adapter as megatron
from perseus_plugin.integrations.megatron.arguments import add_arguments
from perseus_plugin.integrations.megatron.hooks import BRACKETS

REPOSITORY = Path(__file__).parents[3]


class Groups:
    """`parallel_state` of a job: tensor ranks first, then context, data, pipeline ranks; experts over data ranks."""

    def __init__(
        self, rank: int, tp: int = 1, cp: int = 1, dp: int = 1, pp: int = 1, ep: int = 1, etp: int = 0
    ) -> None:
        self.rank, self.world_size = rank, tp * cp * dp * pp
        self.pp, self.dp = pp, dp
        within = rank % (tp * cp * dp)
        self.stage, self.replica = rank // (tp * cp * dp), within // (tp * cp)
        of_experts = (etp or tp) * ep
        self.expert_dp, self.expert_replica = tp * cp * dp // of_experts, within // of_experts

    def module(self) -> Any:
        return SimpleNamespace(
            get_pipeline_model_parallel_world_size=lambda: self.pp,
            get_pipeline_model_parallel_rank=lambda: self.stage,
            get_data_parallel_world_size=lambda: self.dp,
            get_data_parallel_rank=lambda: self.replica,
            get_expert_data_parallel_world_size=lambda: self.expert_dp,
            get_expert_data_parallel_rank=lambda: self.expert_replica,
        )


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A megatron.core to put things into."""
    module = ModuleType("megatron.core")
    module.__version__ = "0.19.2"  # type: ignore[attr-defined]
    package = ModuleType("megatron")
    package.core = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron", package)
    monkeypatch.setitem(sys.modules, "megatron.core", module)
    return module


def placement_in(core: ModuleType, monkeypatch: pytest.MonkeyPatch, groups: Groups) -> Placement:
    core.parallel_state = groups.module()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: groups.rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: groups.world_size)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return megatron.placement("cuda:1")


@pytest.mark.parametrize(
    ("groups", "stage", "replica", "shards"),
    [
        (Groups(3, dp=2, pp=2), 1, 1, 1),
        (Groups(3, tp=2, pp=2), 1, 0, 2),
        (Groups(5, tp=2, dp=2, pp=2), 1, 0, 2),
        (Groups(7, tp=2, dp=2, pp=2), 1, 1, 2),
        # Context parallel ranks exchange keys and values in every layer.
        (Groups(3, cp=2, dp=2, pp=2), 0, 1, 2),
        (Groups(7, tp=2, cp=2, pp=2), 1, 0, 4),
        # Expert parallel ones exchange tokens: two of four data parallel ranks are one replica.
        (Groups(1, dp=4, pp=2, ep=2), 0, 0, 2),
        (Groups(7, dp=4, pp=2, ep=2), 1, 1, 2),
        (Groups(3, dp=4, ep=4), 0, 0, 4),
        # Experts within the tensor parallel ranks make no difference.
        (Groups(7, tp=4, dp=2, ep=2, etp=1), 0, 1, 4),
    ],
)
def test_ranks_in_lock_step_are_shards_of_one_replica(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch, groups: Groups, stage: int, replica: int, shards: int
) -> None:
    found = placement_in(core, monkeypatch, groups)
    assert (found.stage, found.replica, found.shards) == (stage, replica, shards)
    assert found.replicas * found.shards * found.stages == found.world_size
    assert (found.rank, found.local_rank, found.device) == (groups.rank, 1, "cuda:1")


def test_every_stage_of_every_replica_has_its_shards(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = [placement_in(core, monkeypatch, Groups(rank, tp=2, cp=2, dp=2, pp=2, ep=2)) for rank in range(16)]
    counts: dict[tuple[int, int], int] = {}
    for p in placed:
        counts[p.stage, p.replica] = counts.get((p.stage, p.replica), 0) + 1
    assert set(counts.values()) == {placed[0].shards}
    assert len(counts) == placed[0].stages * placed[0].replicas
    assert placed[0].replica == 0, "rank 0 follows the plan of replica 0"


def test_jobs_that_differ_have_different_facts(core: ModuleType) -> None:
    settings = {"micro_batch_size": 2, "seq_length": 64, "recompute_granularity": None}
    small, wide = [torch.nn.Linear(2, 3)], [torch.nn.Linear(2, 4)]
    made = [
        megatron.facts(small, settings),
        megatron.facts(wide, settings),
        megatron.facts([small[0], small[0]], settings),
        megatron.facts(small, {**settings, "micro_batch_size": 4}),
        megatron.facts(small, {**settings, "recompute_granularity": "full"}),
    ]
    assert megatron.facts([torch.nn.Linear(2, 3)], settings) == made[0]
    assert len({str(facts) for facts in made}) == len(made)
    assert made[0]["megatron-core"] == "0.19.2"


def test_the_shape_is_the_configurations(core: ModuleType) -> None:
    core.parallel_state = Groups(0, pp=4).module()  # type: ignore[attr-defined]
    settings = SimpleNamespace(
        overlap_p2p_comm=True, deallocate_pipeline_outputs=True, microbatch_group_size_per_vp_stage=None
    )
    assert megatron.shape_of(settings, False, 1, 8).key == "1F1B/4x8"
    assert megatron.shape_of(settings, True, 2, 8).key == "interleaved-1F1B-overlap-waits/4x8x2g4"
    core.__version__ = "0.16.1"  # type: ignore[attr-defined]
    assert megatron.shape_of(settings, True, 2, 8).key == "interleaved-1F1B-overlap/4x8x2g4"
    settings.microbatch_group_size_per_vp_stage, settings.overlap_moe_expert_parallel_comm = 6, True
    assert megatron.shape_of(settings, True, 2, 12).key == "interleaved-1F1B-pairs-overlap/4x12x2g6"


def test_a_stage_without_a_layer_has_a_device_all_the_same() -> None:
    assert megatron._device_of([torch.nn.Module(), torch.nn.Linear(1, 1)]) == "cpu"
    assert megatron._device_of([torch.nn.Module()]) == "cpu"


# The launcher.


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perseus_plugin.megatron", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY)


def test_the_launcher_runs_the_script_as_python_would(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 'from beside'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], sys.argv[0].endswith('script.py'), beside.VALUE, 'megatron' in sys.modules)\n"
        "    print([f for f in sys.meta_path if type(f).__name__ == '_PatchingFinder'] != [])\n"
        "    sys.exit(3)\n"
    )
    done = launch(str(script), "--perseus", "--lr", "1")
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["['--perseus', '--lr', '1'] True from beside False", "True"]


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "usage: "), (("--perseus",), "usage: "), (("no_such.py",), "got 'no_such.py'; allowed: a Python file")],
)
def test_the_launcher_without_a_script_says_how_to_use_it(words: tuple[str, ...], message: str) -> None:
    done = launch(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# Installing.


@pytest.fixture
def schedules(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Megatron's schedules, with a training loop beside them; nothing is installed yet."""
    made = ModuleType("megatron.core.pipeline_parallel.schedules")
    training = ModuleType("megatron.training.training")
    for module, names in ((made, ("forward_step", "backward_step", *BRACKETS)), (training, ("train_step",))):
        for name in names:
            vars(module)[name] = lambda model=None: None
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "megatron.core.pipeline_parallel", ModuleType("megatron.core.pipeline_parallel"))
    monkeypatch.setattr(megatron, "_installed", None)
    return made


def test_hooks_are_installed_once_and_the_arguments_parsed_last_count(
    core: ModuleType, schedules: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = sys.modules["megatron.training.training"]
    stock = {**vars(schedules), **vars(training)}
    hooks = megatron.install(PerseusConfig(), argparse.Namespace())
    assert hooks is not None
    hooked = {**vars(schedules), **vars(training)}
    changed = {name for name, function in stock.items() if hooked[name] is not function}
    assert changed == {*BRACKETS, "train_step"}, "instructions are hooked while a schedule runs"
    assert megatron.install(PerseusConfig(), argparse.Namespace(hybrid_context_parallel=True)) is hooks
    core.utils = ModuleType("megatron.core.utils")  # type: ignore[attr-defined]
    core.utils.get_model_config = lambda chunk: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "megatron.core.utils", core.utils)
    assert hooks._start([torch.nn.Linear(1, 1)], {}) is None
    assert "with --hybrid-context-parallel every microbatch is another piece of work" in caplog.text
    assert {**vars(schedules), **vars(training)} == hooked
    hooks.remove()
    assert {**vars(schedules), **vars(training)} == stock


def test_a_megatron_that_cannot_be_imported_is_said_and_training_goes_on(
    schedules: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, schedules.__name__, None)
    assert megatron.install(PerseusConfig(), argparse.Namespace()) is None
    (message,) = caplog.messages
    assert message.startswith("perseus is off: megatron-core cannot be hooked")


@pytest.mark.parametrize("where", ["put", "listen", "why_not"])
def test_hooking_that_fails_leaves_megatron_and_the_parser_as_they_were(
    schedules: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    training = sys.modules["megatron.training.training"]
    if where == "put":
        vars(training)["train_step"] = 7  # neither a function nor anything else with a signature
    elif where == "listen":
        monkeypatch.setitem(sys.modules, "megatron.core.utils", None)
    else:
        monkeypatch.setattr(megatron, "why_not", lambda settings: 1 / 0)
    stock = {**vars(schedules), **vars(training)}
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--log-straggler", action="store_true")
    assert parser.parse_args(["--perseus", "--log-straggler"]).perseus is True
    assert {**vars(schedules), **vars(training)} == stock
    (message,) = caplog.messages
    assert message.startswith("perseus is off: megatron-core cannot be hooked: ")
    assert message.endswith("; training goes on at full clocks")


def test_a_job_of_one_stage_is_said_and_left_alone(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core.utils = ModuleType("megatron.core.utils")  # type: ignore[attr-defined]
    core.utils.get_model_config = lambda chunk: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "megatron.core.utils", core.utils)
    core.parallel_state = Groups(0, dp=2).module()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    job = megatron._Job(PerseusConfig(), argparse.Namespace(micro_batch_size=2))
    assert job.start([torch.nn.Linear(1, 1)], {}) is None
    (line,) = caplog.messages
    assert line.startswith("perseus is off: it needs pipeline parallelism, and this job has one stage")


def test_a_session_that_cannot_start_leaves_training_as_it_was(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core.utils = ModuleType("megatron.core.utils")  # type: ignore[attr-defined]
    core.utils.get_model_config = lambda chunk: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "megatron.core.utils", core.utils)
    core.parallel_state = Groups(0, pp=2).module()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    job = megatron._Job(PerseusConfig(slowdown=0.3), argparse.Namespace(micro_batch_size=1))
    job.parsed(PerseusConfig(), argparse.Namespace(micro_batch_size=2))
    model = [torch.nn.Linear(1, 1)]
    with sessions_in_memory() as sessions:
        session = job.start(model, {"micro_batch_size": 9, "seq_length": 32})
        assert sessions == [session]
        assert (sessions[0].placement.device, sessions[0].placement.stages) == ("cpu", 2)
        assert sessions[0].config == PerseusConfig(), "what was parsed last counts"
        facts = dict(sessions[0].facts or {})
        assert (facts["micro batch size"], facts["seq length"]) == ("2", "32"), "Megatron's arguments go first"
    with sessions_in_memory(OSError("no more processes")) as sessions:
        assert job.start(model, {}) is None
        assert "perseus is off: it could not start: no more processes; training goes on at full clocks" in caplog.text
        caplog.clear()
        core.utils.get_model_config = lambda chunk: SimpleNamespace(hybrid_context_parallel=True)
        assert job.start(model, {}) is None
        assert "every microbatch is another piece of work" in caplog.text, "what cannot be controlled is not tried"

        def broken(chunk: Any) -> None:
            raise AttributeError("no config")

        caplog.clear()
        core.utils.get_model_config = broken
        assert job.start(model, {}) is None
    (message,) = caplog.messages
    assert message.startswith("perseus is off: it could not start; training goes on at full clocks. This is a fault of")


def test_the_samples_of_an_iteration_are_no_part_of_what_a_job_is(core: ModuleType) -> None:
    settings = {"micro_batch_size": 2, "global_batch_size": 96}
    assert megatron.samples_per_iteration(settings) == {"samples per iteration": "96"}
    for name, value in {"rampup_batch_size": [8, 8, 100], "step_batch_size_schedule": "0:2 9:4"}.items():
        assert megatron.samples_per_iteration({**settings, name: value}) == {}, "one number cannot say it"
    assert megatron.samples_per_iteration({"micro_batch_size": 2}) == {}
    chunks = [torch.nn.Linear(2, 3)]
    assert megatron.facts(chunks, settings) == megatron.facts(chunks, {**settings, "global_batch_size": 192})
