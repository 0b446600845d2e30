"""Train a small GPT with DeepSpeed pipeline parallelism.

There is nothing about perseus in this script: the `perseus` block in the DeepSpeed config is enough.

    cd examples/deepspeed_gpt
    torchrun --nproc-per-node 4 train.py --deepspeed_config quickstart.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pipeline stages share this machine's cores

import deepspeed
import torch
from data import microbatches, standard_library_text
from deepspeed.pipe import PipelineModule
from model import gpt_layers, loss_fn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="characters per sample")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--evaluate-every", type=int, default=0, help="steps between evaluations; 0: never")
    parser.add_argument("--losses", help="write losses and a hash of the final parameters to this JSON file")
    return deepspeed.add_config_arguments(parser).parse_args()


def parameter_hash(engine: deepspeed.PipelineEngine) -> str:
    """A hash over all ranks' parameters, bit by bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(engine.module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digests: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    return hashlib.sha256("".join(map(str, digests)).encode()).hexdigest()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # On a CPU there is nothing to compile; DeepSpeed would try for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.manual_seed(arguments.seed)
    layers = gpt_layers(
        blocks=arguments.blocks,
        width=arguments.width,
        heads=arguments.heads,
        vocabulary=256,
        length=arguments.length,
    )
    module = PipelineModule(
        layers=layers,
        num_stages=arguments.stages,
        loss_fn=loss_fn,
        partition_method="uniform",
        activation_checkpoint_interval=1 if arguments.checkpoint_activations else 0,
    )
    engine, _, _, _ = deepspeed.initialize(args=arguments, model=module, model_parameters=module.parameters())
    text = standard_library_text()
    batches = microbatches(
        text,
        length=arguments.length,
        batch=engine.train_micro_batch_size_per_gpu(),
        seed=arguments.seed,
        replica=engine.grid.get_data_parallel_id(),
    )
    held_out = microbatches(text, length=arguments.length, batch=engine.train_micro_batch_size_per_gpu(), seed=99)
    losses = []
    for step in range(arguments.steps):
        losses.append(engine.train_batch(batches).item())
        if arguments.evaluate_every and (step + 1) % arguments.evaluate_every == 0:
            losses.append(engine.eval_batch(held_out).item())
    digest = parameter_hash(engine)
    if arguments.losses and torch.distributed.get_rank() == 0:
        Path(arguments.losses).write_text(json.dumps({"losses": losses, "parameters": digest}))


if __name__ == "__main__":
    main()
