# The model and its training, sourced by the launch scripts: GPT with 2.7 billion parameters on mock data.

MEGATRON_LM=${MEGATRON_LM:?folder of a Megatron-LM checkout}
export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
    --num-layers 32 --hidden-size 2560 --num-attention-heads 32 --seq-length 2048 --max-position-embeddings 2048
    --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights
)
TRAINING=(
    --micro-batch-size 2 --global-batch-size 128 --train-iters 2000 --bf16
    --lr 1.6e-4 --min-lr 1.6e-5 --lr-decay-style cosine --lr-warmup-iters 100 --clip-grad 1.0 --weight-decay 0.1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --eval-iters 10 --eval-interval 500 --log-interval 10 --tensorboard-dir out/tensorboard
)
# Replace by --data-path and a real tokenizer.
DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size 50256)
