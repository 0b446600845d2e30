"""A training script that looks at its own process: what the plugin put there, and that it trains on through trouble.

Every rank writes `facts<rank>.json` into the current folder.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn
from torch.nn import functional

from perseus_plugin.gpus.emulated import state
from perseus_plugin.gpus.emulated.device import EmulatedGpu

VOCABULARY, WIDTH, LENGTH = 64, 32, 16
MODULES = ("ortools", "pydantic", "perseus_plugin.session.session")


def logits(embedding: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, embedding.weight)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def layers() -> list[Any]:
    """Layers with the embedding tied between the first and the last stage."""
    tied = {"key": "embedding", "typename": nn.Embedding}
    return [
        TiedLayerSpec(**tied, num_embeddings=VOCABULARY, embedding_dim=WIDTH),
        *(Layer() for _ in range(4)),
        TiedLayerSpec(**tied, forward_fn=logits, num_embeddings=VOCABULARY, embedding_dim=WIDTH),
    ]


def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, 1), labels.flatten())


def batches(batch: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def lengths(seed: int, step: int, count: int) -> list[int]:
    """Tokens of each microbatch of a step, which vary by a factor of three."""
    return random.Random(f"{seed} {step}").choices(range(LENGTH // 3, LENGTH + 1), k=count)


Microbatch = tuple[torch.Tensor, torch.Tensor]


def padded(tokens: Any, of_step: Callable[[int], list[int]]) -> Iterator[list[Microbatch]]:
    """Steps' microbatches, of which only so many tokens count."""
    for step in itertools.count():
        batch = zip(of_step(step), tokens, strict=False)
        yield [(inputs, torch.where(torch.arange(LENGTH) < length, labels, -100)) for length, (inputs, labels) in batch]


def tokens_of(batch: list[Microbatch]) -> list[int]:
    """How many tokens of each microbatch count."""
    return [int((labels >= 0).sum()) for _, labels in batch]


