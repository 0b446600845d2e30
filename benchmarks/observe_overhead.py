"""Iteration time with the plugin observing against without it, in one real job.

A pipeline of real processes trains without emulation. Blocks of iterations with and without the plugin's hooks on the
engine alternate in random order; printed is the ratio of iteration times per pair of neighbouring blocks.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 benchmarks/observe_overhead.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

import perseus_plugin

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deepspeed_gpt"))
from data import microbatches, standard_library_text
from model import gpt_layers, loss_fn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--block", type=int, default=10, help="iterations per block")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--own-core", action="store_true", help="all blocks in the first stage: the other core is free for threads"
    )
    arguments = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    stages = torch.distributed.get_world_size()
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
    block = {"gpu": {"backend": "off"}, "output_dir": tempfile.mkdtemp(), "log_level": "warning"}
    perseus_plugin.enable(engine, block)
    hooks = {name: vars(engine)[name] for name in ("train_batch", "_exec_schedule")}
    data = microbatches(standard_library_text(), length=64, batch=2, seed=1)

    def run_block(hooked: bool) -> float:
        for name, hook in hooks.items():
            vars(engine).pop(name, None)
            if hooked:
                vars(engine)[name] = hook
        engine.train_batch(data)
        begin_s = time.perf_counter()
        for _ in range(arguments.block):
            engine.train_batch(data)
        return (time.perf_counter() - begin_s) / arguments.block

    run_block(False)
    order = random.Random(0)
    ratios, plain = [], []
    for _ in range(arguments.pairs):
        first = order.random() < 0.5
        times = {hooked: run_block(hooked) for hooked in ((True, False) if first else (False, True))}
        ratios.append(times[True] / times[False])
        plain.append(times[False])
    if torch.distributed.get_rank() == 0:
        median = statistics.median(ratios)
        resampled = sorted(statistics.median(order.choices(ratios, k=len(ratios))) for _ in range(2000))
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"iteration without the plugin: {1e3 * statistics.median(plain):.1f} ms ({stages} stages)")
        print(
            f"observing / without: {median:.4f} (95 % interval of the median {resampled[50]:.4f} to "
            f"{resampled[-51]:.4f}; quartiles of single pairs {low:.4f} to {high:.4f}; {len(ratios)} pairs)"
        )


if __name__ == "__main__":
    main()
