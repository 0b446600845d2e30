"""A whole job in one process, without a framework: ranks are threads, sessions and their helper processes are real.

Instructions take the time that an emulated GPU takes for them, which is sleep, so several jobs can run side by side.
What varies (how large steps and microbatches are, how many microbatches there are, a loader that stalls) is given as
data, so that the same work can be run once more without the plugin.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from perseus_plugin.config import PerseusConfig, parse_config
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import MODELS
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StageStream, StreamOp
from perseus_plugin.iteration.schedules import SCHEDULES
from perseus_plugin.reporting.record.records import load_record
from perseus_plugin.session.emulation import EmulatedStage
from perseus_plugin.session.session import Session
from perseus_plugin.session.start import start_session

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Step:
    """One iteration's work.

    Attributes:
        sizes: of each microbatch, as a factor of the usual one; or of each replica's.
        stall_s: how long the first stage waits for its data.
    """

    sizes: tuple[float, ...] | tuple[tuple[float, ...], ...] = (1.0,) * 4
    stall_s: float = 0.0

    def of(self, replica: int) -> tuple[float, ...]:
        """The sizes of one replica's microbatches."""
        return self.sizes[replica] if isinstance(self.sizes[0], tuple) else self.sizes  # type: ignore[return-value]


@dataclass
class Ran:
    """What a job did.

    Attributes:
        times_s: of every iteration, as the first rank saw it.
        energies_j: of every iteration, all GPUs together, by the emulated GPUs' exact integral.
        by_replica_j: the same of each replica.
        states: what every iteration ran as, by the record of the first rank; empty without the plugin.
        summary: its summary.json; empty without the plugin.
        errors: of ranks.
    """

    times_s: list[float] = field(default_factory=list)
    energies_j: list[float] = field(default_factory=list)
    by_replica_j: list[list[float]] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def nearest(self, numbers: Iterable[int], time_s: float, count: int = 5) -> list[int]:
        """Of some iterations those that took about as long as they should: a busy machine has disturbed them least."""
        return sorted(numbers, key=lambda number: abs(self.times_s[number] - time_s))[:count]


@dataclass
class Sent:
    """What is on its way from one stage to another."""

    arrives_s: float
    received: threading.Event = field(default_factory=threading.Event)


def states_of(folder: Path, iterations: int) -> list[str]:
    """What every iteration of a job ran as, by the record of its first rank."""
    states: dict[int, str] = {}
    for stretch in load_record(folder, 0).stretches:
        state = stretch.sort.reason or stretch.sort.state
        states.update(dict.fromkeys(range(stretch.first, stretch.first + stretch.count), state))
    return [states.get(number, "") for number in range(iterations)]


