"""What the hooks cost per instruction, beside DeepSpeed's unhooked loop in the same run.

Runs `PipelineEngine._exec_schedule` itself over a real `TrainSchedule`, with instruction functions that do nothing, so
that only the loop and the hooks are left. Blocks of both kinds alternate; the figure is the difference of medians.

    python benchmarks/hook_cost.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import TrainSchedule

from perseus_plugin.control.boundaries import HostBoundaries
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.controller import ClockRequests, Controller
from perseus_plugin.exchange.messages import CatchUpPart
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import A100
from perseus_plugin.integrations.deepspeed.hooks import InstructionChain, _Hook
from perseus_plugin.integrations.deepspeed.schedule import translate
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.session.tap import InstructionTap


class BareEngine:
    """Just enough of an engine for DeepSpeed's own loop."""

    _exec_schedule = PipelineEngine._exec_schedule

    def __init__(self) -> None:
        self._INSTRUCTION_MAP: dict[type, Any] = {}

    def _reserve_pipe_buffers(self, count: int) -> None:
        pass


class NoRequests:
    """Takes requests and does nothing."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        pass


def following(requests: ClockRequests, microbatches: int, late: bool = False) -> InstructionTap:
    """A tap that changes the clock at every instruction, which no plan does; all of them late, if wanted."""
    controller = Controller(requests)
    told = None
    if late:
        clocks = A100.clocks_mhz()[:20]
        told = CatchUpPart(
            latest_starts_s=(0.0,) * (2 * microbatches),
            usual_delays_s=(0.0,) * (2 * microbatches),
            kinds=("forward", "backward") * microbatches,
            options=dict.fromkeys(
                ("forward", "backward"), tuple((clock, 0.03 * clocks[0] / clock, 200.0) for clock in clocks)
            ),
            size_weight=2.0,
        )
    controller.follow([1200, 1410] * microbatches, [0.0353, 0.03] * microbatches, told)
    return InstructionTap(HostBoundaries(), controller, fail)


class Holder:
    """What a hook wants of a session."""

    def __init__(self, tap: InstructionTap) -> None:
        self.tap = tap


def do_nothing(engine: Any, *args: Any, **kwargs: Any) -> None:
    pass


def fail(error: Exception) -> None:
    raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=400)
    arguments = parser.parse_args()
    schedule = TrainSchedule(micro_batches=arguments.microbatches, stages=4, stage_id=1)
    count = sum(len(step) for step in schedule)
    stream = translate(schedule.steps(), 1)
    operations, slots = hooked_operations(stream)
    stock = dict.fromkeys(PipelineEngine._INSTRUCTION_MAP, do_nothing)
    engine = BareEngine()

    def run(tap: InstructionTap | None) -> float:
        engine._INSTRUCTION_MAP = stock
        begin_s = time.perf_counter()
        if tap is None:
            engine._exec_schedule(schedule)
        else:
            tap.arm(IterationRecord(0, operations=operations, slots=slots))
            hooks[tap].expect(stream)
            chain = InstructionChain(engine, hooks[tap])
            engine._exec_schedule(schedule)
            chain.take_out()
            tap.disarm()
        return time.perf_counter() - begin_s

    folder = Path(tempfile.mkdtemp())
    EmulatedGpu.create(folder / "gpu")
    helper = ClockHelper.start(f"emulated:{folder / 'gpu'}")
    helper.wait_ready(10)
    taps = {
        "timestamps only": InstructionTap(HostBoundaries(), None, fail),
        "following a plan, requests dropped": following(NoRequests(), arguments.microbatches),
        "following a plan and always late, requests dropped": following(NoRequests(), arguments.microbatches, True),
        "following a plan, requests to a helper process": following(helper, arguments.microbatches),
    }
    hooks = {tap: _Hook(Holder(tap)) for tap in taps.values()}  # type: ignore[arg-type]
    times: dict[str, list[float]] = {"unhooked": [], **{name: [] for name in taps}}
    for _ in range(arguments.rounds):
        times["unhooked"].append(run(None))
        for name, tap in taps.items():
            times[name].append(run(tap))
        time.sleep(0.005)  # lets the helper catch up: here it gets in a millisecond what a job asks for in seconds
    dropped = helper.dropped
    helper.close()
    unhooked_s = statistics.median(times["unhooked"])
    print(f"unhooked loop: {1e6 * unhooked_s / count:.2f} us per instruction of the schedule ({count} instructions)")
    for name in taps:
        extra = [a - b for a, b in zip(times[name], times["unhooked"], strict=True)]
        low, _, high = statistics.quantiles(extra, n=4)
        per_hook = 1e6 / len(operations)
        print(
            f"{name}: +{per_hook * statistics.median(extra):.2f} us per hooked instruction "
            f"(quartiles {per_hook * low:.2f} to {per_hook * high:.2f}; {len(operations)} hooked)"
        )
    print(f"requests that did not fit into the pipe: {dropped}")


if __name__ == "__main__":
    main()
