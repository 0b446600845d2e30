"""What the plugin costs the job's store: calls per rank, and time of the process that hosts it.

Real: the `TCPStore`, in a process of its own, its clients, and the sessions' own threads with all that they tell. Made
up: iterations of a second under a plan, and that ranks of a group are on a machine of their own.

*Steady state*: groups of ranks run as those of a job of `--ranks` would; calls are counted by sort and taken times the
machines and ranks that are not here. That mix is then replayed in full, over as many connections as there are machines,
and the time of the store's process is read from the kernel.

*Planned steps*: what one that is planned for its own batch takes, as rank 0 passes a part on to each stage of each
pipeline, and every rank fetches its own. Made up: the numbers in them.

*Start-up*: `--start` ranks, threads of some processes, meet and agree on a profile, each with clients of its own.

    python benchmarks/store_traffic.py
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from perseus_plugin.config import parse_config
from perseus_plugin.control.selection import Selection
from perseus_plugin.exchange.client import StoreClient
from perseus_plugin.exchange.messages import (
    NEWS,
    REUSE,
    News,
    Placement,
    PlanPart,
    PlanParts,
    RankFacts,
    batch_key,
    facts_key,
    part_key,
)
from perseus_plugin.exchange.packing import packed
from perseus_plugin.exchange.store import StoreExchange, meet, wait_for
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.leader.job import Job
from perseus_plugin.planning.batch_process import MOST_INSTRUCTIONS, PlannedStep
from perseus_plugin.profiling.known import Known
from perseus_plugin.reporting.live.relay import FigureRelay
from perseus_plugin.session.lifetime import Lifetime
from perseus_plugin.session.link import FinishedIteration, Link
from perseus_plugin.session.worker import SessionWorker

PER_NODE, STAGES = 8, 8
ITERATION_S, MICROBATCHES = 1.0, 32
_HOST = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class Host:
    """The process that hosts the store."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.pid, self.port = process.pid, int(process.stdout.readline())

    def cpu_s(self) -> float:
        """Processor time it has taken, with a resolution of nanoseconds."""
        tasks = Path(f"/proc/{self.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9

    def client(self) -> TCPStore:
        """One more connection."""
        return TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False)

    def clients(self, count: int) -> list[TCPStore]:
        """So many; torch takes a while for each."""
        with ThreadPoolExecutor(64) as pool:
            return list(pool.map(lambda _: self.client(), range(count)))


