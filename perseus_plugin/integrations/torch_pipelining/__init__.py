"""PyTorch: the schedules of `torch.distributed.pipelining`, and what is built on them."""
