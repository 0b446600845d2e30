"""Megatron: from `--perseus` on its command line to a session that follows its schedules.

`arguments.py` has the flags, `hooks.py` what runs in Megatron's place, `schedule.py` the instruction streams, and
`metrics.py` what goes to its writers. Here a job is looked at: what it is, where its ranks sit, and whether it can be
controlled.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from perseus_plugin.exchange.messages import Placement
from perseus_plugin.integrations.base import (
    PipelineSession,
    is_first_of_machine,
    local_rank,
    model_digest,
    rank_in_front,
    start_session,
    started,
)
from perseus_plugin.integrations.megatron.hooks import BRACKETS, Hooks, Schedule
from perseus_plugin.integrations.megatron.metrics import Metrics, metrics_of
from perseus_plugin.integrations.megatron.schedule import Shape, supports_waiting_for_sends
from perseus_plugin.integrations.megatron.stragglers import listen

if TYPE_CHECKING:
    from perseus_plugin.config import PerseusConfig

logger = logging.getLogger(__name__)

_PIPELINE = "megatron.core.pipeline_parallel"
_MODEL_FACTS = (
    "micro_batch_size",
    "seq_length",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "params_dtype",
    "fp8",
    "fp4",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "transformer_impl",
    "attention_backend",
    "cuda_graph_impl",
)
FULL_ITERATION = "full_iteration"
_installed: tuple[Hooks, _Job] | None = None


def install(config: PerseusConfig, arguments: argparse.Namespace) -> Hooks | None:
    """Hook Megatron's schedules; the session starts with the first training iteration.

    Once only, however often a script parses its arguments: those parsed last count, until the session starts. Once the
    hooks are gone for good, a job that starts anew in this process is hooked anew.

    Args:
        config: enabled.
        arguments: Megatron's own, as parsed; read again when the session starts, when Megatron has completed them.

    Returns:
        The hooks, None for a job that cannot be controlled. Then it has been said why, and nothing is hooked.
    """
    global _installed
    if _installed is not None and not _installed[0].removed:
        hooks, job = _installed
        job.parsed(config, arguments)
        return hooks
    job = _Job(config, arguments)
    hooks = Hooks(job.start, job.schedule_of, job.after_iteration)
    try:
        reason = why_not(arguments) or _why_no_graph(config, arguments)
        if reason:
            say_off(reason)
            return None
        _put(hooks, arguments)
    except Exception as error:
        hooks.remove()
        say_off(f"megatron-core cannot be hooked: {error!r}", everywhere=True)
        return None
    _installed = hooks, job
    return hooks


def _put(hooks: Hooks, arguments: argparse.Namespace) -> None:
    schedules = importlib.import_module(f"{_PIPELINE}.schedules")
    # Not imported here: a loop of one's own need not have it, and without it schedule functions bracket iterations.
    training = sys.modules.get("megatron.training.training")
    combined = sys.modules.get(f"{_PIPELINE}.combined_1f1b")
    put_around(hooks, schedules, training, combined)
    try:
        wrapper = importlib.import_module("megatron.core.full_cuda_graph").FullCudaGraphWrapper
    except Exception:  # older versions have none
        if _cuda_graph(arguments) == FULL_ITERATION:
            raise
    else:  # a loop of one's own may use it, whatever the arguments say
        hooks.put(wrapper, "__call__", hooks.full_graph)
    if getattr(arguments, "log_straggler", False):
        listen(importlib.import_module("megatron.core.utils"))


def put_around(hooks: Hooks, schedules: ModuleType, training: ModuleType | None, combined: ModuleType | None) -> None:
    """Put the wrappers into Megatron's modules; those that a version or a loop does not have are None."""
    hooks.put_within(schedules, "forward_step", hooks.forward_step)
    hooks.put_within(schedules, "backward_step", hooks.backward_step)
    for name, interleaved in BRACKETS.items():
        hooks.put(schedules, name, functools.partial(hooks.schedule, interleaved=interleaved))
    if combined is not None:
        hooks.put_within(combined, "combined_forward_backward_step", hooks.combined_step)
    if training is not None:
        hooks.put(training, "train_step", hooks.train_step)


