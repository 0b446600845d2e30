#!/usr/bin/env bash
# One node with 8 GPUs: Llama 3.1 8B, pipeline parallel 4, FSDP 2. torchtitan as it is, and its flag that turns the plugin on.
# In a folder with the model's tokenizer in assets/hf/Llama-3.1-8B, as torchtitan's settings ask for it:
#   ~/perseus_plugin/examples/torchtitan/one_node.sh
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)

torchrun --standalone --nproc-per-node 8 -m torchtitan.train --module llama3 --config llama3_8b \
    --training.local_batch_size 16 --training.seq_len 4096 --training.disable_cuda_graphs \
    --parallelism.pipeline_parallel_degree 4 --parallelism.pipeline_parallel_schedule 1F1B \
    --override.imports "perseus_plugin.integrations.torchtitan.perseus={\"config\": \"$HERE/perseus.yaml\"}" "$@"
