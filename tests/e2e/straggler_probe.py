"""A training script whose GPUs become slow and recover.

Every rank writes what its iterations took into `facts<rank>.json` in the current folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

import perseus_plugin
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.e2e.probe import batches, layers, loss

OUT = Path("out")


def report(rank: int, slowdown: float) -> None:
    """Tell the job: on the command line that a rank is slow, from Python that it is not any more."""
    if slowdown == 1:
        assert perseus_plugin.report_straggler(rank=rank, slowdown=slowdown, source="cli")
    else:
        command = [sys.executable, "-m", "perseus_plugin.cli.main", "straggler"]
        command += ["report", "--job", str(OUT), "--rank", str(rank), "--slowdown", str(slowdown)]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--slow-rank", type=int, default=-1)
    parser.add_argument("--slow-at", type=int, default=-1)
    parser.add_argument("--recover-at", type=int, default=-1)
    parser.add_argument("--slowdown", type=float, default=1.25)
    parser.add_argument("--report", action="store_true", help="report it too, from the last rank")
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = PipelineModule(
        layers=layers(), num_stages=arguments.stages, loss_fn=loss, activation_checkpoint_interval=1
    )
    engine, _, _, _ = deepspeed.initialize(args=arguments, model=module, model_parameters=module.parameters())
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = batches(engine.train_micro_batch_size_per_gpu())
    path = OUT / "emulated_gpus" / f"rank{rank}"
    gpu = EmulatedGpu(path) if path.exists() else None
    losses, began_s, energy_j = [], [], []
    for step in range(arguments.steps):
        change = {arguments.slow_at: arguments.slowdown, arguments.recover_at: 1.0}.get(step)
        if change is not None and gpu is not None:
            if rank == arguments.slow_rank:
                gpu.set_slowdown(change)
            if rank == ranks - 1 and arguments.report:
                report(arguments.slow_rank, change)
        began_s.append(time.monotonic())
        energy_j.append(0.0 if gpu is None else gpu.exact_energy_j())
        losses.append(engine.train_batch(data).item())
    facts = {"losses": losses, "began_s": began_s, "energy_j": energy_j}
    Path(f"facts{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
