from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from perseus_plugin.integrations.in_memory import InMemorySession, sessions_in_memory

# A pipeline of one rank is only planned for with a profile; sessions in memory do not read it.
BLOCK = {"profiling": {"load": "profile.csv", "blocking_power_w": 80.0}}
MICROBATCHES, WIDTH = 4, 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """The process group of a job of one rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def sessions() -> Iterator[list[InMemorySession]]:
    """Those that are started."""
    with sessions_in_memory() as made:
        yield made
        for session in made:
            session.close()


class Script:
    """A script that trains on one rank with one of PyTorch's own schedules, all of whose stages it has."""

    def __init__(self, name: str = "Interleaved1F1B", microbatches: int = MICROBATCHES) -> None:
        schedule_class = get_schedule_class(name)
        is_single = issubclass(schedule_class, PipelineScheduleSingle)
        count = 1 if is_single else 2
        torch.manual_seed(0)
        self.parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]
        self.stages: list[Any] = [
            PipelineStage(one, number, count, torch.device("cpu")) for number, one in enumerate(self.parts)
        ]
        self.schedule: Any = schedule_class(
            self.stages[0] if is_single else self.stages, microbatches, loss_fn=nn.functional.mse_loss
        )
        self.optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in self.parts]
        self.generator = torch.Generator().manual_seed(1)
        self.microbatches = microbatches

    def run(self, method: str = "step") -> list[float]:
        """Run the schedule; returns the microbatches' losses."""
        x = torch.randn(2 * self.microbatches, WIDTH, generator=self.generator)
        losses: list[torch.Tensor] = []
        getattr(self.schedule, method)(x, target=x.cos(), losses=losses)
        return [one.item() for one in losses]

    def train(self, steps: int = 1) -> list[float]:
        """Some whole steps; returns all losses."""
        losses: list[float] = []
        for _ in range(steps):
            losses += self.run()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return losses


MakeScript = Callable[..., Script]


class Untold:
    """Another tool's function, in the place of a method, that tells nothing of itself: nothing is put around it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)
