#!/usr/bin/env bash
# torchtitan's own trainer with its debug model of llama 3, on 2 processes without a GPU, about 5 minutes; the summary comes at
# the end, and all files lie in out/torchtitan_on_cpu/. A variable turns the plugin on. `make titan` installs what it needs.
# The GPUs are emulated (docs/emulation.md); the stand-ins for what torchtitan asks CUDA for, the few words that the model is
# trained on, and attention that has a backward on the CPU are the tests' (tests/titan_support/).
#   STEPS=100 examples/torchtitan/run_on_cpu.sh
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.titan/bin/python}
mkdir -p "$ROOT/out/torchtitan_on_cpu"
cd "$ROOT/out/torchtitan_on_cpu"

export OMP_NUM_THREADS=1 PYTHONPATH="$ROOT/tests/titan_support:$ROOT${PYTHONPATH:+:$PYTHONPATH}"
PERSEUS_CONFIG="$ROOT/examples/torchtitan/cpu.yaml" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m titan_on_cpu --module titan_on_cpu --config debug_model \
    --training.steps "${STEPS:-100}" --training.seq_len 32 --training.local_batch_size 4 --training.disable_cuda_graphs \
    --parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule 1F1B "$@"
