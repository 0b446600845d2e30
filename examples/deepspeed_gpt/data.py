"""Character-level text that every machine has: the source of Python's own standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch


def standard_library_text(limit: int = 2_000_000) -> bytes:
    """The first `limit` bytes of the standard library's top-level modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def microbatches(
    text: bytes, *, length: int, batch: int, seed: int, replica: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random (inputs, next characters), each of shape (batch, length); the same for the same seed."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed + replica)
    while True:
        starts = torch.randint(len(data) - length - 1, (batch,), generator=generator).tolist()
        chunks = torch.stack([data[start : start + length + 1] for start in starts])
        yield chunks[:, :-1].contiguous(), chunks[:, 1:].contiguous()
