"""Trains a small language model with a schedule of torch.distributed.pipelining. Nothing in here knows of the plugin.

PERSEUS_CONFIG=examples/torch_pipelining/perseus.yaml torchrun --nproc-per-node=4 examples/torch_pipelining/train.py

Without a GPU it runs on the CPU, over gloo.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.nn import functional

VOCABULARY, WIDTH, LENGTH = 256, 64, 64
BLOCKS = 8
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # a rank's stages are the ends of a V: the first rank has the first and last


class Block(nn.Module):
    """Attention and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(self.norm2(x))


def part_of_model(stage: int, stages: int) -> nn.Module:
    """What a stage computes: some blocks, and the embedding or the output layer at the ends."""
    torch.manual_seed(stage)
    first, last = BLOCKS * stage // stages, BLOCKS * (stage + 1) // stages
    layers: list[nn.Module] = [Block() for _ in range(first, last)]
    if stage == 0:
        layers.insert(0, nn.Embedding(VOCABULARY, WIDTH))
    if stage == stages - 1:
        layers += [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)]
    return nn.Sequential(*layers)


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", default="1F1B", help="1F1B, Interleaved1F1B, ZBVZeroBubble, ...")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)

    schedule_class = get_schedule_class(arguments.schedule)
    is_single = issubclass(schedule_class, PipelineScheduleSingle)
    numbers, stages_in_all = [rank], ranks
    if not is_single:
        stages_in_all = 2 * ranks
        numbers.append(stages_in_all - 1 - rank if arguments.schedule in V_SHAPED else rank + ranks)
    parts = [part_of_model(number, stages_in_all).to(device) for number in numbers]
    stages = [PipelineStage(p, n, stages_in_all, device) for p, n in zip(parts, numbers, strict=True)]
    given: Any = stages[0] if is_single else stages
    schedule: Any = schedule_class(given, arguments.microbatches, loss_fn=loss_of)

    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in parts]
    generator = torch.Generator().manual_seed(1)
    began_s = time.monotonic()
    for step in range(arguments.steps):
        start = torch.randint(VOCABULARY, (2 * arguments.microbatches, 1), generator=generator)
        tokens = ((start + torch.arange(LENGTH + 1)) % VOCABULARY).to(device)  # to be learned: count up
        losses: list[torch.Tensor] = []
        inputs = (tokens[:, :-1],) if 0 in numbers else ()
        targets = {"target": tokens[:, 1:].contiguous(), "losses": losses} if stages_in_all - 1 in numbers else {}
        schedule.step(*inputs, **targets)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if losses and (step + 1) % 10 == 0:
            mean = torch.stack(losses).mean().item()
            print(
                f"step {step + 1}: loss {mean:.4f}, {(time.monotonic() - began_s) / (step + 1):.3f} s per step",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
