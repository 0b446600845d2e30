"""The flags of a small Megatron job on the CPU. `python flags.py STAGES [MICROBATCHES [REPLICAS]]` prints them."""

from __future__ import annotations

import shlex
import sys

# What a GPU kernel would do otherwise is left to plain torch; every stage is the same on every run.
ON_CPU = """
    --distributed-backend gloo --use-cpu-initialization --transformer-impl local --inference-rng-tracker
    --rerun-mode disabled --clip-grad 0 --attention-backend unfused --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-persist-layer-norm --mock-data --num-workers 0
"""
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32
    --vocab-size 64 --make-vocab-size-divisible-by 1 --hidden-dropout 0 --attention-dropout 0
"""
TRAINING = """
    --micro-batch-size 1 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant --train-iters 20 --eval-iters 0
    --eval-interval 1000 --log-interval 1 --seed 5
"""


def flags(stages: int, microbatches: int = 4, replicas: int = 1, **changes: object) -> list[str]:
    """All flags of a job. `changes` add flags, replace their values or, with None, leave them out.

    For example `flags(2, train_iters=30, perseus=True)`.
    """
    values: dict[str, list[str]] = {}
    for word in shlex.split(ON_CPU + MODEL + TRAINING):
        if word.startswith("--"):
            flag = word
            values[flag] = []
        else:
            values[flag].append(word)
    values["--pipeline-model-parallel-size"] = [str(stages)]
    values["--global-batch-size"] = [str(microbatches * replicas)]
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            values.pop(flag, None)
        elif value is True:
            values[flag] = []
        else:
            values[flag] = [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    return [word for flag, words in values.items() for word in (flag, *words)]


if __name__ == "__main__":
    print(*flags(*map(int, sys.argv[1:])))
