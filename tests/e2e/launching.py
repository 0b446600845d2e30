"""Starting real multi-process training jobs on this machine's CPU, and reading what they leave."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.again import hold
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("probe.py")
FORK_SERVER = Path(__file__).with_name("fork_server.py")
READ_AT_START = ("PYTHONPATH", "LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
# Our script, with all that it imports; and what DeepSpeed imports as late as in `initialize`.
DEEPSPEED = ("probe", "torch._dynamo", "deepspeed.module_inject")
# Of the arguments of our script.
SAY_WHAT_IS_TRAINED = ("--stages", "--batches-from", "--evaluate-every", "--announce")
SLOWDOWN = 0.15
JOB_TIMEOUT_S = 600.0
"""Only bounds a test that fails anyway: starved by others, processes take minutes to import torch."""
ENDING_S = 40.0
ENDED_S = 40.0
"""Long enough for what takes a moment on a quiet machine."""

BASE_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 1000,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
    "pipeline": {"use_reentrant": False},
}
MIXED: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "gradient_clipping": 1.0,
}


def perseus_block(output_dir: Path, stages: int, **changes: Any) -> dict[str, Any]:
    """A block whose sweep is over after 14 short iterations."""
    block: dict[str, Any] = {
        "enabled": True,
        "output_dir": str(output_dir),
        # On a busy machine times are noisy: with room for that there is always something to save.
        "slowdown": SLOWDOWN,
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
        # Seconds of a core beside every job: only the report looks at the one, and the quickstart has the other.
        "frontier": False,
        "refine_s": 0.0,
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


class Output(threading.Thread):
    """Collects what is written into `inlet`: a pipe, which is never full, and takes it on a full disk too."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._outlet, self.inlet = os.pipe()
        self._said = bytearray()

    def run(self) -> None:
        with os.fdopen(self._outlet, "rb", buffering=0) as said:
            while part := said.read(1 << 16):
                self._said += part

    def text(self) -> str:
        """What has been said by now."""
        return bytes(self._said).decode(errors="replace")


class Job:
    """A job that has been started: an agent process, whose children the ranks are.

    Attributes:
        pid: the agent's, which is also the id of the process group of all.
    """

    def __init__(self, pid: int, status: Callable[[float], int | None], said: Output) -> None:
        self.pid, self._status, self._said = pid, status, said

    def poll(self) -> int | None:
        """Its status; None while it runs."""
        return self._status(0.0)

    def wait(self, timeout_s: float = JOB_TIMEOUT_S) -> Finished:
        """How it ended."""
        status = self._status(timeout_s)
        assert status is not None, f"still running after {timeout_s} s:\n{self._said.text()[-6000:]}"
        self._said.join(10.0)
        return Finished(status, self._said.text())

    def said(self) -> str:
        """Its output by now."""
        return self._said.text()

    def ranks(self) -> list[int]:
        """Process ids of its ranks, rank by rank; none once it has ended."""
        children = ""
        with suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