def why_not(settings: Any) -> str:
    """Why a job with these arguments, or this model configuration, cannot be controlled; empty if it can."""
    graph = _cuda_graph(settings)
    if graph and graph != FULL_ITERATION:
        return (
            f"CUDA graphs ({graph}) are not tested on a GPU: waiting for an event in another thread can make a capture "
            "fail"
        )
    if getattr(settings, "hybrid_context_parallel", False):
        return "with --hybrid-context-parallel every microbatch is another piece of work"
    if (getattr(settings, "encoder_pipeline_model_parallel_size", None) or 0) > 0:
        return "an encoder with pipeline stages of its own (--encoder-pipeline-model-parallel-size) is not supported"
    return ""


def _why_no_graph(config: PerseusConfig, settings: Any) -> str:
    """Why a job whose iteration is one CUDA graph is not even hooked; empty if it is, or has none."""
    import torch

    if _cuda_graph(settings) != FULL_ITERATION or config.gpu.verified is not None or not torch.cuda.is_available():
        return ""
    return (
        "a CUDA graph of the full iteration (--cuda-graph-impl or --cuda-graph-scope full_iteration) replays without "
        "Python: clocks of a real GPU are set by host time only where `perseus verify --set-clocks -o FILE.json` has "
        "shown how they change on such a GPU (perseus.gpu.verified)"
    )


def _cuda_graph(settings: Any) -> str:
    """What of a job's settings asks for CUDA graphs, empty if nothing does. Names differ between versions."""
    scope = getattr(settings, "cuda_graph_scope", None)  # of no account by itself, but for the full iteration
    scopes = scope if isinstance(scope, (list, tuple)) else [scope]
    implementation = getattr(settings, "cuda_graph_impl", None) or "none"
    if FULL_ITERATION in (implementation, *(getattr(s, "name", s) for s in scopes)):
        # The optimizer's graph is captured in a mode of which other threads are part.
        return "--optimizer-cuda-graph" if getattr(settings, "optimizer_cuda_graph", False) else FULL_ITERATION
    if implementation != "none":
        return f"--cuda-graph-impl {implementation}"
    # Megatron deletes the first two from its arguments once it has made an implementation of them.
    flags = ("enable_cuda_graph", "external_cuda_graph", "optimizer_cuda_graph")
    return next((f"--{flag.replace('_', '-')}" for flag in flags if getattr(settings, flag, False)), "")


def say_off(reason: str, everywhere: bool = False) -> None:
    """Say that the job goes on without us.

    Args:
        reason: why.
        everywhere: the reason may be one of this machine alone: each machine's first rank says it, not only rank 0.
    """
    if everywhere and is_first_of_machine():
        logger.warning("%sperseus is off: %s; training goes on at full clocks", rank_in_front(), reason)
    elif not everywhere and os.environ.get("RANK", "0") == "0":
        logger.warning("perseus is off: %s; training goes on at full clocks", reason)


class _Job:
    """What hooks want to know of the running job."""

    def __init__(self, config: PerseusConfig, arguments: argparse.Namespace) -> None:
        self.parsed(config, arguments)
        self._schedules: dict[tuple[bool, int, int], Schedule] = {}
        self._metrics: Metrics | None = None

    def parsed(self, config: PerseusConfig, arguments: argparse.Namespace) -> None:
        """What the script's arguments are, which Megatron goes on to complete."""
        self._config, self._arguments = config, arguments

    def start(self, model: list[Any], known: Mapping[str, Any]) -> PipelineSession | None:
        """Start the session.

        Args:
            model: the model chunks of this rank.
            known: what the schedule's call says of the job, for loops without Megatron's arguments.

        Raises:
            ConfigError: something in the configuration does not fit this job.
        """
        self._schedules.clear()  # with another model the pipeline may be another one, too
        return started(lambda: self._start(model, known))

    def _start(self, model: list[Any], known: Mapping[str, Any]) -> PipelineSession | None:
        configuration = _configuration_of(model)
        reasons = (why_not(one) or _why_no_graph(self._config, one) for one in (self._arguments, configuration))
        reason = next(filter(None, reasons), "")
        if reason:
            say_off(reason)
            return None
        where = placement(_device_of(model))
        if where.stages < 2 and self._config.profiling.load is None:
            say_off("it needs pipeline parallelism, and this job has one stage (--pipeline-model-parallel-size)")
            return None
        config = self._config
        if FULL_ITERATION in (_cuda_graph(self._arguments), _cuda_graph(configuration)):
            config = config.model_copy(update={"cuda_graph": True})
        self._metrics = metrics_of(self._arguments, where)
        settings = {**known, **vars(self._arguments)}
        about = samples_per_iteration(settings)
        return start_session(config, where, self._metrics, facts(model, settings), about)

    def schedule_of(self, interleaved: bool, model: list[Any], microbatches: int) -> Schedule:
        """The schedule of the iteration that begins now."""
        known = (interleaved, len(model), microbatches)
        if known not in self._schedules:
            from megatron.core import parallel_state

            shape = shape_of(_configuration_of(model), interleaved, *known[1:])
            self._schedules[known] = Schedule.of(shape, parallel_state.get_pipeline_model_parallel_rank())
        return self._schedules[known]

    def after_iteration(self) -> None:
        """A training iteration has ended."""
        if self._metrics is not None:
            self._metrics.after_iteration()


