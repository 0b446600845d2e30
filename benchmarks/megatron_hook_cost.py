"""What the hooks cost per instruction, beside Megatron's unhooked schedule in the same run.

Runs megatron-core's own 1F1B function as the second of four stages. Forwards, backwards and transfers do nothing, so
that only the schedule and the hooks are left. Rounds of both kinds alternate; the figure is the median difference.
Needs no GPU: the tests' stand-ins for CUDA take its place.

    python benchmarks/megatron_hook_cost.py
"""

# ruff: noqa: E402 (the stand-ins come before Megatron)
from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.megatron_support import cuda_on_cpu

cuda_on_cpu.install()

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from perseus_plugin.control.boundaries import HostBoundaries
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.controller import ClockRequests, Controller
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.integrations.megatron.adapter import put_around, shape_of
from perseus_plugin.integrations.megatron.hooks import Hooks, Schedule
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.session.tap import InstructionTap

STAGES, STAGE = 4, 1


class BareSession:
    """What hooks need of a session: its tap, armed for every iteration."""

    def __init__(self, tap: InstructionTap) -> None:
        self.tap = tap

    def begin_schedule(self, key: str, stream_of: Callable[[int], Any]) -> bool:
        operations, slots = _operations(key, stream_of)
        self.tap.arm(IterationRecord(0, operations=operations, slots=slots))
        return True

    def begin_iteration(self) -> None: ...
    def end_schedule(self) -> None: ...
    def end_iteration(self) -> None: ...
    def evaluation(self) -> None: ...
    def on_close(self, callback: Callable[[], None]) -> None: ...
    def close(self) -> None: ...


class BareJob:
    """What hooks want to know of a job."""

    def __init__(self, tap: InstructionTap) -> None:
        self._session = BareSession(tap)
        self._known: dict[int, Schedule] = {}

    def start(self, *_: Any) -> Any:
        return self._session

    def schedule_of(self, interleaved: bool, model: list[Any], microbatches: int) -> Schedule:
        if microbatches not in self._known:
            self._known[microbatches] = Schedule.of(shape_of(model[0].config, False, 1, microbatches), STAGE)
        return self._known[microbatches]

    def after_iteration(self) -> None: ...


class NoRequests:
    """Takes requests and does nothing."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None: ...


_known_operations: dict[str, Any] = {}


def _operations(key: str, stream_of: Callable[[int], Any]) -> Any:
    if key not in _known_operations:
        _known_operations[key] = hooked_operations(stream_of(STAGE))
    return _known_operations[key]


def following(requests: ClockRequests, microbatches: int) -> InstructionTap:
    """A tap that changes the clock at every instruction, which no plan does."""
    controller = Controller(requests)
    controller.follow([1410, 1005] * microbatches, [0.03] * (2 * microbatches))
    return InstructionTap(HostBoundaries(), controller, fail)


def fail(error: Exception) -> None:
    raise error


def put_stand_ins() -> None:
    """Instructions and transfers that do nothing."""
    output, tokens, received = torch.zeros(1), torch.zeros([], dtype=torch.int), torch.zeros(1)

    @functools.wraps(schedules.forward_step)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return [torch.zeros(1)], tokens

    @functools.wraps(schedules.backward_step)
    def backward(*args: Any, **kwargs: Any) -> Any:
        return [output]

    def communicate(*_: Any, recv_prev: bool, recv_next: bool, **__: Any) -> Any:
        return received if recv_prev else None, received if recv_next else None, None

    communicator: Any = getattr(p2p_communication, "P2PCommunicator", None)
    if communicator is None:
        vars(p2p_communication)["_communicate"] = communicate
    else:
        communicator._communicate = staticmethod(communicate)
    vars(schedules).update(forward_step=forward, backward_step=backward)


def model() -> torch.nn.Module:
    """A model, as far as the schedule looks at it."""
    made: Any = torch.nn.Module()
    made.config = TransformerConfig(
        num_layers=STAGES,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=STAGES,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,
    )
    made.model_type = ModelType.encoder_or_decoder
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    dist.init_process_group("fake", store=FakeStore(), rank=STAGE, world_size=STAGES)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES, create_gloo_process_groups=False)
    put_stand_ins()
    chunks = [model()]

    def iteration(job: BareJob | None) -> float:
        hooks: Hooks | None = None
        if job is not None:
            hooks = Hooks(job.start, job.schedule_of, job.after_iteration)
            put_around(hooks, schedules, None, None)
        run = schedules.get_forward_backward_func()
        begin_s = time.perf_counter()
        run(
            forward_step_func=None,
            data_iterator=[None],
            model=chunks,
            num_microbatches=arguments.microbatches,
            seq_length=4,
            micro_batch_size=1,
            forward_only=False,
        )
        took_s = time.perf_counter() - begin_s
        if hooks is not None:
            hooks.remove()
        return took_s

    folder = Path(tempfile.mkdtemp())
    EmulatedGpu.create(folder / "gpu")
    helper = ClockHelper.start(f"emulated:{folder / 'gpu'}")
    helper.wait_ready(10)
    jobs = {
        "timestamps only": BareJob(InstructionTap(HostBoundaries(), None, fail)),
        "following a plan, requests dropped": BareJob(following(NoRequests(), arguments.microbatches)),
        "following a plan, requests to a helper process": BareJob(following(helper, arguments.microbatches)),
    }
    times: dict[str, list[float]] = {"unhooked": [], **{name: [] for name in jobs}}
    for _ in range(arguments.rounds):
        times["unhooked"].append(iteration(None))
        for name, job in jobs.items():
            times[name].append(iteration(job))
        time.sleep(0.005)  # lets the helper catch up: here it gets in a millisecond what a job asks for in seconds
    dropped = helper.dropped
    helper.close()
    count = 2 * arguments.microbatches
    unhooked_us = 1e6 * statistics.median(times["unhooked"]) / count
    print(f"megatron-core {megatron.core.__version__}, {count} instructions per iteration")
    print(f"unhooked schedule: {unhooked_us:.2f} us per instruction")
    for name in jobs:
        extra = [1e6 / count * (a - b) for a, b in zip(times[name], times["unhooked"], strict=True)]
        low, _, high = statistics.quantiles(extra, n=4)
        print(f"{name}: +{statistics.median(extra):.2f} us per instruction (quartiles {low:.2f} to {high:.2f})")
    print(f"requests that did not fit into the pipe: {dropped}")


if __name__ == "__main__":
    main()
