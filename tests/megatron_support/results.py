"""What the scripts here have in common: weights that do not depend on the layout, and the file of results."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state


class Ending:
    """When a job ends before its last iteration, on all ranks after the same one.

    It is never asked for a moment that a rank may have passed: whoever hears the plugin say the words or sees the file
    sets an iteration that is `--more` ahead, and pipelines keep their ranks within one of each other.
    """

    _KEY = "the tests' last iteration"

    @staticmethod
    def add_arguments(parser: Any) -> None:
        """What decides."""
        parser.add_argument("--end-after", type=int, default=0, help="this many iterations; 0: as many as there are")
        parser.add_argument(
            "--until", help="end some iterations after the plugin has said this on any rank, or /THIS/FILE is there"
        )
        parser.add_argument("--more", type=int, default=16, help="how many")

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._last, self._words, self._more = arguments.end_after, arguments.until, arguments.more
        self._heard = False
        if self._words is not None:
            handler = logging.Handler()
            handler.emit = self._hear  # type: ignore[method-assign]
            logging.getLogger("perseus_plugin").addHandler(handler)

    def _hear(self, record: logging.LogRecord) -> None:
        self._heard = self._heard or self._words in record.getMessage()

    def last(self, iteration: int) -> int:
        """The last iteration, as far as that is known in this one; 0: not known."""
        if self._words is not None and not self._last:
            store = torch.distributed.distributed_c10d._get_default_store()
            if self._heard or (self._words.startswith("/") and Path(self._words).exists()):
                store.compare_set(self._KEY, "", str(iteration + self._more))
            if store.check([self._KEY]):
                self._last = int(store.get(self._KEY))
        return int(self._last)


def set_weights_by_name(model: Any) -> None:
    """Give each matrix values that follow from its name with the layer's number in the whole model."""
    numbers = {f"decoder.layers.{i}.": layer.layer_number for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        for prefix, number in numbers.items():
            name = name.replace(prefix, f"layer{number}.")
        if parameter.dim() > 1:
            # The last stage's copy of the embedding has another name than the first one's.
            name = "embedding" if name in ("embedding.word_embeddings.weight", "output_layer.weight") else name
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(seed))


def write(path: str, losses: list[list[float]], models: Sequence[Any]) -> None:
    """Collect every rank's losses and the hash of its parameters in one file.

    Args:
        path: JSON, `{"ranks": [{"rank", "stage", "losses", "parameters"}]}`.
        losses: for each iteration those of its microbatches; nothing on ranks that compute none.
        models: the model chunks of this rank.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, parameter in model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    mine = {
        "rank": torch.distributed.get_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "losses": losses,
        "parameters": digest.hexdigest(),
    }
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    if mine["rank"] == 0:
        Path(path).write_text(json.dumps({"ranks": everyone}))
