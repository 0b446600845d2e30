"""Waiting where `torch.distributed` waits: two processes, of which one is late."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from perseus_plugin.errors import GpuError
from perseus_plugin.exchange import processes

ONE_GPU = "there is one GPU, which two ranks would have to share: see how one spinning thread waits"
_START_S = 90.0  # to import torch, make a CUDA context and meet
_LAST_LINES = 3


def wait_for_a_peer(backend: str, devices: Sequence[str], seconds: float) -> tuple[float, float]:
    """Have a process receive on `devices[0]` what another sends `seconds` later, and say when it waited.

    Args:
        backend: "gloo" or "nccl".
        devices: torch devices of the one that waits and of its peer.
        seconds: how long the peer is late.

    Raises:
        GpuError: they do not get together; the message says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        command = processes.command("perseus_plugin.cli.verification.peers", backend, str(meeting), str(seconds))
        environment = {**processes.environment(), "OMP_NUM_THREADS": "1"}
        with (Path(folder) / "errors").open("w+") as errors:
            both = [
                subprocess.Popen(
                    [*command, str(rank), device], stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
                )
                for rank, device in enumerate(devices)
            ]
            try:
                said = _first_line(both, seconds + _START_S)
            finally:
                for process in both:
                    process.kill()
                    process.wait()
            if said is None:
                errors.seek(0)
                raise GpuError(f"{backend}: {reason(errors.read())}")
    begin_s, end_s = json.loads(said)
    return begin_s, end_s


def peer_device(device: str) -> str:
    """Another GPU for the peer where there is one, else the same."""
    import torch

    index, count = torch.device(device).index or 0, torch.cuda.device_count()
    return f"cuda:{(index + 1) % count}"


def _first_line(both: Sequence[subprocess.Popen[str]], within_s: float) -> str | None:
    """What the waiting process says at its end; None if one of them fails, or nothing is said."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        status = [process.poll() for process in both]
        if status[0] == 0:
            said, _ = both[0].communicate()
            return said or None
        if any(one not in (None, 0) for one in status):
            return None
        time.sleep(0.05)
    return None


def reason(errors: str) -> str:
    """The line that says what was wrong, of what the processes wrote."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if "uplicate GPU" in line or "Error" in line]
    return (telling or lines or ["the processes did not get together in time"])[-1][:300]


def main(backend: str, meeting: str, seconds: float, rank: int, device: str) -> None:
    """One of the two processes; rank 0 waits, and prints when."""
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    here = torch.ones(1, device=device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
    data = here if backend == "nccl" else here.cpu()

    def meet() -> None:
        """Both get here; the first time makes the connection."""
        if rank == 0:
            dist.recv(data, src=1)
        else:
            dist.send(data, dst=0)
        if on_gpu:
            torch.cuda.synchronize()

    meet()
    begin_s = time.monotonic()
    if rank == 1:
        time.sleep(seconds)
    meet()
    end_s = time.monotonic()
    if rank == 0:
        print(json.dumps([begin_s, end_s]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
