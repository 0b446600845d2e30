"""A script that trains with a schedule of `torch.distributed.pipelining`, as such scripts are: nothing here is ours.

Every rank writes `facts<rank>.json` into the current folder: its losses and a hash of its parameters after every step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

WIDTH = 16
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


def part(stage: int) -> nn.Module:
    """A stage's part of the model; the same whatever the layout."""
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def stages_of_rank(schedule: type, name: str, rank: int, ranks: int) -> tuple[list[int], int]:
    """The stages of a rank, and how many the model has."""
    if issubclass(schedule, PipelineScheduleSingle):
        return [rank], ranks
    return [rank, 2 * ranks - 1 - rank if name in V_SHAPED else rank + ranks], 2 * ranks


class Ending:
    """Says when to stop: so many steps after somebody has said some words on any rank, or after so many steps."""

    def __init__(self, words: str | None, more: int, at_most: int) -> None:
        self._words, self._more, self._last = words, more, at_most
        self._heard = False
        handler = logging.Handler()
        handler.emit = self._hear  # type: ignore[method-assign]
        logging.getLogger("perseus_plugin").addHandler(handler)

    def _hear(self, record: logging.LogRecord) -> None:
        self._heard = self._heard or (self._words is not None and self._words in record.getMessage())

    def is_over(self, step: int) -> bool:
        """Whether this step is not to be; all ranks ask."""
        if self._words is not None:
            heard = torch.tensor([int(self._heard)])
            dist.all_reduce(heard)
            if heard.item():
                self._words, self._last = None, min(self._last, step + self._more)
        return step >= self._last


def parameters_of(parts: list[nn.Module]) -> str:
    """A hash of this rank's parameters, bit by bit."""
    digest = hashlib.sha256()
    for one in parts:
        for name, parameter in one.named_parameters():
            here = getattr(parameter, "_local_tensor", parameter).detach()
            digest.update(name.encode() + here.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", default="1F1B")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--shards", type=int, default=1, help="FSDP ranks of every stage")
    parser.add_argument("--accumulate", type=int, default=1, help="runs of the schedule for one step of the optimizers")
    parser.add_argument("--evaluate-every", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="at most")
    parser.add_argument("--until-said", help="end some steps after these words of a log")
    parser.add_argument("--more", type=int, default=30, help="how many")
    parser.add_argument("--enable", help="call perseus_plugin.enable with this file")
    parser.add_argument("--leave-the-group", action="store_true", help="exit without destroy_process_group")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // arguments.shards, arguments.shards), mesh_dim_names=("pp", "dp")
    )
    group = mesh.get_group("pp")
    rank, ranks = group.rank(), group.size()
    schedule_class = get_schedule_class(arguments.schedule)
    numbers, in_all = stages_of_rank(schedule_class, arguments.schedule, rank, ranks)
    parts = [part(number) for number in numbers]
    if arguments.shards > 1:
        parts = [fully_shard(one, mesh=mesh["dp"]) for one in parts]
    stages: list[Any] = [
        PipelineStage(one, number, in_all, torch.device("cpu"), group=group)
        for one, number in zip(parts, numbers, strict=True)
    ]
    is_single = issubclass(schedule_class, PipelineScheduleSingle)
    schedule: Any = schedule_class(
        stages[0] if is_single else stages, arguments.microbatches, loss_fn=nn.functional.mse_loss
    )
    if arguments.enable:
        import perseus_plugin

        perseus_plugin.enable(schedule, arguments.enable)
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in parts]
    ending = Ending(arguments.until_said, arguments.more, arguments.steps)
    generator = torch.Generator().manual_seed(7 + mesh.get_local_rank("dp"))
    facts: dict[str, list[Any]] = {"losses": [], "parameters": []}
    step = 0
    while not ending.is_over(step):
        for _ in range(arguments.accumulate):
            x = torch.randn(2 * arguments.microbatches, WIDTH, generator=generator)
            losses: list[torch.Tensor] = []
            inputs = (x,) if 0 in numbers else ()
            targets = {"target": x.cos(), "losses": losses} if in_all - 1 in numbers else {}
            schedule.step(*inputs, **targets)
            facts["losses"].append([one.item() for one in losses])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        facts["parameters"].append(parameters_of(parts))
        step += 1
        if arguments.evaluate_every and step % arguments.evaluate_every == 0:
            with torch.no_grad():
                schedule.eval(*inputs, **targets)
            facts["losses"].append([one.item() for one in losses])
    Path(f"facts{dist.get_rank()}.json").write_text(json.dumps(facts))
    if not arguments.leave_the_group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
