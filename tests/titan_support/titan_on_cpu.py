"""torchtitan's own trainer on the CPU: its debug model, with stand-ins for what it asks CUDA for.

    python -m titan_on_cpu --module titan_on_cpu --config debug_model [torchtitan's other flags]

fills the current folder with what to train on, and runs there. Replaced are the kind of device, its name, memory and
properties, and attention by PyTorch's, which has a backward on the CPU. With `--until-said WORDS` or `--end-after STEP`
training ends earlier than its settings say, and every rank leaves `facts<rank>.json`: a hash of its parameters after
every step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.e2e.pipelining_job import Ending, parameters_of

WORDS = 200
MORE = 10
"""Steps after the words: a plan is in force some after it has been said."""


def make_assets(folder: Path) -> None:
    """A tokenizer of a few words, and some lines to train on."""
    tokenizer, data = folder / "tests" / "assets" / "tokenizer", folder / "tests" / "assets" / "c4_test"
    for one in (tokenizer, data):
        one.mkdir(parents=True, exist_ok=True)
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


def end_earlier(ending: Ending) -> None:
    """Have the trainer end when it is time, and leave what it has trained."""
    from torchtitan.trainer import Trainer

    parameters: list[str] = []

    def continues(self: Any) -> bool:
        if self.step:
            parameters.append(parameters_of(self.model_parts))
        if not ending.is_over(self.step):
            return True
        Path(f"facts{torch.distributed.get_rank()}.json").write_text(json.dumps(parameters))
        return False

    Trainer.should_continue_training = continues


def main() -> None:
    """Run torchtitan's training script, which looks at the device when it is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--until-said")
    parser.add_argument("--end-after", type=int, default=1000)
    ours, sys.argv[1:] = parser.parse_known_args()
    _stand_in()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        make_assets(Path())
    from torchtitan.train import main as train

    if ours.until_said or ours.end_after < parser.get_default("end_after"):
        end_earlier(Ending(ours.until_said, MORE, ours.end_after))
    train()


if __name__ == "__main__":
    main()
