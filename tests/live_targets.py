"""A whole job whose target changes at random while it trains, over its socket; see `one_job`."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perseus_plugin.leader.job_socket import SOCKET_NAME, ask
from perseus_plugin.reporting.record.records import load_record
from tests.one_job import OneJob, Ran, Step

PLUGIN: dict[str, Any] = {
    "profiling": {
        "warmup_steps": 2,
        "clocks_mhz": [1410, 1260, 1110, 960, 810],
        "steps_per_clock": 2,
        "max_relative_error": 1.0,
        "max_time_error": 1.0,
    },
    "frontier": False,
    "stragglers": {"detect": False},
    "watch": {"tolerance": 1.0},
    "log_level": "warning",
}
"""On a busy machine times are noisy: neither stragglers nor the watch shall have a say."""
WISHES: tuple[dict[str, Any], ...] = (
    {"slowdown": 0.0},
    {"slowdown": 0.05},
    {"slowdown": 0.1},
    {"slowdown": 0.2},
    {"slowdown": 0.4},
    {"cheapest": True},
    {"full": True},
)


@dataclass
class Changed:
    """What came of the changes.

    Attributes:
        ran: what the job did.
        said: per change its number and the iteration in which it was said.
        outcomes: what the job says became of each, by number.
        by_rank: per rank what each iteration ran as: the set of plans, or why none.
        summary: of the job.
        events: of the job that are about targets.
    """

    ran: Ran
    said: list[tuple[int, int]] = field(default_factory=list)
    outcomes: dict[int, dict[str, Any]] = field(default_factory=dict)
    by_rank: list[dict[int, str]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def latencies(self) -> list[int]:
        """Iterations from the one in which a change was said to the first under it, of those that came into force.

        What was said to be aimed at already is in force since before it was said.
        """
        begins = [(self.outcomes[number]["iteration"], iteration) for number, iteration in self.said]
        return [begin - iteration for begin, iteration in begins if begin is not None and begin > iteration]


def wait_for_plan(folder: Path) -> None:
    """Until the job follows its first plan.

    Raises:
        RuntimeError: it gave up, as on a machine on which times vary too much.
    """
    phase = ""
    while phase != "following":
        time.sleep(0.1)
        if (folder / SOCKET_NAME).exists():
            phase = ask(folder, {"do": "targets"}).get("in_force", {}).get("phase", "")
        if phase == "given up":
            raise RuntimeError("the job stays at full clocks: its log says why")


def change_at_random(
    folder: Path,
    changes: int,
    *,
    seed: int = 0,
    pause_s: Callable[[random.Random], float] = lambda draw: draw.uniform(0.0, 1.0),
    **times: Any,
) -> Changed:
    """Run a job and change its target so often, each time after a pause, then let it end.

    Args:
        folder: for its files.
        changes: how many.
        seed: of what is said when.
        pause_s: from one change to the next.
        times: of `OneJob`.
    """
    job = OneJob(folder, [Step()] * 100_000, plugin=PLUGIN, until=lambda: over.is_set(), **times)
    over, changed = threading.Event(), Changed(job.ran)

    def change() -> None:
        try:
            draw = random.Random(seed)
            wait_for_plan(folder)
            for _ in range(changes):
                time.sleep(pause_s(draw))
                said = {**draw.choice(WISHES), "source": draw.choice(("cli", "cli", "site"))}
                iteration = len(job.ran.times_s)  # the one that runs
                number = ask(folder, {"do": "target", "target": said})["number"]
                changed.said.append((number, iteration))
            deadline_s = time.monotonic() + 300.0
            while time.monotonic() < deadline_s:
                told = ask(folder, {"do": "targets"})
                changed.outcomes = {one["number"]: one for one in told["outcomes"]}
                heard = {number for number, _ in changed.said} <= changed.outcomes.keys()
                if heard and not any(one["state"] == "waiting" for one in changed.outcomes.values()):
                    break
                time.sleep(0.1)
            time.sleep(1.0)  # the last one is to be seen in the records
        finally:
            over.set()

    thread = threading.Thread(target=change, name="changes")
    thread.start()
    changed.ran = job.run()
    thread.join()
    for rank in range(len(times.get("forward_s", (0, 0)))):
        ran_as: dict[int, str] = {}
        for stretch in load_record(folder, rank).stretches:
            what = f"{stretch.sort.state} {stretch.sort.plan or stretch.sort.reason}"
            ran_as.update(dict.fromkeys(range(stretch.first, stretch.first + stretch.count), what))
        changed.by_rank.append(ran_as)
    changed.summary = changed.ran.summary
    lines = (folder / "events.jsonl").read_text().splitlines()
    changed.events = [event for event in map(json.loads, lines) if event["event"] == "target"]
    return changed
