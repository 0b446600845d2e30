"""Every rank of every schedule of PyTorch's runs its stream: PyTorch's own loops, one rank after the other.

The process group is torch's fake one, whose transfers arrive at once with whatever is in the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from perseus_plugin.config import PerseusConfig
from perseus_plugin.integrations.in_memory import InMemorySession
from perseus_plugin.integrations.torch_pipelining.hooks import Hooks, Microbatches
from perseus_plugin.integrations.torch_pipelining.schedule import followed
from perseus_plugin.iteration.instructions import Compute
from tests.e2e.pipelining_job import stages_of_rank
from tests.factories import placement

WIDTH = 4
ONE_STAGE, SEVERAL = ("1F1B", "GPipe"), ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SIZES = ((2, 4), (2, 6), (2, 9), (3, 6), (3, 12), (4, 8), (4, 12), (6, 24), (8, 16))
# Seconds each; those before stand for them.
LARGE = SIZES[-3:]
MORE_SIZES = ((1, 1), (1, 5), (2, 2), (4, 4), (5, 7))  # of those whose microbatches need be no multiple of anything
CASES = [
    *((name, *size) for name in ONE_STAGE for size in (*SIZES, *MORE_SIZES)),
    *((name, *size) for name in SEVERAL for size in SIZES if size[1] % size[0] == 0),
    *((name, *size) for name in V_SHAPED for size in SIZES if size[1] >= 2 * size[0]),
]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """In the place of the other tests' group: each rank has one of its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Stage(PipelineStage):
    """One that knows the shapes of what it passes on; its ranks need not agree on that."""

    def __init__(self, number: int, count: int) -> None:
        example, gradient = torch.zeros(2, WIDTH, requires_grad=True), torch.zeros(2, WIDTH)
        super().__init__(
            nn.Linear(WIDTH, WIDTH),
            number,
            count,
            torch.device("cpu"),
            input_args=(example if number else example.detach(),),
            output_args=(example,),
            input_grads=(gradient if number else None,),
            output_grads=(gradient,),
        )

    def _warmup_forward_vote(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    _warmup_backward_result = _warmup_forward_vote


def session_of(name: str, ranks: int, microbatches: int, rank: int, steps: int) -> InMemorySession:
    """What a session was told on a rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    schedule_class = get_schedule_class(name)
    numbers, count = stages_of_rank(schedule_class, name, rank, ranks)
    stages: list[Any] = [Stage(number, count) for number in numbers]
    is_single = issubclass(schedule_class, PipelineScheduleSingle)
    schedule: Any = schedule_class(stages[0] if is_single else stages, microbatches, loss_fn=nn.functional.mse_loss)
    session = InMemorySession(PerseusConfig(), placement(rank, ranks, ranks))

    def start(hooks: Hooks, of: Any, given: Microbatches) -> InMemorySession:
        hooks.begins(session)
        return session

    hooks = Hooks(schedule, start, lambda hooks: None)
    x = torch.randn(2 * microbatches, WIDTH)
    optimizer = torch.optim.SGD((p for stage in stages for p in stage.submod.parameters()), lr=0.0)
    for _ in range(steps):
        schedule.step(*((x,) if 0 in numbers else ()), **({"target": x} if count - 1 in numbers else {}))
        optimizer.step()
    hooks.remove()
    session.close()
    dist.destroy_process_group()
    return session


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [pytest.param(*case, marks=[pytest.mark.repeated] if case[1:] in LARGE else []) for case in CASES],
)
def test_every_rank_runs_its_stream(name: str, ranks: int, microbatches: int, caplog: pytest.LogCaptureFixture) -> None:
    keys = set()
    for rank in range(ranks):
        session = session_of(name, ranks, microbatches, rank, steps=3)
        seen = [(one.begun, one.ended, one.undisturbed, one.over) for one in session.iterations]
        operations = len(session.iterations[0].operations)
        assert operations > 0
        # The first one learns shapes, and what ends an iteration.
        assert seen == [(operations, operations - 1, False, True), *[(operations, operations, True, True)] * 2]
        keys |= {one.schedule for one in session.iterations}
    assert len(keys) == 1
    assert "perseus" not in caplog.text


def test_a_file_may_give_ranks_different_numbers_of_stages(tmp_path: Path) -> None:
    file = tmp_path / "lists.csv"
    file.write_text("0F0,0F1,2F0,2B0,2F1,2B1,0B0,0B1\n1F0,1F1,1B0,1B1\n")
    found = []
    for rank, numbers in enumerate(([0, 2], [1])):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        stages: list[Any] = [Stage(number, 3) for number in numbers]
        schedule: Any = _PipelineScheduleRuntime(stages, 2, loss_fn=nn.functional.mse_loss)
        schedule._load_csv(str(file))
        found.append(followed(schedule))
        dist.destroy_process_group()
    assert found[0].key == found[1].key
    assert found[0].streams == found[1].streams
    computes = [[op for op in one.operations if isinstance(op, Compute)] for one in found]
    assert [len(one) for one in computes] == [8, 4]
    assert {op.chunk for op in computes[1]} == {0}
