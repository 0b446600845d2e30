"""Starting real multi-process training jobs on this machine's CPU, and reading what they leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "examples" / "deepspeed_gpt" / "train.py"
PROBE = Path(__file__).with_name("probe.py")

BASE_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "steps_per_print": 1000,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
    "pipeline": {"use_reentrant": False},
}
SMALL = ("--blocks", "4", "--width", "32", "--heads", "2", "--length", "32")


def perseus_block(output_dir: Path, stages: int, **changes: Any) -> dict[str, Any]:
    """A block whose sweep is over after 14 short iterations."""
    block: dict[str, Any] = {
        "enabled": True,
        "output_dir": str(output_dir),
        "profiling": {
            "warmup_steps": 2,
            "clocks_mhz": [1410, 1110, 810],
            "steps_per_clock": 2,
            # A few short iterations say little; these tests are about the way, not about the figures.
            "max_relative_error": 1.0,
            "max_time_error": 1.0,
        },
        "gpu": {"backend": "emulated"},
        "emulation": {
            "forward_time_s": [0.008 + 0.004 * stage for stage in range(stages)],
            "backward_time_s": [0.016 + 0.008 * stage for stage in range(stages)],
        },
        "watch": {"tolerance": 1.0},
        "stragglers": {"detect": False},
    }
    block.update(changes)
    return block


@dataclass(frozen=True)
class Finished:
    """A job that has ended."""

    status: int
    output: str

    def check(self) -> Finished:
        """Fail the test with the job's output unless it ended well."""
        assert self.status == 0, f"the job ended with status {self.status}:\n{self.output[-6000:]}"
        return self


def run_job(
    script: Path, ranks: int, config: dict[str, Any], folder: Path, *arguments: str, **environment: str
) -> Finished:
    """Run `script` on `ranks` processes with this DeepSpeed config and wait for it."""

    def once() -> Finished:
        with started_job(script, ranks, config, folder, *arguments, **environment) as job:
            output, _ = job.communicate(timeout=240)
            return Finished(job.returncode, output)

    enabled = config.get("perseus", {}).get("enabled", True) and "perseus" in config
    return once() if enabled else _again_if_torch_aborts(once)


@contextmanager
def started_job(
    script: Path, ranks: int, config: dict[str, Any], folder: Path, *arguments: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Start `script` under torchrun in a process group of its own, which is ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    words = (str(script), "--deepspeed_config", str(path), *arguments)
    with started_ranks(ranks, folder, *words, DS_ACCELERATOR="cpu", **environment) as job:
        yield job


@contextmanager
def started_ranks(ranks: int, folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command line under torchrun, in `folder`, as a process group that ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={_free_port()}", *words]
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def run_ranks(ranks: int, folder: Path, *words: str, **environment: str) -> Finished:
    """Run a command line under torchrun in `folder` and wait for it."""

    def once() -> Finished:
        with started_ranks(ranks, folder, *words, **environment) as job:
            output, _ = job.communicate(timeout=240)
            return Finished(job.returncode, output)

    return once() if "--perseus" in words else _again_if_torch_aborts(once)


def _again_if_torch_aborts(run: Callable[[], Finished]) -> Finished:
    """Run a job without the plugin; a second time if torch aborts at its end, as its threads sometimes make it do."""
    done = run()
    return run() if done.status and "terminate called without an active exception" in done.output else done


def train(ranks: int, config: dict[str, Any], folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the example; returns its losses and the hash of its final parameters."""
    losses = folder / "losses.json"
    run_job(TRAIN, ranks, config, folder, *SMALL, *arguments, "--losses", str(losses)).check()
    content: dict[str, Any] = json.loads(losses.read_text())
    return content


def wait_until(condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(interval_s)
    return condition()


def processes_naming(word: str, among: Sequence[str] = ("perseus_plugin.control.helper",)) -> list[int]:
    """Processes on whose command line both `word` and one of `among` stand."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if word in line and any(name in line for name in among):
                    found.append(int(folder.name))
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
