"""The flags of a small Megatron job on the CPU."""

from __future__ import annotations

# What a GPU kernel would do otherwise is left to plain torch; every stage is the same on every run.
ON_CPU = """
    --distributed-backend gloo --use-cpu-initialization --transformer-impl local --inference-rng-tracker
    --rerun-mode disabled --clip-grad 0 --attention-backend unfused --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-persist-layer-norm --mock-data --num-workers 0
""".split()
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32
    --vocab-size 64 --make-vocab-size-divisible-by 1 --hidden-dropout 0 --attention-dropout 0
""".split()
TRAINING = """
    --micro-batch-size 1 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant --train-iters 20 --eval-iters 0
    --eval-interval 1000 --log-interval 1 --seed 5
""".split()


def flags(stages: int, microbatches: int = 4, replicas: int = 1, **changes: object) -> list[str]:
    """All flags of a job: `changes` add flags or replace their values (`train_iters=30`, `untie=True`)."""
    found = [*ON_CPU, *MODEL, *TRAINING, "--pipeline-model-parallel-size", str(stages)]
    found += ["--global-batch-size", str(microbatches * replicas)]
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        # argparse takes the last of several values.
        found += [flag] if value is True else [flag, *str(value).split()]
    return found
