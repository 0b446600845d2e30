"""Runs Megatron's own schedule functions, hooked, stage by stage in one process, beside our instruction streams.

Everything of a schedule is Megatron's but three things: a forward, a backward and a transfer do nothing but note that
they happened. The process group is torch's fake one. Prints one line of JSON: the version, how many streams were the
same, and the differences.

    PYTHONPATH=REPOSITORY python megatron_probe.py FOLDER_OF_THE_VERSION
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from tests.megatron_support import cuda_on_cpu

sys.path.insert(0, sys.argv[1])
cuda_on_cpu.install()

import megatron.core  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import p2p_communication, schedules  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from perseus_plugin.integrations.megatron import adapter as integration  # noqa: E402
from perseus_plugin.integrations.megatron.hooks import Hooks, Schedule  # noqa: E402
from perseus_plugin.integrations.megatron.schedule import Shape, ids, stream  # noqa: E402
from perseus_plugin.iteration.instructions import StreamOp  # noqa: E402
from perseus_plugin.iteration.stage_program import StageProgram  # noqa: E402

try:
    from megatron.core.pipeline_parallel import combined_1f1b
except ImportError:
    combined_1f1b = None

SAME_FOR_ALL = {"num_layers": 8, "hidden_size": 8, "num_attention_heads": 1, "pipeline_dtype": torch.float32}


def shapes() -> Iterator[tuple[Shape, bool]]:
    """Shapes to try, and whether outputs are deallocated."""
    for stages in (1, 2, 3, 4):
        for microbatches in (1, 2, 4, 6):
            yield Shape(stages, microbatches), True
    for stages, microbatches, chunks, group_size in (
        (2, 2, 2, 2),
        (2, 4, 2, 2),
        (2, 6, 2, 4),
        (2, 5, 3, 3),
        (3, 6, 2, 3),
        (4, 4, 2, 4),
        (4, 8, 2, 4),
        (4, 14, 3, 5),
    ):
        for overlap, overlap_ends in ((False, False), (True, False), (True, True)):
            for deallocate in (False, True):
                yield Shape(stages, microbatches, chunks, group_size, overlap, overlap_ends), deallocate
    if hasattr(combined_1f1b, "combined_forward_backward_step"):
        yield Shape(1, 1, pairs=True), False
        yield Shape(1, 4, pairs=True), False
        yield Shape(2, 4, 2, 2, overlap=True, pairs=True), False
        yield Shape(4, 8, 2, 4, overlap=True, pairs=True), False
        yield Shape(4, 8, 2, 4, pairs=True), False


class Transfers:
    """Stands in for the transfers: notes what is posted and waited for."""

    def __init__(self, shape: Shape, stage: int) -> None:
        self.program = StageProgram(shape.stages, stage)
        self.unfinished: list[str] = []

    def communicate(self, *_: Any, **call: Any) -> tuple[Any, Any, Any]:
        waits = call.get("wait_on_reqs", True)
        sends = {"activation": call["tensor_send_next"] is not None, "gradient": call["tensor_send_prev"] is not None}
        receives = {"activation": call["recv_prev"], "gradient": call["recv_next"]}
        sent = [channel for channel, is_sent in sends.items() if is_sent]
        received = [channel for channel, is_received in receives.items() if is_received]
        handles: Any = None
        if waits:
            self.program.exchange(sent, received)
        else:
            handles = self._post(sent, received)
        tensors = [torch.zeros(1) if receives[channel] else None for channel in ("activation", "gradient")]
        return tensors[0], tensors[1], handles

    def _post(self, sent: Sequence[str], received: Sequence[str]) -> dict[str, Any]:
        handles = {}
        for channel in sent:
            self.program.post_send(channel)
            self.unfinished.append(channel)
            name = "send_next" if channel == "activation" else "send_prev"
            handles[name] = SimpleNamespace(wait=lambda channel=channel: self._sent(channel))
        for channel in received:
            self.program.post_receive(channel)
            name = "recv_prev" if channel == "activation" else "recv_next"
            handles[name] = SimpleNamespace(wait=lambda channel=channel: self.program.wait_receive(channel))
        return handles

    def _sent(self, channel: str) -> None:
        if channel in self.unfinished:
            self.unfinished.remove(channel)
            self.program.wait_send(channel)

    def finished(self) -> list[StreamOp]:
        for channel in sorted(self.unfinished):
            self.program.wait_send(channel)
        return self.program.operations


class FakeSession:
    """What hooks need of a session; instructions go where transfers are noted."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self.expected: list[Any] = []
        self.at = 0
        self.evaluations = 0
        self.tap = SimpleNamespace(begin=self._begin, end=lambda: None)

    def begin_schedule(self, key: str, stream_of: Any) -> bool:
        self.expected = ids(stream_of(parallel_state.get_pipeline_model_parallel_rank()))
        return True

    def _begin(self) -> None:
        if self.at < len(self.expected):
            self.transfers.program.compute(*self.expected[self.at])
        self.at += 1

    def evaluation(self) -> None:
        self.evaluations += 1

    def begin_iteration(self) -> None: ...
    def end_schedule(self) -> None: ...
    def end_iteration(self) -> None: ...
    def on_close(self, callback: Any) -> None: ...
    def close(self) -> None: ...