def shape_of(configuration: Any, interleaved: bool, chunks: int, microbatches: int) -> Shape:
    """The schedule's shape.

    Args:
        configuration: Megatron's `ModelParallelConfig`.
        interleaved: whether the schedule has virtual stages.
        chunks: model chunks on this rank.
        microbatches: of the iteration.
    """
    import megatron.core
    from megatron.core import parallel_state

    stages = int(parallel_state.get_pipeline_model_parallel_world_size())
    pairs = bool(getattr(configuration, "overlap_moe_expert_parallel_comm", False))
    if not interleaved:
        return Shape(stages, microbatches, pairs=pairs)
    waits = supports_waiting_for_sends(megatron.core.__version__)
    return Shape(
        stages,
        microbatches,
        chunks=chunks,
        group_size=int(getattr(configuration, "microbatch_group_size_per_vp_stage", None) or stages),
        overlap=bool(getattr(configuration, "overlap_p2p_comm", False)),
        overlap_ends=bool(getattr(configuration, "overlap_p2p_comm_warmup_flush", False)),
        waits_for_sends=waits and bool(getattr(configuration, "deallocate_pipeline_outputs", False)),
        pairs=pairs,
    )


def placement(device: str) -> Placement:
    """Where this rank sits, from Megatron's own groups.

    Tensor and context parallel ranks work on the same microbatches, and expert parallel ones exchange tokens within
    every layer: all of them run in lock-step, and are shards of one replica. Data parallel groups that are left run at
    a pace of their own.
    """
    import torch.distributed
    from megatron.core import parallel_state

    world_size = torch.distributed.get_world_size()
    stages = int(parallel_state.get_pipeline_model_parallel_world_size())
    dense = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    expert = parallel_state.get_expert_data_parallel_world_size(), parallel_state.get_expert_data_parallel_rank()
    replicas, replica = min(dense, expert)
    return Placement(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        stage=int(parallel_state.get_pipeline_model_parallel_rank()),
        stages=stages,
        replica=int(replica),
        shards=world_size // (stages * replicas),
        local_rank=local_rank(device),
        device=device,
    )


def facts(model: list[Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """What makes this rank's part of the job what it is.

    Args:
        model: the model chunks of this rank.
        settings: Megatron's arguments by name.
    """
    import megatron.core
    import torch

    named = ((f"{number} {name}", p) for number, chunk in enumerate(model) for name, p in chunk.named_parameters())
    return {
        "model": model_digest(named),
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        **{name.replace("_", " "): str(settings.get(name)) for name in _MODEL_FACTS},
    }


def samples_per_iteration(settings: Mapping[str, Any]) -> dict[str, str]:
    """The whole job's samples in an iteration, as a fact of its records; empty where it changes or is not known."""
    size = settings.get("global_batch_size")
    changes = ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
    return {"samples per iteration": str(size)} if size and not any(settings.get(name) for name in changes) else {}


def _device_of(model: list[Any]) -> str:
    import torch

    for chunk in model:
        for parameter in chunk.parameters():
            return str(parameter.device)
    # A stage may have no layer at all.
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _configuration_of(model: list[Any]) -> Any:
    from megatron.core.utils import get_model_config

    return get_model_config(model[0])
