"""How long a training thread waits for the interpreter as a session's threads have it.

Rank 0 of two is looked at. Its training thread only computes: many small operations of torch, each of which lets go of
Python's interpreter lock, as those of a real training step do. So all time in which it neither runs nor is ready to run
it waits for the interpreter; being disturbed by other programs is counted apart, by the kernel. The other rank sleeps.
Printed per iteration: without a session, with one that sees no iteration, and with one that sees all.

    torchrun --nproc-per-node 2 benchmarks/interpreter_waits.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from perseus_plugin import one_f_one_b, parse_config
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.integrations.base import PipelineSession, iteration, start_session
from perseus_plugin.iteration.instructions import Compute

ITERATION_S, STAGES, MICROBATCHES = 0.1, 2, 10
STREAMS = one_f_one_b(STAGES, MICROBATCHES)
FORWARD_S = ITERATION_S / (3 * MICROBATCHES)  # a backward takes twice as long


class Passed(NamedTuple):
    """What has passed on the training thread, and in the session's: seconds, and how often.

    Attributes:
        time_s: on the clock.
        running_s: processor time of the training thread.
        ready_s: for how long it could have run, and others did.
        waits: how often it waited for something.
        ours_s: processor time of the session's threads.
        turns: how often these began to compute.
    """

    time_s: float
    running_s: float
    ready_s: float
    waits: float
    ours_s: float
    turns: float

    @classmethod
    def so_far(cls) -> Passed:
        """From whenever on."""
        ours = [_of(thread.native_id) for thread in threading.enumerate() if thread.name.startswith("perseus")]
        running_s, ready_s, waits = _of(threading.main_thread().native_id)
        return cls(
            time.monotonic(), running_s, ready_s, waits, sum(one[0] for one in ours), sum(one[2] for one in ours)
        )

    def since(self, before: Passed, iterations: int) -> Passed:
        """Of one iteration."""
        return Passed(*((now - then) / iterations for now, then in zip(self, before, strict=True)))

    @property
    def blocked_s(self) -> float:
        """For how long the training thread waited."""
        return self.time_s - self.running_s - self.ready_s


def _of(thread: int | None) -> tuple[float, float, int]:
    """Seconds in which a thread ran, and was ready to; how often it waited."""
    told = Path(f"/proc/self/task/{thread}")
    running_ns, ready_ns, _ = (told / "schedstat").read_text().split()
    waits = (told / "status").read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0]
    return int(running_ns) / 1e9, int(ready_ns) / 1e9, int(waits)


class Stage:
    """A rank's work: on rank 0 it computes, elsewhere it sleeps."""

    def __init__(self, rank: int) -> None:
        self._rank, self._operations = rank, 0
        self._input, self._weight = torch.randn(64, 256), torch.randn(256, 256)
        begin_s = time.thread_time()
        for _ in range(1000):
            self._operate()
        self._operations = max(1, round(FORWARD_S / ((time.thread_time() - begin_s) / 1000)))

    def _operate(self) -> None:
        torch.nn.functional.gelu(self._input @ self._weight)

    def _compute(self, kind: str) -> None:
        amount = 2 if kind == "backward" else 1
        if self._rank:
            time.sleep(amount * FORWARD_S)
            return
        for _ in range(amount * self._operations):
            self._operate()

    def iterate(self, session: PipelineSession | None) -> None:
        """One iteration, which a session sees if there is one."""
        kinds = [op.kind for op in STREAMS[self._rank] if isinstance(op, Compute)]
        if session is None:
            for kind in kinds:
                self._compute(kind)
            return
        with iteration(session):
            session.begin_schedule("1f1b", lambda stage: STREAMS[stage])
            for kind in kinds:
                session.tap.begin()
                self._compute(kind)
                session.tap.end()
            session.end_schedule()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="of each sort")
    parser.add_argument("--iterations", type=int, default=60, help="per block, of 0.1 s of computing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stage = Stage(rank)

    def block(session: PipelineSession | None) -> Passed:
        dist.barrier()  # who sleeps is the faster one on a busy machine
        for _ in range(3):
            stage.iterate(session)
        before = Passed.so_far()
        for _ in range(arguments.iterations):
            stage.iterate(session)
        return Passed.so_far().since(before, arguments.iterations)

    seen = {"no session": [block(None) for _ in range(arguments.blocks)], "idle": [], "observing": []}
    config = parse_config({"gpu": {"backend": "off"}, "output_dir": tempfile.mkdtemp(), "log_level": "warning"})
    place = Placement(rank=rank, world_size=STAGES, stage=rank, stages=STAGES, replica=0, local_rank=rank, device="cpu")
    dist.barrier()
    session = start_session(config, place)
    for _ in range(arguments.blocks):
        seen["idle"].append(block(None))
        seen["observing"].append(block(session))
    dist.barrier()
    session.close()
    if rank == 0:
        print(
            f"per iteration, medians of {arguments.blocks} blocks of {arguments.iterations} ({os.cpu_count()} cores):"
        )
        for name, blocks in seen.items():
            middle = Passed(*(statistics.median(values) for values in zip(*blocks, strict=True)))
            blocked_ms = sorted(1e3 * one.blocked_s for one in blocks)
            print(
                f"  {name}: {1e3 * middle.time_s:.1f} ms, running {1e3 * middle.running_s:.2f} ms; waiting "
                f"{statistics.median(blocked_ms):.3f} ms ({blocked_ms[0]:.3f} to {blocked_ms[-1]:.3f}) in "
                f"{middle.waits:.2f} waits; the session's threads compute {1e3 * middle.ours_s:.3f} ms in "
                f"{middle.turns:.1f} turns"
            )


if __name__ == "__main__":
    main()
