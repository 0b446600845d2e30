"""A training script that looks at its own process: what the plugin put there, and that it trains on through trouble.

Every rank writes `facts<rank>.json` into the current folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn
from torch.nn import functional

from perseus_plugin.gpus.emulated import state

VOCABULARY, WIDTH, LENGTH = 64, 32, 16
MODULES = ("ortools", "pydantic", "perseus_plugin.session.session")


def logits(embedding: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, embedding.weight)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def layers() -> list[Any]:
    """Layers with the embedding tied between the first and the last stage."""
    tied = {"key": "embedding", "typename": nn.Embedding}
    return [
        TiedLayerSpec(**tied, num_embeddings=VOCABULARY, embedding_dim=WIDTH),
        *(Layer() for _ in range(4)),
        TiedLayerSpec(**tied, forward_fn=logits, num_embeddings=VOCABULARY, embedding_dim=WIDTH),
    ]


def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, 1), labels.flatten())


def batches(batch: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    while True:
        tokens = torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gpu_of_rank_1() -> Any:
    from perseus_plugin.gpus.emulated.device import EmulatedGpu

    return EmulatedGpu("gpus/1")


def kill_helper() -> None:
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if b"control.helper" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def fill_disk() -> None:
    """From now on this process can write no byte to any file, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


FAULTS: dict[str, Callable[[], None]] = {
    "helper-killed": kill_helper,
    "gpu-lost": lambda: gpu_of_rank_1().set_faults(state.GPU_LOST),
    "no-permission": lambda: gpu_of_rank_1().set_faults(state.NO_PERMISSION),
    "slow-calls": lambda: gpu_of_rank_1().set_faults(0, call_s=2.0),
    "locks-ignored": lambda: gpu_of_rank_1().set_faults(state.IGNORE_LOCKS),
}


class Said(logging.Handler):
    """Whether the plugin has said these words; all ranks ask at the same step and hear what rank 0 knows."""

    def __init__(self, words: str | None) -> None:
        super().__init__()
        self._words, self._heard = words, False
        logging.getLogger("perseus_plugin").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._heard = self._heard or (self._words is not None and self._words in record.getMessage())

    def everywhere(self) -> bool:
        if self._words is None:
            return False
        heard = torch.tensor([int(self._heard)])
        torch.distributed.broadcast(heard, 0)
        return bool(heard)


def look(engine: Any) -> dict[str, Any]:
    """What of ours is in this process and on this engine."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {
        "stock_map": engine._INSTRUCTION_MAP is type(engine)._INSTRUCTION_MAP,
        "on_engine": sorted(name for name in vars(engine) if "perseus" in name or name == "_exec_schedule"),
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("perseus")),
        "children": len(children),
        "modules": sorted(name for name in MODULES if name in sys.modules),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--change-batch-at", type=int, default=-1, help="step from which on there are 2 more")
    parser.add_argument("--batches-from", help="numbers of microbatches, one of which every step draws: LOW,HIGH")
    parser.add_argument("--enable", help="call perseus_plugin.enable with the block in this JSON file")
    parser.add_argument("--break-tap-at", type=int, default=-1, help="step at which the plugin's tap is sabotaged")
    parser.add_argument("--slow-gpu-at", type=int, default=-1, help="step from which on rank 1's GPU is slower")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="what goes wrong on rank 1 at --fault-at")
    parser.add_argument("--full-disk-at", type=int, default=-1, help="step from which on no file can be written")
    parser.add_argument("--fault-at", type=int, default=30)
    parser.add_argument("--until-said", help="end once the plugin has said this on rank 0, at --steps at the latest")
    parser.add_argument("--raise-at", type=int, default=-1, help="step at which the script itself fails")
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = PipelineModule(layers=layers(), num_stages=2, loss_fn=loss, activation_checkpoint_interval=1)
    engine, _, _, _ = deepspeed.initialize(args=arguments, model=module, model_parameters=module.parameters())
    if arguments.enable:
        import perseus_plugin

        perseus_plugin.enable(engine, arguments.enable)
    data = batches(engine.train_micro_batch_size_per_gpu())
    losses = []
    facts = {"at_start": look(engine)}
    said = Said(arguments.until_said)
    for step in range(arguments.steps):
        if arguments.batches_from:
            low, high = map(int, arguments.batches_from.split(","))
            count = random.Random(step).randint(low, high)
            engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu())
        if step == arguments.change_batch_at:
            engine.set_train_batch_size(engine.train_batch_size() + 2 * engine.train_micro_batch_size_per_gpu())
        if step == arguments.slow_gpu_at and torch.distributed.get_rank() == 1:
            from perseus_plugin.gpus.emulated.device import EmulatedGpu

            EmulatedGpu("out/emulated_gpus/rank1").set_slowdown(1.5)
        if step == arguments.full_disk_at:
            fill_disk()
        if step == arguments.raise_at:
            raise RuntimeError("the training script failed on purpose")
        if arguments.fault and step == arguments.fault_at and torch.distributed.get_rank() == 1:
            FAULTS[arguments.fault]()
        if step == arguments.break_tap_at:
            vars(engine)["_perseus_session"].tap._controller = object()
        losses.append(engine.train_batch(data).item())
        if said.everywhere():
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    facts["at_end"] = look(engine)
    facts["losses"] = losses
    Path(f"facts{torch.distributed.get_rank()}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
