"""The time-energy frontier of a running job, in a process of its own that yields to everything else.

`FrontierProcess` is the side of rank 0; this module run with PATH TOLERANCE PARENT (see `processes`) is the
other: it reads one plan request from standard input, says after each sample how far the curve is known,
and writes the file.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from perseus_plugin.errors import PerseusError, os_problem
from perseus_plugin.files import follow_no_links, remove
from perseus_plugin.planning.child import Child, ChildLostError
from perseus_plugin.planning.curve import FRONTIER_FILE
from perseus_plugin.planning.process import PlanRequest, end_with, limits_of, planner_for, yield_to_training
from perseus_plugin.planning.work import tell_cut_short

logger = logging.getLogger(__name__)

TOLERANCE = 0.002


@dataclass(frozen=True)
class FrontierProgress:
    """How far it is.

    Attributes:
        samples: taken so far.
        error: share to within which the bound curve is known everywhere; inf before the second sample.
        elapsed_s: since the start.
        done: whether the file stands.
        failure: why there is none; empty without trouble.
        cut_short: whether the clock ended the search for one of its plans.
    """

    samples: int
    error: float
    elapsed_s: float
    done: bool = False
    failure: str = ""
    cut_short: bool = False


class FrontierProcess:
    """Starts the computation; the process ends by itself, or with `close`.

    Args:
        request: what the job's plan was made for.
        path: where the frontier goes.
        tolerance: share to within which the curve is to be known.
        python: that computes it; None: this one.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self, request: PlanRequest, path: Path, tolerance: float = TOLERANCE, python: str | None = None
    ) -> None:
        self._begin_s = time.monotonic()
        self.progress = FrontierProgress(0, float("inf"), 0.0)
        # A file instead of a pipe: nobody has to wait until the process is there to read.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as task:
            json.dump(request.to_dict(), task)
            task.seek(0)
            self._child = Child(
                "perseus_plugin.planning.frontier_process",
                str(path),
                repr(tolerance),
                str(os.getpid()),
                task=task,
                quiet=True,
                python=python,
            )
        threading.Thread(target=self._read, name="perseus-frontier", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.progress.done or bool(self.progress.failure)

    def close(self) -> None:
        """End the process; a file is there whole or not at all."""
        self._child.end()

    def _read(self) -> None:
        failure = ""
        while True:
            try:
                line = self._child.hear()
            except ChildLostError as error:
                failure = failure or f"its process {error}"
                break
            elapsed_s = time.monotonic() - self._begin_s
            try:
                told = json.loads(line)
                failure = told.get("failure", "")
                now = self.progress
                self.progress = FrontierProgress(
                    told.get("samples", now.samples),
                    told.get("error", now.error),
                    elapsed_s,
                    told.get("done", False),
                    cut_short=told.get("cut_short", False),
                )
            except (ValueError, AttributeError):
                failure = f"got {line[:80]!r} from its process"
        if not self.progress.done:
            now = self.progress
            self.progress = FrontierProgress(now.samples, now.error, time.monotonic() - self._begin_s, False, failure)


class BackgroundFrontier:
    """Keeps the frontier of the job's present plan in the output folder.

    Args:
        output_dir: where `frontier.json` goes.
        python: that computes it; None: this one.
    """

    def __init__(self, output_dir: Path, python: str | None = None) -> None:
        self._path, self._python = output_dir / FRONTIER_FILE, python
        self._process: FrontierProcess | None = None

    def renew(self, request: PlanRequest) -> None:
        """Begin the frontier of a plan that was made for this request; one of an older plan is not kept."""
        self.close()
        try:
            remove(self._path)
            self._process = FrontierProcess(request, self._path, python=self._python)
        except OSError as error:
            logger.warning("%s: %s. Training and the plan go on without it.", FRONTIER_FILE, os_problem(error))

    def step(self) -> None:
        """Say once how it ended."""
        process = self._process
        if process is None or not process.ended:
            return
        end = process.progress
        if end.done:
            logger.info("frontier: %d plans in %.1f s, in %s", end.samples, end.elapsed_s, self._path)
            if end.cut_short:
                tell_cut_short()
        else:
            logger.warning("%s: %s. Training and the plan go on without it.", FRONTIER_FILE, end.failure)
        self.close()

    def close(self) -> None:
        """Stop what is being computed."""
        if self._process is not None:
            self._process.close()
            self._process = None


def main() -> None:
    """Compute one frontier."""
    threading.Thread(target=end_with, args=(int(sys.argv[3]),), daemon=True).start()
    yield_to_training(19)
    path, tolerance = Path(sys.argv[1]), float(sys.argv[2])
    follow_no_links(path.parent)
    from perseus_plugin.planning.frontier import make_frontier, save_frontier

    def say(**what: object) -> None:
        print(json.dumps(what), flush=True)

    try:
        request = PlanRequest.from_dict(json.load(sys.stdin))
        frontier = make_frontier(
            planner_for(request),
            tolerance=tolerance,
            limits=limits_of(request),
            progress=lambda samples, error: say(samples=samples, error=error),
        )
        save_frontier(frontier, path)
    except Exception as failure:
        say(failure=str(failure) if isinstance(failure, (PerseusError, OSError)) else repr(failure))
    else:
        say(samples=len(frontier.points), done=True, cut_short=frontier.cut_short)


if __name__ == "__main__":
    main()
