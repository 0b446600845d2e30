"""A small GPT trained by Megatron's own parser and training loop, on the CPU.

What Megatron-LM's `pretrain_gpt.py` does, cut down to mock data and the model parts that need no GPU. Start it as any
Megatron script, with the flags in `flags.py` beside what you want to try. `--results FILE` leaves the loss of every
microbatch of every iteration, and a hash of every rank's final parameters, as JSON.
"""

# ruff: noqa: E402 (the stand-ins come before Megatron)
from __future__ import annotations

import argparse
import inspect
import sys
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda_on_cpu

cuda_on_cpu.install()

import results
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset, MockGPTLowLevelDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.package_info import VERSION
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.arguments import add_megatron_arguments, core_transformer_config_from_args

cuda_on_cpu.let_megatron_start()
# The stock mock data set has 200 million tokens, to be shuffled at every start.
MockGPTLowLevelDataset.size = 200

_MODELS: list[GPTModel] = []
_LOSSES: dict[int, list[float]] = defaultdict(list)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("test script")
    group.add_argument("--results", help="write losses and parameter hashes to this JSON file")
    group.add_argument("--same-weights", action="store_true", help="weights that do not depend on the parallel layout")
    results.Ending.add_arguments(group)
    return parser


def provide_model(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any) -> Any:
    arguments = get_args()
    config = core_transformer_config_from_args(arguments)
    # Batched sends and receives between the same two ranks get mixed up by gloo.
    config.batch_p2p_comm = False
    if arguments.virtual_pipeline_model_parallel_size and VERSION < (0, 18):
        # Frees a tensor that gloo has yet to send.
        config.deallocate_pipeline_outputs = False
    chunk = {"vp_stage": vp_stage} if "vp_stage" in inspect.signature(GPTModel).parameters else {}
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=arguments.padded_vocab_size,
        max_sequence_length=arguments.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type=arguments.position_embedding_type,
        **chunk,
    )
    if arguments.same_weights:
        results.set_weights_by_name(model)
    _MODELS.append(model)
    return model


def provide_datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    arguments = get_args()
    config = GPTDatasetConfig(
        random_seed=arguments.seed,
        sequence_length=arguments.seq_length,
        blend=None,
        split="90,5,5",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=True,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


# Every rank makes its own batches, tensor parallel ranks the same ones: nothing to broadcast.
provide_datasets.is_distributed = True  # type: ignore[attr-defined]


def measure_loss(mask: torch.Tensor, training: bool, output: torch.Tensor) -> Any:
    total = (output.float().view(-1) * mask.view(-1)).sum()
    tokens = mask.sum().to(torch.int)
    report = torch.stack((total.detach(), tokens.to(total.dtype)))
    if training:
        _LOSSES[get_args().curr_iteration].append((report[0] / report[1]).item())
    return total, tokens, {"lm loss": report}


def step(data: Any, model: Any, *_: Any) -> Any:
    arguments = get_args()
    # Iterations count from 0 here. The training loop looks at what this leaves before every iteration.
    if last := ending().last(arguments.curr_iteration + 1):
        arguments.train_iters = last
    batch = next(data)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(measure_loss, batch["loss_mask"], model.training)


@cache
def ending() -> results.Ending:
    return results.Ending(get_args())


def train() -> None:
    defaults = {"tokenizer_type": "NullTokenizer"}
    common = {"model_type": ModelType.encoder_or_decoder, "forward_step_func": step, "model_provider": provide_model}
    parameters = inspect.signature(pretrain).parameters
    if "cfg_container" in parameters:  # 0.18 and later
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        parsed = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults=defaults)
        common["cfg_container"] = pretrain_cfg_container_from_args(parsed)
    else:
        common.update(extra_args_provider=add_arguments, args_defaults=defaults)
    datasets = next(name for name in parameters if name.startswith("train_valid_test_dataset"))
    pretrain(**{datasets: provide_datasets}, **common)


if __name__ == "__main__":
    train()
    if get_args().results:
        results.write(get_args().results, [losses for _, losses in sorted(_LOSSES.items())], _MODELS)
    torch.distributed.destroy_process_group()
else:
    # What is forked from a process that has imported this has read the help of all flags already.
    add_megatron_arguments(argparse.ArgumentParser())