@contextmanager
def started_ranks(
    ranks: int,
    folder: Path,
    *words: str,
    torchrun: bool = False,
    python: str | Path = sys.executable,
    imports: Sequence[str] = (),
    **environment: str,
) -> Iterator[Job]:
    """Run a command line on every rank, in `folder`, which end with the block.

    Args:
        ranks: how many.
        folder: their current folder.
        words: a script, or `-m` and a module, with arguments.
        torchrun: start them as a user would; else they are forks of a process that has made its `imports` already,
            which is several seconds of both cores less.
        python: another environment's.
        imports: modules, of the folders of our scripts too.
        environment: added to this process's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = Output()
    said.start()
    start = functools.partial(_torchrun if torchrun else _forked, str(python))
    try:
        pid, status = start(ranks, folder, words, imports, {"OMP_NUM_THREADS": "1", **environment}, said.inlet)
    finally:
        os.close(said.inlet)
    job = Job(pid, status, said)
    try:
        yield job
    finally:
        # Under torchrun each rank has a process group of its own.
        for group in (pid, *job.ranks()):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        status(ENDING_S)


_Started = tuple[int, Callable[[float], "int | None"]]


def _torchrun(
    python: str,
    ranks: int,
    folder: Path,
    words: Sequence[str],
    imports: Sequence[str],
    environment: dict[str, str],
    output: int,
) -> _Started:
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    job = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=folder,
        start_new_session=True,
        env={**os.environ, **environment},
    )

    def status(timeout_s: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return job.wait(timeout_s)
        return None

    return job.pid, status


def _forked(
    python: str,
    ranks: int,
    folder: Path,
    words: Sequence[str],
    imports: Sequence[str],
    environment: dict[str, str],
    output: int,
) -> _Started:
    at_start = {name: environment[name] for name in sorted(environment) if name in READ_AT_START}
    server = _server(python, tuple(imports), tuple(at_start.items()))
    environment = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = {"ranks": ranks, "folder": str(folder), "words": words, "environment": environment}
    ours, agents = os.pipe()
    socket.send_fds(server, [json.dumps(job).encode()], [output, agents])
    os.close(agents)
    said = os.fdopen(ours, "rb", buffering=0)
    pid = int(said.readline())
    ended: list[int] = []

    def status(timeout_s: float) -> int | None:
        if not ended and select.select([said], [], [], timeout_s)[0]:
            ended.append(int(said.readline() or -signal.SIGKILL))
            said.close()
        return ended[0] if ended else None

    return pid, status


@functools.cache
def _server(python: str, imports: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> socket.socket:
    """The server of a Python whose processes have made these imports in this environment. It ends with this process."""
    ours, servers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    added = dict(environment)
    folders = (REPOSITORY, FORK_SERVER.parent, REPOSITORY / "tests" / "megatron_support")
    path = os.pathsep.join([added.pop("PYTHONPATH", ""), *map(str, folders)]).lstrip(os.pathsep)
    with servers:
        subprocess.Popen(
            [python, str(FORK_SERVER), str(servers.fileno()), *imports],
            pass_fds=[servers.fileno()],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **added, "PYTHONPATH": path},
        )
    return ours


def run_ranks(
    ranks: int, folder: Path, *words: str, during: Callable[[Job], None] = lambda job: None, **options: Any
) -> Finished:
    """Run a command line on every rank and wait for it; see `started_ranks`. `during` is done while it runs."""

    def once() -> Finished:
        with started_ranks(ranks, folder, *words, **options) as job:
            during(job)
            return job.wait()

    return once() if "--perseus" in words else again_if_torch_aborts(once)


def again_if_torch_aborts(run: Callable[[], Finished]) -> Finished:
    """Run a job without the plugin; a second time if torch aborts at its end, as its threads sometimes make it do."""
    done = run()
    return run() if done.status and "terminate called without an active exception" in done.output else done


@dataclass(frozen=True)
class Probe:
    """A job of `probe.py`.

    Attributes:
        folder: its current folder; its output folder is `out` in there.
        block: of the plugin; None: it runs without.
        do: what is done when, see `Script` there.
        arguments: of the script, names and values.
        ranks: how many.
        config: what DeepSpeed's config has beside `BASE_CONFIG`.
    """

    folder: Path
    block: dict[str, Any] | None
    do: Sequence[tuple[str, str]] = ()
    arguments: Sequence[str] = ()
    ranks: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def started(self, *, torchrun: bool = False, **environment: str) -> Iterator[Job]:
        """Start it; see `started_ranks`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "deepspeed.json"
        plugin = {} if self.block is None else {"perseus": self.block}
        path.write_text(json.dumps({**BASE_CONFIG, **self.config, **plugin}))
        do = [word for what, when in self.do for word in ("--do", what, when)]
        words = (str(PROBE), "--deepspeed_config", str(path), *self.arguments, *do)
        environment = {"DS_ACCELERATOR": "cpu", **environment}
        with started_ranks(self.ranks, self.folder, *words, torchrun=torchrun, imports=DEEPSPEED, **environment) as job:
            yield job

    def run(self, *, torchrun: bool = False, **environment: str) -> Finished:
        """Run it to its end."""

        def once() -> Finished:
            with self.started(torchrun=torchrun, **environment) as job:
                return job.wait()

        return once() if self.block is not None else again_if_torch_aborts(once)

    def facts(self) -> list[dict[str, Any]]:
        """What every rank wrote."""
        return [json.loads((self.folder / f"facts{rank}.json").read_text()) for rank in range(self.ranks)]

    def summary(self) -> dict[str, Any]:
        """Its summary.json."""
        found: dict[str, Any] = json.loads((self.folder / "out" / "summary.json").read_text())
        return found

    def check_identical(self) -> None:
        """The same training without the plugin has the same losses and parameters at every step, bit by bit."""
        facts = self.facts()
        steps = len(facts[0]["parameters"])
        assert steps > 0
        for rank, without in zip(facts, self._without_plugin(facts[0]["did"], steps), strict=True):
            for name in ("losses", "parameters"):
                hold(rank[name] == without[name][: len(rank[name])], f"{name} are those of training without the plugin")

    def _without_plugin(self, did: Sequence[Sequence[str]], steps: int) -> list[dict[str, Any]]:
        """Facts of a job that trains the same, so many steps or more. Jobs that train alike share it."""
        more = [(what, when) for what, when in did if what == "more-batches"]
        pairs = zip(self.arguments[::2], self.arguments[1::2], strict=True)
        arguments = [word for name, value in pairs if name in SAY_WHAT_IS_TRAINED for word in (name, value)]
        same = json.dumps([self.ranks, more, arguments, self.config], sort_keys=True)
        if same not in _WITHOUT or len(_WITHOUT[same][0]["parameters"]) < steps:
            # Some to spare: the next job may need longer until the plugin has said what it waits for.
            arguments += ["--steps", str(steps + 20)]
            without = replace(self, folder=self.folder / "without", block=None, do=more, arguments=arguments)
            without.run().check()
            _WITHOUT[same] = without.facts()
        return _WITHOUT[same]


_WITHOUT: dict[str, list[dict[str, Any]]] = {}