class Chunk(torch.nn.Module):
    """A model chunk, as far as schedules look at it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model_type = ModelType.encoder_or_decoder


@functools.wraps(schedules.forward_step)
def forward(*args: Any, **kwargs: Any) -> Any:
    takes_list = isinstance(args[4], list)
    output = torch.zeros(1)
    return ([output] if takes_list else output), torch.zeros([], dtype=torch.int)


@functools.wraps(schedules.backward_step)
def backward(input_tensor: Any, *_: Any, **__: Any) -> Any:
    return [torch.zeros(1)] if isinstance(input_tensor, list) else torch.zeros(1)


STOCK_COMBINED = getattr(combined_1f1b, "combined_forward_backward_step", None)


@functools.wraps(STOCK_COMBINED or forward)
def combined(*args: Any, **kwargs: Any) -> Any:
    """As `combined_forward_backward_step` does: transfers around what is computed."""
    call = inspect.signature(STOCK_COMBINED).bind(*args, **kwargs).arguments
    output = torch.zeros(1) if call["f_model"] is not None else None
    gradient = torch.zeros(1) if call["b_model"] is not None else None
    for name, arguments in (
        ("pre_forward", ()),
        ("pre_backward", ()),
        ("post_forward", (output,)),
        ("post_backward", (gradient,)),
    ):
        if call.get(name) is not None:
            call[name](*arguments)
    return output, torch.zeros([], dtype=torch.int), gradient


def run(shape: Shape, stage: int, deallocate: bool) -> str:
    """Run one stage; returns what is different, nothing if all is the same."""
    dist.init_process_group("fake", store=FakeStore(), rank=stage, world_size=shape.stages)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=shape.stages,
        virtual_pipeline_model_parallel_size=shape.chunks,
        create_gloo_process_groups=False,
    )
    try:
        return difference(shape, stage, deallocate)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def difference(shape: Shape, stage: int, deallocate: bool) -> str:
    settings = {
        **SAME_FOR_ALL,
        "pipeline_model_parallel_size": shape.stages,
        "virtual_pipeline_model_parallel_size": shape.chunks,
        "microbatch_group_size_per_vp_stage": shape.group_size or None,
        "overlap_p2p_comm": shape.overlap,
        "overlap_p2p_comm_warmup_flush": shape.overlap_ends,
        "batch_p2p_comm": not shape.overlap,
        "deallocate_pipeline_outputs": deallocate,
    }
    config = TransformerConfig(**settings)
    if shape.pairs:
        config.overlap_moe_expert_parallel_comm = True  # its constructor asks for experts and CUDA
    model = [Chunk(config) for _ in range(shape.chunks or 1)]
    transfers = Transfers(shape, stage)
    session = FakeSession(transfers)

    def schedule_of(interleaved: bool, chunks: list[Any], microbatches: int) -> Schedule:
        made = integration.shape_of(config, interleaved, len(chunks), microbatches)
        assert interleaved == (shape.chunks is not None)
        return Schedule.of(made, stage)

    job = SimpleNamespace(start=lambda chunks, known: session, schedule_of=schedule_of, after_iteration=lambda: None)
    stock = put_stand_ins(transfers)
    hooks = Hooks(job.start, job.schedule_of, job.after_iteration)
    integration.put_around(hooks, schedules, None, combined_1f1b)
    try:
        call = {
            "forward_step_func": None,
            "data_iterator": [None] * len(model),
            "model": model,
            "num_microbatches": shape.microbatches,
            "seq_length": 4,
            "micro_batch_size": 1,
        }
        schedules.get_forward_backward_func()(**call, forward_only=False)
    finally:
        hooks.remove()
        for module, name, function in stock:
            setattr(module, name, function)
    made = integration.shape_of(config, shape.chunks is not None, len(model), shape.microbatches)
    expected, seen = stream(made, stage)[:-1], transfers.finished()
    if seen == expected:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(seen, expected, strict=False)) if a != b), min(len(seen), len(expected))
    )
    return f"operation {at}: Megatron {seen[at : at + 3]}, ours {expected[at : at + 3]}"


def put_stand_ins(transfers: Transfers) -> list[tuple[Any, str, Any]]:
    """Put them in place; returns what stood there."""
    communicator = getattr(p2p_communication, "P2PCommunicator", p2p_communication)
    stand_ins = [
        (schedules, "forward_step", forward),
        (schedules, "backward_step", backward),
        (communicator, "_communicate", transfers.communicate),
    ]
    if STOCK_COMBINED is not None:
        stand_ins.append((combined_1f1b, "combined_forward_backward_step", combined))
        stand_ins.append((combined_1f1b, "set_streams", lambda *args, **kwargs: None))
    stock = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
    for module, name, function in stand_ins:
        setattr(
            module,
            name,
            staticmethod(function) if module is communicator and communicator is not p2p_communication else function,
        )
    return stock


def main() -> None:
    torch.cuda.current_stream = lambda *args: None  # type: ignore[assignment]
    same, differences = 0, []
    for shape, deallocate in shapes():
        for stage in range(shape.stages):
            try:
                found = run(shape, stage, deallocate)
            except AssertionError as error:
                found = f"Megatron fails: {error}"
            same += not found
            if found:
                differences.append(f"{shape.key} deallocate={deallocate} stage {stage}: {found}")
    print(json.dumps({"version": megatron.core.__version__, "same": same, "differences": differences}))


if __name__ == "__main__":
    main()