@contextmanager
def host() -> Iterator[Host]:
    """A store, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        yield Host(process)
    finally:
        process.kill()
        process.wait()


class Counting:
    """A client that counts its calls, by sort and size of what is set."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: Counter[tuple[str, int]] = Counter()

    def clone(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def counted(*arguments: Any) -> Any:
            size = len(arguments[1]) if name == "set" else 0
            self.calls[name, 1 << math.ceil(math.log2(size)) if size else 0] += 1
            return method(*arguments)

        return counted


# Steady state.


class Rank:
    """One rank's session thread, fed with iterations.

    Args:
        store: the rank's client.
        rank, ranks: which, of how many.
        node: where it is.
        folder: for its files.
    """

    def __init__(self, store: Counting, rank: int, ranks: int, node: str, folder: Path) -> None:
        self.store = store
        self.exchange = StoreExchange(StoreClient(store, "p"), rank, node)
        where = Placement(
            rank=rank,
            world_size=ranks,
            stage=rank % STAGES,
            stages=STAGES,
            replica=rank // STAGES,
            local_rank=rank % PER_NODE,
            device="cpu",
        )
        self._link = Link(Timetable(Round(0, (1410,)), 1, 2))
        job = Job(
            config=parse_config({}),
            placement=where,
            exchange=self.exchange,
            output_dir=folder,
            selection=Selection("nvml", "nvml:GPU-0", "A100", (1410, 1200)),
            known=Known(True),
            timetable=self._link.timetable,
        )
        self.exchange.on_news(self._link.wake.set)
        relay = FigureRelay(self.exchange, [], False, writes=False)
        self._worker = SessionWorker(job, link=self._link, lifetime=Lifetime(None), helper=None, relay=relay)
        self._worker.start()
        self._number = 0

    def iterate(self) -> None:
        """An iteration ends: every instruction as long as planned."""
        operations: list[Compute | Constant] = []
        for microbatch in range(MICROBATCHES):
            operations += [Compute("forward", microbatch), Compute("backward", microbatch)]
        hooked, slots = hooked_operations(operations)
        begin_s = self._number * ITERATION_S
        record = IterationRecord(self._number, "1F1B", hooked, slots, True, begin_s)
        length_s = ITERATION_S / len(operations)
        for place in range(len(operations)):
            record.starts_s.append(begin_s + place * length_s)
            record.ends_s.append(begin_s + (place + 1) * length_s)
        record.end_s = begin_s + ITERATION_S
        self._link.finished(FinishedIteration(self._link.timetable.at(self._number), record))
        self._number += 1

    def close(self) -> None:
        self._worker.close()
        self.exchange.close()


def plan(client: StoreExchange) -> None:
    """All ranks follow a plan from the first iteration on."""
    count = 2 * MICROBATCHES
    part = PlanPart(
        version=1,
        schedule="1F1B",
        clocks_mhz=(1200, 1410) * MICROBATCHES,
        times_s=(ITERATION_S / count,) * count,
    )
    for stage in range(STAGES):
        client.publish(part_key(1, stage), PlanParts(version=1, parts=(part,)).model_dump())
    client.tell_all(NEWS, News(sequence=1, switch=1, action="follow", version=1, since=1).model_dump())


def counted(ranks: int, nodes: int, seconds: float) -> dict[tuple[str, int], float]:
    """Calls per second of one machine in a job of so many ranks, by sort and size; with what rank 0 does for it."""
    with host() as served, tempfile.TemporaryDirectory() as folder:
        StoreClient(served.client(), "p").count("nodes", ranks // PER_NODE - nodes)
        first = Counting(served.client())
        lead = StoreExchange(StoreClient(first, "p"))
        job = secrets.token_hex(8)
        made = [
            Rank(Counting(served.client()), PER_NODE + rank, ranks, f"{job}/{rank // PER_NODE}", Path(folder))
            for rank in range(nodes * PER_NODE)
        ]
        plan(lead)
        began_s, before = 0.0, Counter[tuple[str, int]]()
        settle = 20
        for number in range(settle + round(seconds / ITERATION_S)):
            if number == settle:
                began_s = time.monotonic()
                before = sum((rank.store.calls for rank in made), handled(first))
            for rank in made:
                rank.iterate()
            time.sleep(ITERATION_S)
        took_s = time.monotonic() - began_s
        calls = sum((rank.store.calls for rank in made), handled(first)) - before
        for rank in made:
            rank.close()
        lead.close()
        return {sort: count / took_s / nodes for sort, count in sorted(calls.items())}


def handled(first: Counting) -> Counter[tuple[str, int]]:
    """Calls of rank 0 that grow with the job: its looks at counters do not."""
    return Counter({sort: count for sort, count in first.calls.items() if sort[0] != "add"})


def replayed(per_node_hz: dict[tuple[str, int], float], ranks: int, seconds: float) -> tuple[float, float, int]:
    """The store's share of a core when all machines ask as one does, calls per second, and how many connections."""
    nodes = ranks // PER_NODE
    with host() as served:
        clients = served.clients(nodes)
        first = clients[0]
        first.set("k", b"x" * 1024)
        turns = [(sort, nodes * hz) for sort, hz in per_node_hz.items()]
        done = 0
        began_s, before_s = time.monotonic(), served.cpu_s()
        due = [began_s] * len(turns)
        while (now_s := time.monotonic()) < began_s + seconds:
            for place, ((name, size), hz) in enumerate(turns):
                if due[place] <= now_s:
                    due[place] += 1 / hz
                    call(clients[done % nodes], name, size)
                    done += 1
            time.sleep(max(0.0, min(due) - time.monotonic()))
        took_s = time.monotonic() - began_s
        return (served.cpu_s() - before_s) / took_s, done / took_s, nodes


def call(client: TCPStore, name: str, size: int) -> None:
    """One call as the plugin makes them."""
    match name:
        case "add":
            client.add("n", 0)
        case "check":
            client.check(["k"])
        case "get":
            client.get("k")
        case "set":
            client.set("k/set", b"x" * size)
        case "delete_key":
            client.delete_key("k/none")


# Planned steps.


def planned_step(ranks: int) -> tuple[int, int, float, float, int, float]:
    """Calls of rank 0, bytes, its seconds, its processor seconds; calls of all ranks, the store's processor seconds."""
    replicas, count = ranks // STAGES, 2 * MICROBATCHES

    def part() -> str:
        options = {
            str(place): [(1410 - 15 * row, random.random(), 100 + 200 * random.random()) for row in range(5)]
            for place in range(count)
        }
        return packed({"times_s": [random.random() for _ in range(3 * count)], "options": options})

    line = json.dumps(asdict(PlannedStep([[part() for _ in range(STAGES)] for _ in range(replicas)])))
    with host() as served:
        asked = Counting(served.client())
        client, before_s = StoreClient(asked, "p"), served.cpu_s()
        begun_s, cpu_s = time.monotonic(), time.process_time()
        step = PlannedStep(**json.loads(line))
        for replica, stages in enumerate(step.replicas):
            for stage, packed_part in enumerate(stages):
                client.publish(batch_key(0, replica, stage), packed_part)
        took_s, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
        told = sum(asked.calls.values())
        for rank in range(ranks):
            assert client.fetch(batch_key(0, rank // STAGES, rank % STAGES))
        client.close()
        return told, len(line), took_s, cpu_s, sum(asked.calls.values()) - told, served.cpu_s() - before_s


# Start-up.


def start(rank: int, ranks: int, store: Any, calls: list[int]) -> None:
    """What one rank does until training begins."""
    asked = Counting(store)
    client = StoreClient(asked, "perseus/1")
    session = meet(client, rank, ranks, 300.0)
    client.enter(session)
    exchange = StoreExchange(client, rank, f"{session}/{rank // PER_NODE}")
    exchange.tell(facts_key(rank), RankFacts(stage=rank % STAGES, facts={"gpu": "A100" * 20}).model_dump())
    if rank == 0:
        assert len(wait_for(exchange.told, [facts_key(one) for one in range(ranks)], 300.0)) == ranks
        exchange.tell_all(REUSE, {"profile": False})
    assert wait_for(exchange.heard, [REUSE], 300.0, 0.5)
    calls.append(sum(asked.calls.values()))
    time.sleep(2)  # others hear it from here
    exchange.close()


def start_some(port: int, first: int, count: int, ranks: int, connected: Any, told: Any) -> None:
    """Some of the ranks, as threads."""
    calls: list[int] = []
    with ThreadPoolExecutor(64) as pool:
        stores = list(pool.map(lambda _: TCPStore("127.0.0.1", port, wait_for_workers=False), range(count)))
    connected.wait()  # before the first call, as the training has its connections before we have ours
    connected.wait()
    threads = [threading.Thread(target=start, args=(first + one, ranks, stores[one], calls)) for one in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.put(calls)


def started(ranks: int, processes: int) -> tuple[float, list[int], float]:
    """Time of the store's process until all ranks have started, calls per rank, and how long it took."""
    context = multiprocessing.get_context("spawn")
    with host() as served:
        told = context.SimpleQueue()
        size = math.ceil(ranks / processes)
        connected = context.Barrier(1 + len(range(0, ranks, size)))
        made = [
            context.Process(
                target=start_some, args=(served.port, first, min(size, ranks - first), ranks, connected, told)
            )
            for first in range(0, ranks, size)
        ]
        for process in made:
            process.start()
        connected.wait()
        begun_s, before_s = time.monotonic(), served.cpu_s()
        connected.wait()
        calls = [count for _ in made for count in told.get()]
        for process in made:
            process.join()
        return served.cpu_s() - before_s, calls, time.monotonic() - begun_s


def table(rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--nodes", type=int, default=3, help="machines that are really here")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--batches", action="store_true", help="only what planned steps take")
    parser.add_argument("--start", type=int, default=256, help="ranks whose start-up is measured, 0: none")
    parser.add_argument("--processes", type=int, default=4, help="that the ranks which start are threads of")
    arguments = parser.parse_args()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # of the processes that are started
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    logging.getLogger("perseus_plugin").setLevel(logging.ERROR)
    if arguments.batches:
        table(
            [("ranks", "calls of rank 0", "bytes", "seconds", "CPU", "calls of all", "CPU of the store"), ("---",) * 7]
        )
        for ranks in arguments.ranks:
            if ranks * 2 * MICROBATCHES > MOST_INSTRUCTIONS:
                table([(f"{ranks:,}", "not planned for: more than can be in time", *("",) * 5)])
                continue
            calls, size, took_s, cpu_s, fetches, stores_s = planned_step(ranks)
            row = (f"{calls:,}", f"{size:,}", f"{took_s:.2f} s", f"{cpu_s:.2f} s", f"{fetches:,}", f"{stores_s:.2f} s")
            table([(f"{ranks:,}", *row)])
        return
    table([("ranks", "calls per rank and second", "calls per second", "connections", "of a core"), ("---",) * 5])
    for ranks in arguments.ranks:
        per_node = counted(ranks, arguments.nodes, arguments.seconds)
        share, calls_hz, connections = replayed(per_node, ranks, 20.0)
        per_rank = sum(per_node.values()) / PER_NODE
        table([(f"{ranks:,}", f"{per_rank:.2f}", f"{calls_hz:,.0f}", f"{connections:,}", f"{100 * share:.1f} %")])
        print(f"<!-- a machine, calls per second: {per_node} -->")
    if arguments.start:
        cpu_s, calls, took_s = started(arguments.start, arguments.processes)
        print(
            f"start-up of {arguments.start:,} ranks: {cpu_s:.2f} s of the store's process, "
            f"{sum(calls) / len(calls):.0f} calls per rank (most: {max(calls)}), all started after {took_s:.0f} s"
        )


if __name__ == "__main__":
    main()
