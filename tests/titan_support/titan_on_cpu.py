"""torchtitan's own trainer on the CPU: its debug model, with stand-ins for what it asks CUDA for.

    python -m titan_on_cpu --module titan_on_cpu --config debug_model [torchtitan's other flags]

runs in a folder that `make_assets` has filled. Replaced are the kind of device, its name, memory and properties, and
attention by PyTorch's, which has a backward on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

WORDS = 200


def make_assets(folder: Path) -> None:
    """A tokenizer of a few words, and some lines to train on."""
    tokenizer, data = folder / "tests" / "assets" / "tokenizer", folder / "tests" / "assets" / "c4_test"
    tokenizer.mkdir(parents=True)
    data.mkdir()
    words = ["<s>", "</s>", "<unk>", *(f"word{number}" for number in range(WORDS))]
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    lines = (" ".join(f"word{(7 * line + 3 * at) % WORDS}" for at in range(100)) for line in range(500))
    (data / "data.json").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def _stand_in() -> None:
    properties = SimpleNamespace(total_memory=1 << 34, name="CPU")
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, function in {
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: properties,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda *_: None,
        "current_device": lambda *_: 0,
    }.items():
        setattr(torch.cpu, name, function)
    torch.set_num_threads(1)


def debug_model() -> Any:
    """torchtitan's debug model of llama 3; attention that has a backward on the CPU."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return config


def main() -> None:
    """Run torchtitan's training script, which looks at the device when it is imported."""
    _stand_in()
    from torchtitan.train import main as train

    train()


if __name__ == "__main__":
    main()
