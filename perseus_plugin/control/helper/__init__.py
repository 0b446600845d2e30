"""The process that owns the clock of one GPU, and frees it whatever dies."""
