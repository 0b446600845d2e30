"""A store whose host stops answering while a job trains: one line, clocks free, and a process that ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.exchange.frozen import store_host
from tests.waiting import came_true

_OFF = "perseus is off from here on: "
_RANK_0 = """
import sys, threading, time
from pathlib import Path

from torch.distributed import TCPStore

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.client import StoreClient
from perseus_plugin.exchange.messages import Placement, RankFacts, facts_key
from perseus_plugin.exchange.store import StoreExchange
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.session.start import start_session

folder, port = sys.argv[1:]
store = TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
def client():
    made = StoreClient(store, "frozen", limit_s=2.0)
    made.enter("session")
    return made


other = StoreExchange(client(), 1)
other.tell(facts_key(1), RankFacts(stage=1, facts={}).model_dump())
config = parse_config({
    "output_dir": folder,
    "gpu": {"backend": "emulated"},
    "emulation": {"forward_time_s": [0.002, 0.002], "backward_time_s": [0.004, 0.004]},
    "profiling": {"warmup_steps": 1, "clocks_mhz": [1410, 705], "steps_per_clock": 10000},
})
where = Placement(rank=0, world_size=2, stage=0, stages=2, replica=0, local_rank=0, device="cpu")
session = start_session(config, where, exchange=StoreExchange(client()))
streams = one_f_one_b(2, 2)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(1), ended.set()), daemon=True).start()
print("training", flush=True)
while not ended.is_set():
    session.begin_iteration()
    session.begin_schedule("1F1B", lambda stage: streams[stage])
    for op in streams[0]:
        if isinstance(op, (Compute, Constant)):
            session.tap.begin()
            time.sleep(0.005)
            session.tap.end()
    session.end_schedule()
    session.end_iteration()
print("trained", flush=True)
"""


def test_a_frozen_store_ends_the_session_with_one_line_and_the_process_ends(tmp_path: Path) -> None:
    with store_host() as host:
        command = [sys.executable, "-c", _RANK_0, str(tmp_path), str(host.port)]
        job = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert job.stdin is not None
        assert job.stdout is not None
        assert job.stderr is not None
        said: list[str] = []
        listener = threading.Thread(target=said.extend, args=(job.stderr,))
        listener.start()
        try:
            assert job.stdout.readline() == "training\n", said
            gpu = EmulatedGpu(tmp_path / "emulated_gpus" / "rank0")
            assert came_true(lambda: gpu.locked_mhz() is not None), "the sweep has begun"
            host.freeze()
            assert came_true(lambda: any(_OFF in line for line in said))
            assert came_true(lambda: gpu.locked_mhz() is None), "the clock is free while training goes on"
            job.stdin.write("\n")
            job.stdin.flush()
            assert job.wait(60) == 0
            assert job.stdout.read() == "trained\n"
        finally:
            job.kill()
            listener.join(20)
            job.communicate()
    (line,) = [line for line in said if _OFF in line]
    assert "in the job's store: its host has not answered for 2 s. Training goes on at full clocks" in line
    assert not any("Traceback" in line for line in said), said
