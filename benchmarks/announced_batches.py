"""A job whose sequence lengths vary, announced and not: iteration time and energy as run, against no plugin.

Pipelines as threads with real sessions, helper and planner processes, on emulated GPUs (`tests/one_job.py`); or real
DeepSpeed jobs with a process per rank (`tests/e2e/probe.py`), whose instructions take their time on emulated GPUs. The
works of microbatches vary by a factor of three within every step. The same steps run three times at the same time on
the same machine, each job in processes of its own: announced, not announced, and without the plugin. The profile is
that of the emulated GPUs, so that nothing is swept.

    python benchmarks/announced_batches.py [--steps 180] [--scale 1.5]
    python benchmarks/announced_batches.py --deepspeed --replicas 1 [--steps 180] [--scale 1.5]

Each iteration is compared with the one of the same batch without the plugin. All three jobs begin it together, so that
what else the machine does befalls all of them. In each process a thread that only sleeps sees stalls; iterations within
which one woke it late are left out of the second table, whatever they took. Compared are iterations from the first on
that ran under a plan for its own batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import A100, load_class
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD, Compute
from perseus_plugin.planning.robust import error_of_mean
from perseus_plugin.profiling.profile import Measurement, Profile, save_profile
from perseus_plugin.reporting.record.iterations import OWN_BATCH
from perseus_plugin.session.emulation import EmulatedStage
from tests.one_job import OneJob, Ran, Step, states_of
from tests.ports import free_port

FORWARD_S, BACKWARD_S = (0.015, 0.021), (0.030, 0.042)  # of a work of 1, in the first stage and the last
LEAST_WORK, MOST_WORK = 1.0, 3.0
CLOCKS_MHZ = (1410, 1335, 1260, 1185, 1110, 1035, 960, 885, 810)
NAMES = ("announced", "not announced", "without")
LOOK_S, STALL_S, WAIT_S = 0.002, 0.005, 300.0
HELD, NARROW = 0.002, 0.002  # what an iteration may be longer by, and how well the mean is to be known, as shares


# As late as in `initialize` DeepSpeed imports some of them.
DEEPSPEED = ("torch._dynamo", "deepspeed.module_inject", "tests.e2e.probe")


@dataclass(frozen=True)
class Job:
    """One of the three, as its processes are told of it; one of another framework has a port of its own."""

    name: str
    folder: Path
    steps: tuple[Step, ...]
    stages: int
    replicas: int
    ahead: int
    scale: float
    port: int = 0

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas

    @property
    def own_folder(self) -> Path:
        return self.folder / self.name.replace(" ", "_")

    @property
    def forward_s(self) -> list[float]:
        return self._between(FORWARD_S)

    @property
    def backward_s(self) -> list[float]:
        return self._between(BACKWARD_S)

    @property
    def plugin(self) -> dict[str, Any] | None:
        """The block, without what says of which GPUs; None: without the plugin."""
        if self.name == "without":
            return None
        known = {"load": str(self.folder / "profile.csv"), "blocking_power_w": A100.blocking_w, "warmup_steps": 2}
        return {"profiling": known, "frontier": False, "log_level": "info"}

    def _between(self, ends: tuple[float, float]) -> list[float]:
        return [self.scale * each for each in np.linspace(*ends, self.stages).tolist()]


@dataclass(frozen=True)
class Seen:
    """What a job did, when its iterations ended, and the stalls in its processes (begin and end)."""

    ran: Ran
    ends_s: list[float] = field(default_factory=list)
    stalls_s: list[tuple[float, float]] = field(default_factory=list)


Answers = SimpleQueue[tuple[str, int, Seen]]
"""With the names of jobs and the ranks that tell."""


def write_profile(job: Job) -> None:
    """That of a microbatch of the mean work."""
    rows = []
    for kind, of_stage in ((FORWARD, job.forward_s), (BACKWARD, job.backward_s)):
        load = load_class(kind)
        for stage, one_s in enumerate(of_stage):
            for clock in CLOCKS_MHZ:
                time_s = one_s * (LEAST_WORK + MOST_WORK) / 2 * A100.stretch(load, clock)
                rows.append((stage, kind, Measurement(clock, time_s, time_s * A100.power_w(load, clock))))
    save_profile(Profile.from_rows(rows), job.folder / "profile.csv")


@contextmanager
def looking(stalls_s: list[tuple[float, float]], together: Barrier) -> Iterator[None]:
    """See stalls of this process meanwhile. Nobody waits for one that fails."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            begin_s = time.monotonic()
            time.sleep(LOOK_S)
            end_s = time.monotonic()
            if end_s - begin_s - LOOK_S > STALL_S:
                stalls_s.append((begin_s, end_s))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    except BaseException:
        together.abort()
        raise
    finally:
        over.set()
        thread.join()