class OneJob:
    """Pipelines of `stages` ranks each, which wait for each other at the end of every iteration.

    Args:
        folder: for its files; two jobs at once need two.
        steps: what is to be run.
        forward_s, backward_s: usual full-clock times per stage.
        replicas: how many pipelines there are.
        plugin: the `perseus` block without what the job says itself; None: run without the plugin.
        emulation: of the GPUs, beside the times.
        slow: how many times as long a rank takes in an iteration, by rank and iteration.
        transfer_s: how long a transfer between stages takes.
        end_s: what every rank does at the end of an iteration, which no hook sees.
        schedule: name of what is run.
        announced: what the first stage of a replica announces of a step; None: nothing.
        ahead: so many steps before.
        is_graph: whether an iteration's step is replayed as one CUDA graph, so that nobody sees its instructions.
        leader: the rank that does what is rank 0's in other jobs.
        until: asked once after every iteration; the job ends when it says so, or with its last step.
    """

    def __init__(
        self,
        folder: Path,
        steps: Sequence[Step],
        *,
        forward_s: Sequence[float] = (0.010, 0.014),
        backward_s: Sequence[float] = (0.020, 0.028),
        replicas: int = 1,
        plugin: dict[str, Any] | None = None,
        emulation: dict[str, Any] | None = None,
        slow: Callable[[int, int], float] = lambda rank, iteration: 1.0,
        transfer_s: float = 0.0,
        end_s: float = 0.0,
        schedule: str = "1f1b",
        announced: Callable[[Step, int], Sequence[float]] | None = None,
        ahead: int = 3,
        is_graph: Callable[[int], bool] = lambda iteration: False,
        leader: int = 0,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder, self._steps, self._slow = folder, steps, slow
        self._end_s, self.transfer_s, self.schedule = end_s, transfer_s, schedule
        self._stages, self._replicas = len(forward_s), replicas
        ranks = self._ranks = self._stages * replicas
        self._with_plugin = plugin is not None
        # To refine a plan takes a core for as long as it may, beside ranks that share this machine's.
        block = {"refine_s": 0.0, **(plugin or {}), "output_dir": str(folder), "gpu": {"backend": "emulated"}}
        times = {"forward_time_s": list(forward_s), "backward_time_s": list(backward_s)}
        block["emulation"] = {**times, **(emulation or {})}
        self._config = parse_config(block)
        self._exchange = LocalExchange()
        self._channels: dict[tuple[int, int, int, str], queue.SimpleQueue[Sent]] = {}
        self._lock = threading.Lock()
        self.is_graph = is_graph
        self._announced, self._ahead = announced, ahead
        self._until, self._over, self._leader = until, False, leader
        self._barrier = threading.Barrier(ranks, timeout=_TIMEOUT_S)
        self._turn = threading.Barrier(ranks, self._look, timeout=_TIMEOUT_S)
        self._energy_j = [[0.0] * ranks for _ in range(len(steps) + 1)]
        self.ran = Ran()

    def run(self) -> Ran:
        """Run it to its end.

        Raises:
            BaseException: what the first rank that failed has raised.
        """
        ranks = [threading.Thread(target=self._rank, args=(rank,), name=f"rank {rank}") for rank in range(self._ranks)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if self.ran.errors:
            raise self.ran.errors[0]
        for number in range(len(self.ran.times_s)):
            before, after = self._energy_j[number], self._energy_j[number + 1]
            each = [after[rank] - before[rank] for rank in range(self._ranks)]
            replicas = [each[first : first + self._stages] for first in range(0, self._ranks, self._stages)]
            self.ran.energies_j.append(sum(each))
            self.ran.by_replica_j.append([sum(of_one) for of_one in replicas])
        if self._with_plugin:
            self.ran.summary = json.loads((self._folder / "summary.json").read_text())
            self.ran.states = states_of(self._folder, len(self.ran.times_s))
        return self.ran

    # A rank.

    def _rank(self, rank: int) -> None:
        try:
            self._train(rank)
        except BaseException as error:
            self.ran.errors.append(error)
            self._barrier.abort()
            self._turn.abort()

    def _train(self, rank: int) -> None:
        place = Placement(
            rank=rank,
            world_size=self._ranks,
            stage=rank % self._stages,
            stages=self._stages,
            replica=rank // self._stages,
            local_rank=rank,
            device="cpu",
            leader=self._leader,
        )
        path = self._folder / "emulated_gpus" / f"rank{rank}"
        session: Session | None = None
        if self._with_plugin:
            session = start_session(self._config, place, exchange=self._exchange)
            gpu = EmulatedGpu(path)
        else:
            emulation = self._config.emulation
            gpu = EmulatedGpu.create(path, MODELS[emulation.model.lower()], power_limit_w=emulation.power_limit_w)
        stage = _Stage(self, place, session, gpu, self._config)
        self._barrier.wait()
        try:
            for number, step in enumerate(self._steps):
                self._energy_j[number][rank] = gpu.exact_energy_j()
                if session is not None and place.stage == 0:
                    self._announce(session, number, place.replica)
                begin_s = time.monotonic()
                stage.iterate(number, step)
                if rank == 0:
                    self.ran.times_s.append(time.monotonic() - begin_s)
                self._energy_j[number + 1][rank] = gpu.exact_energy_j()
                self._turn.wait()
                if self._over:
                    break
        finally:
            self._barrier.wait()
            if session is not None:
                session.close()

    def _announce(self, session: Session, number: int, replica: int) -> None:
        for ahead in range(0 if number == 0 else self._ahead, self._ahead + 1):
            if self._announced is not None and number + ahead < len(self._steps):
                work = self._announced(self._steps[number + ahead], replica)
                assert session.closed or not session.announce(work, ahead)

    # What ranks have of each other.

    def channel(self, replica: int, source: int, target: int, name: str) -> queue.SimpleQueue[Sent]:
        """Where one stage's transfers to another of its replica go through."""
        with self._lock:
            return self._channels.setdefault((replica, source, target, name), queue.SimpleQueue())

    def _look(self) -> None:
        self._over = self._until()

    def wait_for_all(self) -> None:
        """The optimizer's step, and the loss is exchanged."""
        time.sleep(self._end_s)
        self._barrier.wait()

    def slowness(self, rank: int, iteration: int) -> float:
        """See the class."""
        return self._slow(rank, iteration)


class _Stage:
    """What a pipeline engine is to a session: one stage that executes its stream."""

    def __init__(
        self, job: OneJob, place: Placement, session: Session | None, gpu: EmulatedGpu, config: PerseusConfig
    ) -> None:
        self._job, self._place, self._session, self._gpu = job, place, session, gpu
        self._plain = None if session is not None else EmulatedStage(gpu, config.emulation, place)

    def iterate(self, number: int, step: Step) -> None:
        """One training iteration."""
        session, name = self._session, self._job.schedule
        sizes = step.of(self._place.replica)
        streams = _streams(name, self._place.stages, len(sizes))
        if session is not None:
            session.begin_iteration()
        if self._place.stage == 0 and step.stall_s:
            time.sleep(step.stall_s)
        if session is not None:
            key = f"{name.upper()}/{self._place.stages}x{len(sizes)}"
            session.begin_schedule(key, lambda stage: streams[stage], replayed=self._job.is_graph(number))
        slowness = self._job.slowness(self._place.rank, number)
        for op in streams[self._place.stage]:
            self._execute(op, sizes, slowness)
        if session is not None:
            session.end_schedule()
        self._job.wait_for_all()
        if session is not None:
            session.end_iteration()

    def _execute(self, op: StreamOp, sizes: Sequence[float], slowness: float) -> None:
        stage = self._place.stage
        if isinstance(op, Send):
            sent = Sent(time.monotonic() + self._job.transfer_s)
            self._job.channel(self._place.replica, stage, op.peer, op.channel).put(sent)
            if op.blocking and not sent.received.wait(_TIMEOUT_S):
                raise TimeoutError(f"stage {op.peer} never received")
        elif isinstance(op, Receive):
            sent = self._job.channel(self._place.replica, op.peer, stage, op.channel).get(timeout=_TIMEOUT_S)
            time.sleep(max(0.0, sent.arrives_s - time.monotonic()))
            sent.received.set()
        elif isinstance(op, Compute):
            self._gpu.set_slowdown(sizes[op.microbatch] * slowness)
            self._compute(op)
        elif isinstance(op, Constant) and self._session is not None:
            self._session.tap.begin()
            self._session.tap.end()

    def _compute(self, op: Compute) -> None:
        if self._session is not None:
            self._session.tap.begin()
            self._session.tap.end()
        elif self._plain is not None:
            self._plain.begin(op)
            self._plain.finish()


@cache
def _streams(schedule: str, stages: int, microbatches: int) -> list[StageStream]:
    return SCHEDULES[schedule](stages, microbatches)
