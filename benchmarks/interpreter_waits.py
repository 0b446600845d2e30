"""How long a training thread waits for the interpreter as a session's threads have it.

Rank 0 of two is looked at. Its training thread only computes: many small operations of torch, each of which lets go of
Python's interpreter lock, as those of a real training step do. So all time in which it neither runs nor is ready to run
it waits for the interpreter; being disturbed by other programs is counted apart, by the kernel. The other rank sleeps.
Printed per iteration: without a session, with one that sees no iteration, and with one that sees all.

    torchrun --nproc-per-node 2 benchmarks/interpreter_waits.py

With `--counted` rank 0 sleeps as well, so that nobody waits, and iterations take what they take whatever else the
machine does. Printed is what each of the session's threads does per second: while a job observes, while it profiles
emulated GPUs, and while it follows its plan.

    torchrun --nproc-per-node 2 benchmarks/interpreter_waits.py --counted
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
MOST_BLOCKS = 30  # that a busy machine may take until there is a plan


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


class Turns(NamedTuple):
    """Processor time of the session's threads, and how often these began to compute; by name, and from whenever on."""

    time_s: float
    ours: dict[str, tuple[float, float]]

    @classmethod
    def so_far(cls) -> Turns:
        """Until now."""
        ours: dict[str, tuple[float, float]] = {}
        for thread in threading.enumerate():
            if thread.name.startswith("perseus"):
                running_s, _, turns = _of(thread.native_id)
                before_s, before = ours.get(thread.name, (0.0, 0.0))
                ours[thread.name] = before_s + running_s, before + turns
        return cls(time.monotonic(), ours)

    def since(self, before: Turns) -> dict[str, tuple[float, float]]:
        """Of a second, without threads that have ended meanwhile."""
        over_s = self.time_s - before.time_s
        then = {name: before.ours.get(name, (0.0, 0.0)) for name in self.ours}
        return {
            name: ((running_s - then[name][0]) / over_s, (turns - then[name][1]) / over_s)
            for name, (running_s, turns) in self.ours.items()
        }


class Stage:
    """A rank's work: on rank 0 it computes unless all sleep, elsewhere it sleeps."""

    def __init__(self, rank: int, sleeps: bool) -> None:
        self._rank, self._operations, self._sleeps, self.is_emulated = rank, 0, sleeps, False
        self._input, self._weight = torch.randn(64, 256), torch.randn(256, 256)
        begin_s = time.thread_time()
        for _ in range(1000):
            self._operate()
        self._operations = max(1, round(FORWARD_S / ((time.thread_time() - begin_s) / 1000)))

    def _operate(self) -> None:
        torch.nn.functional.gelu(self._input @ self._weight)

    def _compute(self, kind: str) -> None:
        amount = 2 if kind == "backward" else 1
        if self.is_emulated:  # it takes its time all the same
            return
        if self._sleeps:
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


def counted(stage: Stage, place: Placement, blocks: int, iterations: int) -> None:
    """Print what the session's threads do per second, whatever the training thread does."""
    shares = [0.8, 1.0]
    emulation = {
        "forward_time_s": [FORWARD_S * share for share in shares],
        "backward_time_s": [2 * FORWARD_S * share for share in shares],
    }
    seen: dict[str, list[dict[str, tuple[float, float]]]] = {}

    def block(session: PipelineSession, name: str) -> None:
        before = Turns.so_far()
        for _ in range(iterations):
            stage.iterate(session)
            dist.barrier()
        seen.setdefault(name, []).append(Turns.so_far().since(before))

    for backend in ("off", "emulated"):
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        stage.is_emulated = backend == "emulated"
        # On a busy machine iterations take longer than they should; the plan is followed all the same.
        keeps = {
            "slowdown": 0.2,
            "margin": 0.0,
            "effort": "quick",
            "refine_s": 0.0,
            "profiling": {"clock_count": 3, "max_relative_error": 0.9, "max_time_error": 0.9},
            "watch": {"tolerance": 10, "max_replans": 1000},
        }
        settings = {"gpu": {"backend": backend}, "output_dir": folder[0], "log_level": "error"}
        session = start_session(
            parse_config({**settings, **({"emulation": emulation, **keeps} if stage.is_emulated else {})}), place
        )
        if not stage.is_emulated:
            block(session, "at first")
            for _ in range(blocks):
                block(session, "observing")
        else:
            has_plan, left = [False], MOST_BLOCKS
            while not has_plan[0] and left:
                block(session, "in the sweep, and until there is a plan")
                has_plan, left = [Path(folder[0], "plan.json").exists()], left - 1
                dist.broadcast_object_list(has_plan)
            if has_plan[0]:
                block(session, "until all follow it")
            for _ in range(blocks if has_plan[0] else 0):
                block(session, "following a plan")
        dist.barrier()
        session.close()
    if place.leads:
        print(f"per second, rank 0, means of blocks of {iterations} iterations of about {1e3 * ITERATION_S:.0f} ms:")
        for name, of in seen.items():
            threads = sorted({thread for one in of for thread in one})
            each = {
                thread: [sum(one.get(thread, (0.0, 0.0))[which] for one in of) / len(of) for which in (0, 1)]
                for thread in threads
            }
            each["all"] = [sum(one[which] for one in each.values()) for which in (0, 1)]
            print(f"  {name} ({len(of)} blocks)")
            for thread, (running_s, turns) in each.items():
                print(f"    {thread:20} {1e3 * running_s:6.2f} ms in {turns:5.1f} turns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="of each sort")
    parser.add_argument("--iterations", type=int, default=60, help="per block, of 0.1 s of computing")
    parser.add_argument("--counted", action="store_true", help="sleep, and count what threads do")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stage = Stage(rank, sleeps=arguments.counted or rank > 0)
    place = Placement(rank=rank, world_size=STAGES, stage=rank, stages=STAGES, replica=0, local_rank=rank, device="cpu")
    if arguments.counted:
        counted(stage, place, arguments.blocks, arguments.iterations)
        return

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
