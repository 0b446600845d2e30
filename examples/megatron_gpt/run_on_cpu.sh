#!/usr/bin/env bash
# Megatron's own parser, training loop and 1F1B schedule on 4 processes without a GPU, about 3 minutes; the summary comes at
# the end. `make setup` installs what it needs. The GPUs are emulated (docs/emulation.md), the stand-ins for CUDA are the tests'.
#   STEPS=90 examples/megatron_gpt/run_on_cpu.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
SUPPORT=tests/megatron_support

OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 4 \
    -m perseus_plugin.megatron "$SUPPORT/pretrain_gpt.py" \
    $("$PYTHON" "$SUPPORT/flags.py" 4 8) --train-iters "${STEPS:-90}" --log-interval 10 \
    --perseus --perseus-config examples/megatron_gpt/cpu.yaml "$@"
