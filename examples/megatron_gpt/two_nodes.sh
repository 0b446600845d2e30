#!/usr/bin/env bash
# Two nodes with 8 GPUs each: tensor parallel 2, pipeline parallel 4 with 2 virtual stages, data parallel 2; through the
# launcher, with settings from a file. Run on both nodes:
#   MEGATRON_LM=~/Megatron-LM NODE_RANK=0 MASTER_ADDR=node0 examples/megatron_gpt/two_nodes.sh
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/model.sh"

torchrun --nnodes 2 --node-rank "${NODE_RANK:?0 or 1}" --nproc-per-node 8 \
    --master-addr "${MASTER_ADDR:?name of node 0}" --master-port 29500 \
    -m perseus_plugin.megatron "$MEGATRON_LM/pretrain_gpt.py" \
    "${MODEL[@]}" "${TRAINING[@]}" "${DATA[@]}" \
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4 \
    --num-virtual-stages-per-pipeline-rank 2 \
    --perseus --perseus-config "$HERE/perseus.yaml" "$@"