class Lengths:
    """Makes the emulated GPU's work on a microbatch take as long as its tokens say."""

    def __init__(self, engine: Any, gpu: EmulatedGpu) -> None:
        self._gpu = gpu
        self._forwards: Iterator[int] = iter(())
        engine.module.register_forward_pre_hook(self._begins)
        engine.module.register_forward_hook(self._ends)

    def step(self, tokens: list[int]) -> None:
        self._forwards = iter(tokens)

    def _begins(self, module: nn.Module, inputs: Any) -> None:
        self._tokens = next(self._forwards)
        self._gpu.set_slowdown(3 * self._tokens / LENGTH, "forward")

    def _ends(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        times = 3 * self._tokens / LENGTH
        output.register_hook(lambda gradient: self._gpu.set_slowdown(times, "backward"))


def kill_helper() -> None:
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if b"control.helper" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def fill_disk() -> None:
    """From now on this process can write no byte to any file, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def fail() -> None:
    raise RuntimeError("the training script failed on purpose")


class Training:
    """One rank's engine and GPU, and what can be done to them."""

    def __init__(
        self, engine: Any, rank: int, gpu: EmulatedGpu | None, at: int, slowdown: float, looks: list[dict[str, Any]]
    ) -> None:
        self.engine, self.rank, self.gpu = engine, rank, gpu
        self._at, self._slowdown = at, slowdown
        self.over = False
        self.actions: dict[str, Callable[[], object]] = {
            "nothing": lambda: None,
            "look": lambda: looks.append(look(engine)),
            "end": self._end,
            "raise": fail,
            "fill-disk": fill_disk,
            "more-batches": self._more_batches,
            "break-tap": self._break_tap,
            # Of the GPU of one rank.
            "kill-helper": self._here(kill_helper),
            "lose-gpu": self._here(lambda: self._faults(state.GPU_LOST)),
            "take-permission": self._here(lambda: self._faults(state.NO_PERMISSION)),
            "slow-calls": self._here(lambda: self._faults(0, call_s=2.0)),
            "ignore-locks": self._here(lambda: self._faults(state.IGNORE_LOCKS)),
            "slow": self._here(lambda: self._slow(slowdown)),
            "recover": self._here(lambda: self._slow(1.0)),
            # Without a GPU of ours the job runs without the plugin, and there is nobody to be told.
            "report": self._report,
            "take-back": self._take_back,
            "aim-lower": self._aim_lower,
            "aim-at-full": self._aim_at_full,
        }

    def _here(self, action: Callable[[], object]) -> Callable[[], object]:
        return action if self.rank == self._at and self.gpu is not None else lambda: None

    def _end(self) -> None:
        self.over = True

    def _more_batches(self) -> None:
        engine = self.engine
        engine.set_train_batch_size(engine.train_batch_size() + 2 * engine.train_micro_batch_size_per_gpu())

    def _break_tap(self) -> None:
        session = vars(self.engine).get("_perseus_session")
        if session is not None:
            session.tap._controller = object()

    def _faults(self, faults: int, call_s: float = 0.0) -> None:
        assert self.gpu is not None
        self.gpu.set_faults(faults, call_s=call_s)

    def _slow(self, slowdown: float) -> None:
        assert self.gpu is not None
        self.gpu.set_slowdown(slowdown)

    def _report(self) -> None:
        """On the command line, from the last rank."""
        if self.gpu is not None and self.rank == torch.distributed.get_world_size() - 1:
            command = [sys.executable, "-m", "perseus_plugin.cli.main", "straggler", "report", "--job", "out"]
            subprocess.run([*command, "--rank", str(self._at), "--slowdown", str(self._slowdown)], check=True)

    def _take_back(self) -> None:
        """From Python, as the command line's reports are taken back."""
        if self.gpu is not None and self.rank == torch.distributed.get_world_size() - 1:
            import perseus_plugin

            assert perseus_plugin.report_straggler(rank=self._at, slowdown=1.0, source="cli")

    def _aim_lower(self) -> None:
        """From Python, on the last rank."""
        if self.gpu is not None and self.rank == torch.distributed.get_world_size() - 1:
            import perseus_plugin

            assert perseus_plugin.set_target(slowdown="20 %", source="a callback")

    def _aim_at_full(self) -> None:
        """On the command line."""
        if self.gpu is not None and self.rank == torch.distributed.get_world_size() - 1:
            command = [sys.executable, "-m", "perseus_plugin.cli.main", "target", "--job", "out", "--full"]
            subprocess.run([*command, "--wait", "0"], check=True)


class Script:
    """What is done to the training and when: each action after the one before it.

    All ranks act before the same step: a step's number, so many steps after the action before (`+3`), when a file is
    there (`/its/path`), or after the plugin has said some words on any rank.
    """

    def __init__(self, lines: list[tuple[str, str]], training: Training) -> None:
        self._lines, self._training = list(lines), training
        self._heard: list[str] = []
        self._last = 0
        self.done: list[tuple[str, str]] = []
        """What has been done, with the number of the step: the script of a run that is to do the same."""
        handler = logging.Handler()
        handler.emit = lambda record: self._heard.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("perseus_plugin").addHandler(handler)

    def before(self, step: int) -> None:
        """Do what is due before this step."""
        while self._lines and self._due(self._lines[0][1], step):
            action, _ = self._lines.pop(0)
            self.done.append((action, str(step)))
            self._last = step
            self._training.actions[action]()

    def _due(self, when: str, step: int) -> bool:
        if when.startswith("+"):
            return step >= self._last + int(when)
        if when.isdigit():
            return step >= int(when)
        if when.startswith("/"):
            seen = Path(when).exists()
        else:
            at = next((at for at, said in enumerate(self._heard) if when in said), None)
            seen = at is not None
            del self._heard[: 0 if at is None else at + 1]  # what was said before is not what is waited for next
        anywhere = torch.tensor([int(seen)])
        torch.distributed.all_reduce(anywhere)
        return bool(anywhere)


def look(engine: Any) -> dict[str, Any]:
    """What of ours is in this process and on this engine."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {
        "stock_map": engine._INSTRUCTION_MAP is type(engine)._INSTRUCTION_MAP,
        "on_engine": sorted(name for name in vars(engine) if "perseus" in name or name == "_exec_schedule"),
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("perseus")),
        "children": len(children),
        "modules": sorted(name for name in MODULES if name in sys.modules),
    }


def parameters_of(engine: Any) -> str:
    """A hash of this rank's parameters, bit by bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(engine.module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="at most")
    parser.add_argument("--do", nargs=2, action="append", default=[], metavar=("WHAT", "WHEN"), help="see Script")
    parser.add_argument("--at", type=int, default=1, help="the rank that actions on a GPU are about")
    parser.add_argument("--gpus", default="out/emulated_gpus/rank{}", help="path of a rank's emulated GPU")
    parser.add_argument("--slowdown", type=float, default=1.5)
    parser.add_argument("--batches-from", help="numbers of microbatches, one of which every step draws: LOW,HIGH")
    parser.add_argument("--evaluate-every", type=int, default=0, help="steps between evaluations; 0: none")
    parser.add_argument("--announce", type=int, metavar="AHEAD", help="lengths vary, and are announced so early")
    parser.add_argument("--enable", help="call perseus_plugin.enable with the block in this JSON file")
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = PipelineModule(
        layers=layers(), num_stages=arguments.stages, loss_fn=loss, activation_checkpoint_interval=1
    )
    engine, _, _, _ = deepspeed.initialize(args=arguments, model=module, model_parameters=module.parameters())
    looks = [look(engine)]
    if arguments.enable:
        import perseus_plugin

        perseus_plugin.enable(engine, arguments.enable)
    rank = torch.distributed.get_rank()
    path = Path(arguments.gpus.format(rank))
    gpu = EmulatedGpu(path) if path.exists() else None
    training = Training(engine, rank, gpu, arguments.at, arguments.slowdown, looks)
    script = Script(arguments.do, training)
    data, held_out = (batches(engine.train_micro_batch_size_per_gpu(), seed) for seed in (3, 4))
    count, replica = engine.gradient_accumulation_steps(), engine.grid.get_data_parallel_id()
    varying = None if gpu is None or arguments.announce is None else Lengths(engine, gpu)
    if arguments.announce is not None:
        steps: Iterator[list[Microbatch]] = padded(data, lambda step: lengths(replica, step, count))
        if gpu is not None:  # without the plugin the script has nothing of it either
            import perseus_plugin

            steps = perseus_plugin.announced(steps, tokens_of, ahead=arguments.announce)
        data = itertools.chain.from_iterable(steps)
    losses, parameters = [], []
    for step in range(arguments.steps):
        script.before(step)
        if training.over:
            break
        if arguments.batches_from:
            low, high = map(int, arguments.batches_from.split(","))
            count = random.Random(step).randint(low, high)
            engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu())
        if varying is not None:
            varying.step(lengths(replica, step, count))
        losses.append(engine.train_batch(data).item())
        parameters.append(parameters_of(engine))
        if arguments.evaluate_every and (step + 1) % arguments.evaluate_every == 0:
            losses.append(engine.eval_batch(held_out).item())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    facts = {"looks": [*looks, look(engine)], "did": script.done}
    # Losses of evaluations among those of steps; parameters after every step.
    facts |= {"losses": losses, "parameters": parameters}
    Path(f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
