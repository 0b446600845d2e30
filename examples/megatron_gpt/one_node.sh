#!/usr/bin/env bash
# One node with 8 GPUs: tensor parallel 2, pipeline parallel 4. Megatron-LM as it is, and the flag.
#   MEGATRON_LM=~/Megatron-LM examples/megatron_gpt/one_node.sh
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/model.sh"

torchrun --standalone --nproc-per-node 8 "$MEGATRON_LM/pretrain_gpt.py" \
    "${MODEL[@]}" "${TRAINING[@]}" "${DATA[@]}" \
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4 \
    --perseus "$@"
