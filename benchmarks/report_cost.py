"""What recording costs per iteration on the session's thread, how large records get, and how long a report takes.

    python benchmarks/report_cost.py [--stages 8] [--microbatches 96] [--iterations 100000]

The job is made up (tests/reporting/job.py); record, report and their files are the real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perseus_plugin.iteration.timetable import Follow
from perseus_plugin.reporting.record.recorder import FOLDER, Recorder
from perseus_plugin.reporting.report.findings import Options, find
from perseus_plugin.reporting.report.folder import load_folder
from perseus_plugin.reporting.report.page import page
from tests.factories import placement
from tests.reporting.job import Job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=96)
    parser.add_argument("--iterations", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "out", stages=options.stages, microbatches=options.microbatches).planned(40)
        job.finished()
        record_cost(job, Path(folder) / "long", options.iterations)
        report_cost(job)


def record_cost(job: Job, folder: Path, iterations: int) -> None:
    """A rank's record over many planned iterations, each written as it ends."""
    made = Recorder(folder, placement(0, job.world_size, job.stages), _ABOUT, measures_energy=True)
    seen = job.records[0, job.number - 1]
    times_s = []
    for number in range(iterations):
        seen.number = job.plan_from + number
        begin_s = time.process_time()
        made.iteration(Follow(1), seen, job.timetable, {1: job.parts[0]})
        made.energy(seen.number, 100.0)
        made.step()
        times_s.append(time.process_time() - begin_s)
    made.step(final=True)
    sizes = sum(file.stat().st_size for file in (folder / FOLDER).iterdir())
    print(f"recording: {1e3 * statistics.mean(times_s):.3f} ms of CPU time per iteration, {max(times_s):.3f} s at most")
    print(f"record of one rank after {iterations:,} iterations: {sizes / 1e6:.2f} MB")


def report_cost(job: Job) -> None:
    """A report from beginning to end, with and without the frontier."""
    for frontier in (False, True):
        begin_s, cpu_s = time.monotonic(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            text = page(find(load_folder(job.folder), Options(frontier=frontier)))
        print(
            f"report of {job.stages} x {job.microbatches} {'with' if frontier else 'without'} frontier: "
            f"{time.process_time() - cpu_s:.1f} s of CPU time, {time.monotonic() - begin_s:.1f} s, "
            f"{len(text.encode()) / 1e6:.1f} MB"
        )


_ABOUT = {"gpu": "test GPU", "backend": "nvml", "emulated": False, "facts": {}}

if __name__ == "__main__":
    main()
