"""How long a clock request takes from the training thread to the driver call, while the trainer is busy.

    python benchmarks/control_latency.py [--requests N] [--gap-ms G]

Two controllers serve the same requests in turn, in one run: this package's exec'd helper behind a pipe, and
the usual design, a process behind a `multiprocessing.Queue`. Both set the clock of an emulated GPU of their
own (its driver call costs microseconds, so what is measured is the way to it). Between requests the training
thread is busy as in training: short stretches of Python, and numpy products that release the interpreter
lock.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.helper.latency import percentile
from perseus_plugin.control.wire import Applied
from perseus_plugin.gpus.emulated.device import EmulatedGpu

CLOCKS_MHZ = (900, 1200)


def serve_queue(path: Path, requests: Queue[tuple[int, float] | None], results: Queue[list[float]]) -> None:
    """The usual controller: take from the queue, set the clock."""
    gpu = EmulatedGpu(path)
    latencies: list[float] = []
    while (request := requests.get()) is not None:
        latencies.append(time.monotonic() - request[1])
        gpu.lock_clock(request[0])
    gpu.reset_clock()
    results.put(latencies)


def be_busy(until_s: float, matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
    """Python and numpy in turn, until then."""
    while time.monotonic() < until_s:
        sum(i * i for i in range(500))
        matrix @ matrix


def run(count: int, gap_s: float) -> dict[str, list[float]]:
    """Latencies in seconds of both controllers."""
    matrix = np.random.default_rng(0).random((160, 160))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("helper", "queue"):
            EmulatedGpu.create(Path(folder) / name)
        requests: Queue[tuple[int, float] | None] = context.Queue()
        results: Queue[list[float]] = context.Queue()
        process = context.Process(target=serve_queue, args=(Path(folder) / "queue", requests, results))
        process.start()
        helper = ClockHelper.start(f"emulated:{Path(folder) / 'helper'}", settle_s=0.0)
        if helper.wait_ready(30) is None:
            raise SystemExit(f"the helper did not start: {helper.drain()}")
        time.sleep(1.0)  # until the other process has started too
        for number in range(count):
            mhz = CLOCKS_MHZ[number % 2]
            be_busy(time.monotonic() + gap_s, matrix)
            helper.request(mhz)
            be_busy(time.monotonic() + gap_s, matrix)
            requests.put((mhz, time.monotonic()))
        be_busy(time.monotonic() + gap_s, matrix)
        requests.put(None)
        by_queue = results.get(timeout=30)
        process.join()
        by_helper = [e.called_s - e.requested_s for e in helper.drain() if isinstance(e, Applied)]
        helper.close()
    return {"exec'd helper, pipe": by_helper, "multiprocessing.Queue": by_queue}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="latency of clock requests with a busy trainer")
    parser.add_argument("--requests", type=int, default=1000, help="requests per controller")
    parser.add_argument("--gap-ms", type=float, default=5.0, help="busy time between two requests")
    options = parser.parse_args()
    latencies = run(options.requests, options.gap_ms * 1e-3)
    print(f"{'request to driver call, ms':28} {'p50':>8} {'p95':>8} {'p99':>8} {'max':>8} {'n':>6}")
    for name, values in latencies.items():
        shares = [1e3 * percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)]
        print(f"{name:28} " + " ".join(f"{value:8.3f}" for value in shares) + f" {len(values):6}")
    ours, usual = latencies.values()
    ratios = [percentile(usual, share) / percentile(ours, share) for share in (0.5, 0.99)]
    print(f"times faster: p50 {ratios[0]:.1f}, p99 {ratios[1]:.1f}")


if __name__ == "__main__":
    main()