def run_threads(job: Job, together: Barrier, answers: Answers) -> None:
    """Run one job; its iterations begin when those of the others do."""
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    ends_s, stalls_s = list[float](), list[tuple[float, float]]()

    def ended() -> bool:
        ends_s.append(time.monotonic())
        together.wait(WAIT_S)
        return False

    def works(step: Step, replica: int) -> list[float]:
        return [1000 * size for size in step.of(replica)]

    one = OneJob(
        job.own_folder,
        job.steps,
        forward_s=job.forward_s,
        backward_s=job.backward_s,
        replicas=job.replicas,
        plugin=job.plugin,
        until=ended,
        announced=works if job.name == "announced" else None,
        ahead=job.ahead,
    )
    with looking(stalls_s, together):
        ran = one.run()
    answers.put((job.name, 0, Seen(ran, ends_s, stalls_s)))


def run_rank(job: Job, rank: int, together: Barrier, answers: Answers) -> None:
    """Be one rank of a DeepSpeed job, whose iterations begin when those of the others do."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "MASTER_PORT": job.port}
    os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    seen = Seen(Ran())
    with looking(seen.stalls_s, together):
        train(job, rank, seen, together)
    answers.put((job.name, rank, seen))


def train(job: Job, rank: int, seen: Seen, together: Barrier) -> None:
    """Train as this rank."""
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    import perseus_plugin
    from tests.e2e import probe

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    layers = [*probe.layers()[:1], *(probe.Layer() for _ in range(2 * job.stages)), *probe.layers()[-1:]]
    module = PipelineModule(layers=layers, num_stages=job.stages, loss_fn=probe.loss, activation_checkpoint_interval=0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(job.steps[0].of(0)),
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
    }
    engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    replica, folder = engine.grid.get_data_parallel_id(), job.own_folder
    path = folder / "emulated_gpus" / f"rank{rank}"
    emulation = {"forward_time_s": job.forward_s, "backward_time_s": job.backward_s}
    if job.plugin is None:
        gpu = EmulatedGpu.create(path)
        place = Placement(
            rank=rank,
            world_size=job.ranks,
            stage=engine.stage_id,
            stages=job.stages,
            replica=replica,
            local_rank=rank,
            device="cpu",
        )
        emulate(engine, EmulatedStage(gpu, parse_config({"emulation": emulation}).emulation, place))
    else:
        its_own = {"output_dir": str(folder), "gpu": {"backend": "emulated"}, "emulation": emulation, "refine_s": 0.0}
        perseus_plugin.enable(engine, {**job.plugin, **its_own})
        gpu = EmulatedGpu(path)

    def tokens(step: int) -> list[int]:
        sizes = job.steps[step % len(job.steps)].of(replica)
        return [round(size * probe.LENGTH / MOST_WORK) for size in sizes]

    steps = probe.padded(probe.batches(1, 3), tokens)
    if job.name == "announced":
        steps = perseus_plugin.announced(steps, probe.tokens_of, ahead=job.ahead)
    data, lengths = itertools.chain.from_iterable(steps), probe.Lengths(engine, gpu)
    for step in range(len(job.steps)):
        lengths.step(tokens(step))
        together.wait(WAIT_S)
        begin_s, begin_j = time.monotonic(), gpu.exact_energy_j()
        engine.train_batch(data)
        seen.ends_s.append(time.monotonic())
        seen.ran.times_s.append(seen.ends_s[-1] - begin_s)
        seen.ran.energies_j.append(gpu.exact_energy_j() - begin_j)
    engine.destroy()
    torch.distributed.barrier()
    if job.plugin is not None:
        seen.ran.states = states_of(folder, len(job.steps))
        seen.ran.summary = json.loads((folder / "summary.json").read_text())


def emulate(engine: Any, stage: EmulatedStage) -> None:
    """Let a pipeline engine's instructions take as long as on this GPU, as they do under a session."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def instruction(*args: Any, **kwargs: Any) -> Any:
            stage.begin(Compute(kind, 0))
            result = function(*args, **kwargs)
            stage.finish()
            return result

        return instruction

    usual = type(engine)._INSTRUCTION_MAP
    engine._INSTRUCTION_MAP = {
        **usual,
        ForwardPass: timed(FORWARD, usual[ForwardPass]),
        BackwardPass: timed(BACKWARD, usual[BackwardPass]),
    }


def joined(parts: dict[int, Seen]) -> Seen:
    """Those of a job's processes, by the first of its ranks."""
    first = parts[0]
    energies_j = np.sum([part.ran.energies_j for part in parts.values()], axis=0).tolist()
    stalls_s = [stall for part in parts.values() for stall in part.stalls_s]
    return Seen(replace(first.ran, energies_j=energies_j), first.ends_s, stalls_s)


def against(ran: Ran, other: Ran, which: list[int]) -> list[tuple[float, float]]:
    """Time and energy of these iterations against the same ones of another job, as shares, with 95 % errors."""
    said = []
    for mine, theirs in ((ran.times_s, other.times_s), (ran.energies_j, other.energies_j)):
        given, usual = (np.array([values[i] for i in which]) for values in (mine, theirs))
        share = given.sum() / usual.sum() - 1
        said.append((float(share), error_of_mean(usual / usual.mean() * (given / usual - 1 - share))))
    return said


