"""Starts jobs of ranks that need not import torch and a framework first: each is a fork of one process that has.

    python fork_server.py SOCKET MODULE...

imports the modules, and takes jobs from the socket with this file descriptor until it is closed. A job is one message:
a JSON object `{"ranks", "folder", "words", "environment"}`, with two file descriptors, for its output and its status.
It becomes an agent, in a session of its own, that does what torchrun does: ranks with their places in the environment;
when one fails the others are ended. The agent writes its process id and at last its status.

Forked before anything has started a thread, a rank is what a fresh process is after its imports: it runs the command
line as the main program and ends as any interpreter does. What a process reads only when it starts (PYTHONPATH,
LD_LIBRARY_PATH) has to be in the environment of the server itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 20
ENDING_S = 30


def next_job(server: socket.socket) -> dict[str, Any] | None:
    """In a forked agent: what it is to do. In the server: None, when there will be no more."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, MOST_BYTES, 2)
        if not message:
            return None
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            output, status = descriptors
            for standard in (1, 2):
                os.dup2(output, standard)
            os.close(output)
            server.close()
            job: dict[str, Any] = json.loads(message)
            return {**job, "status": status}
        for descriptor in descriptors:
            os.close(descriptor)


def become_rank(job: dict[str, Any]) -> bool:
    """Whether this is a rank, in its folder and with its environment; the agent returns when all have ended."""
    os.write(job["status"], f"{os.getpid()}\n".encode())
    pids = set()
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.close(job["status"])
            os.chdir(job["folder"])
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
            os.environ.update(job["environment"], **{name: str(value) for name, value in places.items()})
            return True
        pids.add(pid)
    failed = False
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and not failed:
            failed = True
            signal.signal(signal.SIGALRM, lambda *_: _end(pids, signal.SIGKILL))
            signal.alarm(ENDING_S)
            _end(pids, signal.SIGTERM)
    os.write(job["status"], f"{int(failed)}\n".encode())
    return False


def _end(pids: set[int], how: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, how)


def run(words: list[str]) -> None:
    """Run `SCRIPT ARGUMENTS` or `-m MODULE ARGUMENTS` as the main program."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as server:
        for module in sys.argv[2:]:
            importlib.import_module(module)
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads != 1:
            raise SystemExit(f"{threads} threads after the imports: cannot fork")
        # What is there stays shared: collecting garbage would write to all of it.
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for agents
        job = next_job(server)
    if job is None:
        os._exit(0)
    if not become_rank(job):
        os._exit(0)
    run(job["words"])


if __name__ == "__main__":
    main()
