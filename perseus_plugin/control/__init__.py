"""Enforcing a plan on one rank: what clock to ask for when, and the helper process that owns the GPU's clock."""