def table(seen: dict[str, Seen], which: list[int]) -> tuple[float, float]:
    """Print it; returns the announced job's time against the one that is not announced, and its error."""
    announced, usual, without = (seen[name].ran for name in NAMES)
    own = [i for i in which if announced.states[i] == OWN_BATCH]
    told = {
        "announced, against no plugin": against(announced, without, which),
        "not announced, against no plugin": against(usual, without, which),
        "announced, against not announced": against(announced, usual, which),
    }
    if 2 <= len(own) < len(which):
        told["those under plans of their own, against no plugin"] = against(announced, without, own)
    iteration_s = sum(without.times_s[i] for i in which) / len(which)
    print(f"\n| iterations of {iteration_s:.2f} s | time | energy |\n|---|---|---|")
    for name, figures in told.items():
        said = [f"{100 * share:+.2f} +- {100 * error:.2f}" for share, error in figures]
        print(f"| {name} | {' | '.join(said)} |")
    return told["announced, against not announced"][0]


def stalled(seen: dict[str, Seen]) -> set[int]:
    """Iterations within which a thread that only sleeps was woken late."""
    stalls_s = np.array(sorted(stall for one in seen.values() for stall in one.stalls_s)).reshape(-1, 2)
    found = set()
    for one in seen.values():
        for number, (end_s, took_s) in enumerate(zip(one.ends_s, one.ran.times_s, strict=True)):
            if np.any((stalls_s[:, 0] < end_s) & (stalls_s[:, 1] > end_s - took_s)):
                found.add(number)
    return found


def run_all(jobs: list[Job], is_deepspeed: bool) -> dict[str, Seen]:
    """What the jobs did, side by side."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    fresh: Any = multiprocessing.get_context("forkserver" if is_deepspeed else "spawn")
    multiprocessing.set_forkserver_preload(list(DEEPSPEED))
    members = [(job, rank) for job in jobs for rank in range(job.ranks if is_deepspeed else 1)]
    together, answers = fresh.Barrier(len(members)), fresh.SimpleQueue()
    if is_deepspeed:
        processes = [fresh.Process(target=run_rank, args=(*of, together, answers)) for of in members]
    else:
        processes = [fresh.Process(target=run_threads, args=(job, together, answers)) for job, _ in members]
    for process in processes:
        process.start()
    parts: dict[str, dict[int, Seen]] = {job.name: {} for job in jobs}
    told = 0
    while told < len(members) and (any(one.is_alive() for one in processes) or not answers.empty()):
        if answers.empty():
            time.sleep(0.1)
        else:
            name, rank, part = answers.get()
            parts[name][rank] = part
            told += 1
    for process in processes:
        process.join()
    if told < len(members):
        sys.exit("a job failed; see above")
    return {name: joined(of) for name, of in parts.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--deepspeed", action="store_true", help="real jobs, with a process per rank")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--ahead", type=int, default=6)
    parser.add_argument("--scale", type=float, default=1.5, help="of all times")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)

    def sizes() -> tuple[float, ...]:
        return tuple(draw.uniform(LEAST_WORK, MOST_WORK) for _ in range(options.microbatches))

    steps = tuple(Step(tuple(sizes() for _ in range(options.replicas))) for _ in range(options.steps))
    with tempfile.TemporaryDirectory() as folder:
        shared = (steps, options.stages, options.replicas, options.ahead, options.scale)
        jobs = [Job(name, Path(folder), *shared, free_port() if options.deepspeed else 0) for name in NAMES]
        write_profile(jobs[0])
        seen = run_all(jobs, options.deepspeed)
    announced, usual = seen["announced"].ran, seen["not announced"].ran
    own = [i for i, state in enumerate(announced.states) if state == OWN_BATCH]
    which = [
        i
        for i in range(own[0] if own else options.steps, options.steps)
        if announced.states[i] in ("plan", OWN_BATCH) and usual.states[i] == "plan"
    ]
    print(f"\n{len(which)} iterations, {len({*own} & {*which})} of them under plans of their own")
    batches = announced.summary["batches"]
    print(batches)
    if batches["saving_percent"] is not None:
        print(f"promised at last of iterations under plans of their own: {-batches['saving_percent']:+.2f} % energy")
    if len(which) < 2:
        print(f"states: {announced.states}\n{usual.states}")
        return
    table(seen, which)
    apart = stalled(seen)
    calm = [number for number in which if number not in apart]
    print(f"\nwithout the {len(which) - len(calm)} in which a thread that only sleeps woke {1000 * STALL_S:g} ms late:")
    if len(calm) < 2:
        print("none is left: the machine is too busy")
        return
    share, error = table(seen, calm)
    narrow = "yes" if error < NARROW else "no"
    held = "yes" if share + error <= HELD else "no" if share - error > HELD else "not known"
    print(f"\ntime known to {100 * NARROW:g} %: {narrow}; at {100 * HELD:+g} % at most: {held}")


if __name__ == "__main__":
    main()
