"""A script that trains with a schedule of `torch.distributed.pipelining`, as such scripts are: nothing here is ours.

It runs with every torch from 2.4 on, as far as that has the schedule. Every rank writes `facts<rank>.json` into the
current folder: its losses and a hash of its parameters after every step.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

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


def schedule_class_of(name: str) -> Any:
    """PyTorch's class; 2.4 has no function that gives it."""
    return getattr(schedules, f"Schedule{name}")


def sharded(module: nn.Module, mesh: Any) -> nn.Module:
    """With its parameters shared out by FSDP."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # up to 2.5
        from torch.distributed._composable.fsdp import fully_shard

    return fully_shard(module, mesh=mesh)


def stage_of(module: nn.Module, number: int, in_all: int, group: Any) -> Any:
    """A stage on the CPU."""
    # What comes in is shown to it where it does not find that out by itself (2.4).
    given = inspect.signature(PipelineStage).parameters["input_args"].default is inspect.Parameter.empty
    shown: Any = {"input_args": torch.zeros(2, WIDTH)} if given else {}
    return PipelineStage(module, number, in_all, torch.device("cpu"), group=group, **shown)


class _All:
    """Transfers that are waited for together."""

    def __init__(self, transfers: list[Any]) -> None:
        self._transfers = transfers

    def wait(self) -> None:
        for one in self._transfers:
            one.wait()


def mend_gloo() -> None:
    """Have older versions, which were made for NCCL, run over gloo too: they fail there by themselves.

    NCCL makes one transfer of those that are posted together. Up to 2.6 only the last one is kept and waited for, and
    gloo gives up the others. Up to 2.9 ranks first send each other something of another size than its receiver expects,
    for which gloo ends the process.
    """
    if not hasattr(schedules, "_wait_batch_p2p"):

        def batch_p2p(transfers: list[Any], desc: str | None = None) -> _All | None:
            return _All(dist.batch_isend_irecv(transfers)) if transfers else None

        schedules._batch_p2p = batch_p2p
    if torch.__version__ < (2, 10):
        PipelineStage._get_init_p2p_neighbors_ops = lambda self: []


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


def _replaying(schedule: Any) -> AbstractContextManager[None]:
    import perseus_plugin

    return perseus_plugin.replaying(schedule)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", default="1F1B")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--shards", type=int, default=1, help="FSDP ranks of every stage")
    parser.add_argument("--accumulate", type=int, default=1, help="runs of the schedule for one step of the optimizers")
    parser.add_argument("--evaluate-every", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="at most")
    parser.add_argument("--until-said", help="end some steps after these words of a log")
    parser.add_argument("--more", type=int, default=20, help="how many")
    parser.add_argument("--enable", help="call perseus_plugin.enable with this file")
    parser.add_argument("--graph-once", help="from when this file is there on, steps are replays of a CUDA graph")
    parser.add_argument("--leave-the-group", action="store_true", help="exit without destroy_process_group")
    arguments = parser.parse_args()
    mend_gloo()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // arguments.shards, arguments.shards), mesh_dim_names=("pp", "dp")
    )
    group = mesh.get_group("pp")
    rank, ranks = group.rank(), group.size()
    schedule_class = schedule_class_of(arguments.schedule)
    numbers, in_all = stages_of_rank(schedule_class, arguments.schedule, rank, ranks)
    parts = [part(number) for number in numbers]
    if arguments.shards > 1:
        parts = [sharded(one, mesh["dp"]) for one in parts]
    stages = [stage_of(one, number, in_all, group) for one, number in zip(parts, numbers, strict=True)]
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
    is_graph = torch.zeros(1)
    step = 0
    while not ending.is_over(step):
        if arguments.graph_once:
            is_graph = torch.tensor([float(Path(arguments.graph_once).exists())])
            dist.all_reduce(is_graph, dist.ReduceOp.MAX)
        for _ in range(arguments.accumulate):
            x = torch.randn(2 * arguments.microbatches, WIDTH, generator=generator)
            losses: list[torch.Tensor] = []
            inputs = (x,) if 0 in numbers else ()
            targets = {"target": x.cos(), "losses": losses} if in_all - 1 in numbers else {}
            with _replaying(schedule) if is_graph.item() else nullcontext():
                schedule.step(*inputs, **targets)  # there is no GPU whose graph could be replayed
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
