"""A loop around megatron-core's schedules alone, for versions whose package has no `megatron.training`.

Trains a small GPT as `pretrain_gpt.py` does, with torch's SGD and without data parallelism, in any version from 0.12.
`--perseus` and the flags beside it are there as in Megatron's parser.
"""

# ruff: noqa: E402 (the stand-ins come before Megatron)
from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda_on_cpu

cuda_on_cpu.install()
# Another version of Megatron may be installed beside the one under test, and `megatron` is a namespace package.
sys.modules["megatron.training"] = None  # type: ignore[assignment]

import results
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, WIDTH, LENGTH = 64, 32, 32
_LOSSES: list[float] = []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=2)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=1, help="model chunks per rank")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--train-iters", type=int, default=20)
    parser.add_argument("--evaluate-every", type=int, default=0, help="iterations between forward-only ones; 0: none")
    parser.add_argument("--results", required=True, help="write losses and parameter hashes to this JSON file")
    results.Ending.add_arguments(parser)
    try:
        from perseus_plugin.integrations.megatron import add_arguments
    except ImportError:
        pass
    else:
        parser = add_arguments(parser)
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> list[GPTModel]:
    """The model chunks of this rank."""
    stages, chunks = arguments.pipeline_model_parallel_size, arguments.chunks
    config = TransformerConfig(
        num_layers=4,
        hidden_size=WIDTH,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_dtype=torch.float32,
        # Batched sends and receives between the same two ranks get mixed up by gloo.
        batch_p2p_comm=False,
        overlap_p2p_comm=chunks > 1,
        # Older versions free a tensor that gloo has yet to send when sends overlap with compute.
        deallocate_pipeline_outputs=chunks == 1,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    models = []
    for chunk in range(chunks):
        version = {"vp_stage": chunk if chunks > 1 else None}
        if "vp_stage" not in inspect.signature(GPTModel).parameters:  # before 0.13
            version = {}
            if chunks > 1:
                parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        first = chunk == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0
        last = chunk == chunks - 1 and parallel_state.get_pipeline_model_parallel_rank() == stages - 1
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=False,
            **version,
        )
        results.set_weights_by_name(model)
        models.append(model)
    return models


def batches(seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator)


def measure_loss(training: bool, output: torch.Tensor) -> Any:
    loss = output.float().mean()
    if training:
        _LOSSES.append(loss.item())
    return loss, {"lm loss": loss.detach()}


def step(data: Any, model: Any, *_: Any) -> Any:
    tokens = next(data)
    positions = torch.arange(LENGTH).unsqueeze(0)
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), partial(measure_loss, model.training)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        arguments.tensor_model_parallel_size,
        arguments.pipeline_model_parallel_size,
        arguments.chunks if arguments.chunks > 1 else None,
    )
    torch.manual_seed(5)
    random = tensor_parallel.random
    random.initialize_rng_tracker(inference_rng_tracker=True)
    models = build(arguments)
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    # Every chunk reads the same microbatches; evaluation has its own.
    several = len(models) > 1
    data = [[batches(seed) for _ in models] if several else batches(seed) for seed in (3, 4)]
    run = partial(
        get_forward_backward_func(),
        forward_step_func=step,
        model=models if several else models[0],
        num_microbatches=arguments.microbatches,
        seq_length=LENGTH,
        micro_batch_size=1,
    )
    losses = []
    ending = results.Ending(arguments)
    for iteration in range(1, arguments.train_iters + 1):
        last = ending.last(iteration)
        run(forward_only=False, data_iterator=data[0])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(list(_LOSSES))
        _LOSSES.clear()
        if arguments.evaluate_every and iteration % arguments.evaluate_every == 0:
            for model in models:
                model.eval()
            with torch.no_grad():
                run(forward_only=True, data_iterator=data[1])
            for model in models:
                model.train()
        if iteration == last:
            break
    results.write(arguments.results, losses, models)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
