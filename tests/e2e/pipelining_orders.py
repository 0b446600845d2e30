"""Runs PyTorch's schedules on four ranks under our hooks, each with a session that notes and checks what it is told.

    pipelining_orders.py [SCHEDULE...]

Each case is built, trains for some steps and is dropped again, in one process group. Rank 0 prints a line of JSON: per
case, on how many ranks all iterations were seen whole that are no part of PyTorch's learning of shapes.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from pipelining_job import WIDTH, mend_gloo, part, schedule_class_of, sharded, stage_of, stages_of_rank
from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

import perseus_plugin
from perseus_plugin.integrations.in_memory import InMemorySession, sessions_in_memory

STEPS = 4
ONE_STAGE = ("1F1B", "GPipe")
SEVERAL = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
FAILS_IN_EVALUATION = ("ZBVZeroBubble", "DualPipeV")  # PyTorch's own


def cases() -> Iterator[tuple[str, int, int, str]]:
    """Schedule, ranks of a pipeline, microbatches, and what else there is."""
    for name in (*ONE_STAGE, *SEVERAL):
        yield name, 4, 8, ""
    yield "1F1B", 2, 4, ""
    yield "ZBVZeroBubble", 2, 6, ""
    yield "1F1B", 2, 4, "fsdp"
    yield "ZBVZeroBubble", 2, 4, "fsdp"
    yield "DualPipeV", 4, 8, "one function for a pair"


class PairAsOne:
    """A function for overlapped pairs, as a user registers it: this one calls the stages' methods, one by one."""

    def __call__(self, action: Any, context: Any) -> None:
        schedule = context.schedule_ref
        here = {stage.stage_index: stage for stage in schedule._stages}
        for one in action.sub_actions:
            stage, m = here[one.stage_index], one.microbatch_index
            before, after = here.get(one.stage_index - 1), here.get(one.stage_index + 1)
            if one.computation_type == schedules._ComputationType.FORWARD:
                if not stage.is_first and before is None:
                    schedules._wait_batch_p2p(schedule.fwd_recv_ops.pop((one.stage_index, m)))
                output = stage.forward_one_chunk(m, context.arg_mbs[m], context.kwarg_mbs[m])
                schedule._maybe_compute_loss(stage, output, context.target_mbs, m)
                if after is not None:
                    after.set_local_fwd_input(output, m)
            else:
                if not stage.is_last and after is None:
                    schedules._wait_batch_p2p(schedule.bwd_recv_ops.pop((one.stage_index, m)))
                schedule.backward_counter[one.stage_index] += 1
                stage.backward_one_chunk(m, loss=schedule._maybe_get_loss(stage, m), full_backward=True)
                if before is not None:
                    before.set_local_bwd_input(stage.get_local_bwd_output(m), m)


def train(name: str, ranks: int, microbatches: int, beside: str) -> tuple[bool, str]:
    """Whether this rank's session saw all, and its first difference."""
    pipelines = [list(range(first, 4, 4 // ranks)) for first in range(4 // ranks)]
    groups = [dist.new_group(members) for members in pipelines]
    group = next(one for one, members in zip(groups, pipelines, strict=True) if dist.get_rank() in members)
    schedule_class = schedule_class_of(name)
    numbers, in_all = stages_of_rank(schedule_class, name, group.rank(), ranks)
    parts = [part(number) for number in numbers]
    if beside == "fsdp":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks, 4 // ranks), mesh_dim_names=("pp", "dp"))
        parts = [sharded(one, mesh["dp"]) for one in parts]
    stages = [stage_of(one, number, in_all, group) for one, number in zip(parts, numbers, strict=True)]
    is_single = issubclass(schedule_class, PipelineScheduleSingle)
    schedule: Any = schedule_class(stages[0] if is_single else stages, microbatches, loss_fn=nn.functional.mse_loss)
    if beside == "one function for a pair":
        schedule.register_custom_function(schedules._ComputationType.OVERLAP_F_B, PairAsOne())
    stock = {one: dict(vars(one)) for one in (schedule, *stages)}
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in parts]
    x = torch.randn(2 * microbatches, WIDTH)
    inputs = (x,) if 0 in numbers else ()
    targets = {"target": x.cos()} if in_all - 1 in numbers else {}
    with sessions_in_memory() as sessions:
        perseus_plugin.enable(schedule, {})

        def steps(count: int) -> None:
            for _ in range(count):
                schedule.step(*inputs, **targets)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

        steps(STEPS)
        # The first one learns shapes, and what ends an iteration.
        whole = [*sessions[0].iterations[1:]]
        evaluates = name not in FAILS_IN_EVALUATION and hasattr(schedule, "eval")
        if evaluates:
            schedule.eval(*inputs, **targets)
            steps(STEPS)
            whole += sessions[0].iterations[STEPS + 1 :]
        problem = differences(sessions[0], STEPS * (1 + evaluates), whole, ranks, beside)
        sessions[0].close()
        if sessions[0].exchange is not None:
            sessions[0].exchange.close()
    left = [
        key
        for one, had in stock.items()
        for key, value in vars(one).items()
        if key.startswith("_perseus") or (had.get(key, value) is not value and callable(value))
    ]
    dist.barrier()
    return not problem, problem or (f"left behind: {left}" if left else "")


def differences(session: InMemorySession, steps: int, whole: list[Any], ranks: int, beside: str) -> str:
    """What is not as it should be."""
    where = session.placement
    shards = 4 // ranks if beside == "fsdp" else 1
    if (where.stages, where.shards, where.replicas) != (ranks, shards, 4 // ranks // shards):
        return f"placement {where}"
    if len(session.iterations) != steps:
        return f"{len(session.iterations)} iterations"
    for number, one in enumerate(whole):
        if not (one.complete and one.undisturbed and one.over):
            return (
                f"iteration {number}: {one.begun} begun, {one.ended} ended of {len(one.operations)}, {one.undisturbed}"
            )
    return ""


def main() -> None:
    mend_gloo()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    only = sys.argv[1:]
    for case in [case for case in cases() if not only or case[0] in only]:
        said: list[Any] = [None] * 4
        try:
            result: Any = train(*case)
        except AssertionError as error:
            result = False, f"{error}"
        dist.all_gather_object(said, result)
        found[" ".join(map(str, case)).strip()] = [problem or seen for seen, problem in said]
        gc.collect()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
