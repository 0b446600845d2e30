"""Iteration time with the plugin observing against without it, in one real job.

A pipeline of real processes trains without emulation. Blocks of iterations come in random order, three by three: one
with a session, two without any. Printed are the ratios of iteration times per three neighbouring blocks, with to
without, and without to without, which is what the machine does by itself. What the session's threads compute, and how
often the training thread waits (for other ranks, and for the interpreter), tells where a difference comes from.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 benchmarks/observe_overhead.py
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

import perseus_plugin
from perseus_plugin.integrations.base import PipelineSession

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deepspeed_gpt"))
from data import microbatches, standard_library_text
from model import gpt_layers, loss_fn

WITH, WITHOUT, AGAIN = "with a session", "without", "without, again"


@dataclass
class Cores:
    """Where threads run: the training thread on a core of its own, all others on those that no training thread has.

    Attributes:
        own: the training thread's.
        free: the others'; where there are none, all.
    """

    own: set[int]
    free: set[int]

    @classmethod
    def pinned(cls, local_rank: int, local_ranks: int) -> Cores:
        """Every rank of this machine on a core of its own, and nothing beside it on that core, if possible."""
        allowed = sorted(os.sched_getaffinity(0))
        owned = allowed[:: max(1, len(allowed) // local_ranks)][:local_ranks]
        if len(owned) < local_ranks:
            raise SystemExit(f"--pin: got {local_ranks} ranks; allowed: one per core, {len(allowed)} here")
        beside = set().union(*map(same_core, owned))
        cores = cls({owned[local_rank]}, {*allowed} - beside or {*allowed} - {*owned} or {*allowed})
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores.free)
        os.sched_setaffinity(0, cores.own)
        return cores


def same_core(core: int) -> set[int]:
    """What the kernel counts as cores and is this one."""
    listed = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    text = listed.read_text() if listed.exists() else str(core)
    ends = [part.split("-") for part in text.strip().split(",")]
    return {one for first, *last in ends for one in range(int(first), int(last[0] if last else first) + 1)}


def started(engine: object, cores: Cores | None) -> PipelineSession:
    """A session of this engine; its threads run where the thread does that starts them."""
    if cores is not None:
        os.sched_setaffinity(0, cores.free)
    block = {"gpu": {"backend": "off"}, "output_dir": tempfile.mkdtemp(), "log_level": "warning"}
    session = perseus_plugin.enable(engine, block)
    assert session is not None  # there are two stages
    if cores is not None:
        os.sched_setaffinity(0, cores.own)
    return session


@dataclass(frozen=True)
class Seen:
    """What has passed; of an iteration, where it is `since`.

    Attributes:
        time_s: on the clock.
        ours_s: processor time of the session's threads.
        waits: of the training thread.
    """

    time_s: float
    ours_s: float
    waits: float

    @classmethod
    def so_far(cls) -> Seen:
        """From whenever on."""
        ours = [thread.ident for thread in threading.enumerate() if thread.name.startswith("perseus")]
        ours_s = sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in ours if ident)
        return cls(time.perf_counter(), ours_s, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw)

    def since(self, before: Seen, iterations: int) -> Seen:
        """Between the two, per iteration."""
        return Seen(
            (self.time_s - before.time_s) / iterations,
            (self.ours_s - before.ours_s) / iterations,
            (self.waits - before.waits) / iterations,
        )


def interval(ratios: Sequence[float], order: random.Random) -> str:
    """Median, its bootstrapped interval, and the quartiles."""
    resampled = sorted(statistics.median(order.choices(ratios, k=len(ratios))) for _ in range(2000))
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"{statistics.median(ratios):.4f} (95 % interval of the median {resampled[50]:.4f} to {resampled[-51]:.4f}; "
        f"quartiles {low:.4f} to {high:.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="of one block with a session and two without")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no third or further pair is begun after so long"
    )
    parser.add_argument("--block", type=int, default=30, help="iterations per block")
    parser.add_argument("--settle", type=int, default=8, help="iterations before each block that do not count")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--own-core", action="store_true", help="all blocks in the first stage: the other core is free for threads"
    )
    parser.add_argument("--pin", action="store_true", help="each rank's training thread alone on a core of its own")
    arguments = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    rank, stages = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = PipelineModule(
        layers=gpt_layers(blocks=4, width=64, heads=4, vocabulary=256, length=64),
        num_stages=stages,
        loss_fn=loss_fn,
        partition_method="type:Embedding" if arguments.own_core else "parameters",
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": arguments.microbatches,
        "steps_per_print": 100000,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
    }
    engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    data = microbatches(standard_library_text(), length=64, batch=2, seed=1)
    cores = Cores.pinned(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if arguments.pin else None

    def run_block(of: str) -> Seen:
        session = started(engine, cores) if of == WITH else None
        gc.collect()
        for _ in range(arguments.settle):
            engine.train_batch(data)
        before = Seen.so_far()
        for _ in range(arguments.block):
            engine.train_batch(data)
        seen = Seen.so_far().since(before, arguments.block)
        if session is not None:
            session.close()
        return seen

    def time_left() -> bool:
        """The same on all ranks."""
        past_s = torch.tensor(time.perf_counter() - begun_s)
        torch.distributed.all_reduce(past_s, torch.distributed.ReduceOp.MAX)
        return past_s.item() < arguments.seconds

    for of in (WITHOUT, WITH):  # what is imported and allocated the first time
        run_block(of)
    order, begun_s = random.Random(0), time.perf_counter()
    seen: dict[str, list[Seen]] = {of: [] for of in (WITH, WITHOUT, AGAIN)}
    while len(seen[WITH]) < 2 or (len(seen[WITH]) < arguments.pairs and time_left()):
        for of in order.sample(list(seen), k=len(seen)):
            seen[of].append(run_block(of))
    if rank == 0:
        print(f"{stages} stages, {len(seen[WITH])} x 3 blocks of {arguments.block} iterations; on rank 0, medians:")
        for of, blocks in seen.items():
            print(
                f"  {of}: {1e3 * statistics.median(block.time_s for block in blocks):.2f} ms per iteration, of which "
                f"the session's threads compute {1e3 * statistics.median(block.ours_s for block in blocks):.3f} ms; "
                f"the training thread waits {statistics.median(block.waits for block in blocks):.1f} times"
            )
        takes = {of: [block.time_s for block in blocks] for of, blocks in seen.items()}
        observing = [a / statistics.mean(others) for a, *others in zip(*takes.values(), strict=True)]
        print(f"observing / without: {interval(observing, order)}")
        print(f"without / without: {interval([b / c for _, b, c in zip(*takes.values(), strict=True)], order)}")


if __name__ == "__main__":
    main()
