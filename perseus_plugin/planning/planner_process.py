"""Rank 0's side of the planner: asks it, and starts it again when it is lost."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from perseus_plugin.errors import PerseusError, PlanError, lacking, os_problem, plain
from perseus_plugin.exchange import processes
from perseus_plugin.planning.child import DROP, Child, ChildLostError
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.planning.work import BRAKE_S

logger = logging.getLogger(__name__)

PAUSES_S = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Before it is started again, after it was lost once, twice, ... over one request."""
TRIAL_S = 20.0
"""How long a job that starts waits for another Python to have loaded the solver."""
IDLE_S = 60.0
"""A planner at work takes processor time, however busy the machine is."""


class PlannerProcess:
    """Starts the planner and asks it; every method but `close` returns at once.

    The process starts ahead of the first request, so that loading the solver costs no time when a plan is wanted. One
    that is lost (killed as memory ran out, or hung) is started again, after a pause, and asked again.

    Args:
        pauses_s: before each new start; with the last one used up, the request has failed.
        limit_s: how long a request may take; None: twice what ends its searches.
        idle_s: for how long it may take no processor time over one.
        wake: called when it has answered, from a thread of its own.
        ahead: whether the process is there ahead of requests; else it is started for each and ends with it.
        python: that runs it; None: this one.
    """

    def __init__(
        self,
        pauses_s: Sequence[float] = PAUSES_S,
        limit_s: float | None = None,
        idle_s: float = IDLE_S,
        wake: Callable[[], None] = lambda: None,
        ahead: bool = True,
        python: str | None = None,
    ) -> None:
        self._ahead, self._python = ahead, python
        self._pauses_s, self._limit_s, self._idle_s, self._wake = pauses_s, limit_s, idle_s, wake
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._child: Child | None = None
        self._answer: PlanAnswer | None = None
        self._busy = False
        if not ahead:
            return
        try:
            self._started()
        except OSError as error:  # it is tried again when there is something to ask
            logger.debug("the planner cannot be started yet: %s", error)

    @property
    def pid(self) -> int | None:
        """Of the process as it was started last; None if it could not be, or has been closed."""
        return None if self._child is None else self._child.pid

    @property
    def busy(self) -> bool:
        """Whether a request is being worked on."""
        return self._busy

    def submit(self, request: PlanRequest) -> None:
        """Begin a request; one at a time."""
        if self._busy:
            raise PlanError("planner: a request is being worked on already")
        self._busy, self._answer = True, None
        threading.Thread(target=self._ask, args=(request,), name="perseus-planner", daemon=True).start()

    def drop(self) -> None:
        """The request that is worked on is not wanted any more; its answer comes all the same, soon and perhaps empty.

        A process that is being started does not listen yet: to be said again while no answer has come.
        """
        child = self._child
        if self._busy and child is not None:
            child.send(DROP)

    def poll(self) -> PlanAnswer | None:
        """The answer to the last request, once; None while there is none."""
        answer = self._answer
        if answer is not None:  # one that comes just now is for the next call
            self._answer = None
        return answer

    def close(self) -> None:
        """End the process."""
        with self._starting:
            self._closing.set()
        self._rest()

    def _rest(self) -> None:
        with self._starting:
            child, self._child = self._child, None
        if child is not None:
            child.end(patience_s=1.0)

    def _ask(self, request: PlanRequest) -> None:
        begin_s = time.monotonic()
        for pause_s in (*self._pauses_s, None):
            try:
                answer = self._answered(request, begin_s)
                break
            except (ChildLostError, OSError) as error:
                why = os_problem(error) if isinstance(error, OSError) else str(error)
            except (ValueError, KeyError, TypeError, PerseusError) as failure:
                answer = PlanAnswer(None, time.monotonic() - begin_s, str(failure))
                break
            if pause_s is None or self._closing.is_set():
                why = f"the planner's process was lost {len(self._pauses_s) + 1} times; at last it {why}"
                answer = PlanAnswer(None, time.monotonic() - begin_s, why, lost=True)
                break
            logger.warning(
                "the planner's process %s; it is started again in %g s, and training goes on. See to memory on this "
                "machine if it is said again",
                why,
                pause_s,
            )
            self._closing.wait(pause_s)
        if not self._ahead:
            self._rest()
        self._answer = answer
        self._busy = False
        self._wake()

    def _answered(self, request: PlanRequest, begin_s: float) -> PlanAnswer:
        child, limit_s = self._started(), self._limit_s
        if limit_s is None:
            limit_s = 2 * BRAKE_S.get(request.effort, max(BRAKE_S.values()))  # type: ignore[call-overload]
        try:
            child.tell(request.pieces(), limit_s)
            line = child.hear(limit_s, self._idle_s)
        except ChildLostError:
            self._child = None
            raise
        return PlanAnswer.from_dict(json.loads(line), time.monotonic() - begin_s)

    def _started(self) -> Child:
        with self._starting:
            if self._closing.is_set():
                raise ChildLostError("is not wanted any more")
            child, self._child = self._child, None
            if child is not None:
                child.check()
            self._child = child or Child("perseus_plugin.planning.process", str(os.getpid()), python=self._python)
            return self._child


def why_no_planner(python: str | None) -> str:
    """Why no plan can be made, known before there is anything to plan; empty if one can.

    Args:
        python: that is to run the planner; it is tried. None: this one, where the solver is only looked for, as loading
            it takes a second.
    """
    if python is None:
        if importlib.util.find_spec("ortools") is not None:
            return ""
        missing = lacking(ModuleNotFoundError(name="ortools"))
        return f"the planner {missing}; or name the Python of another environment that has it (perseus.planner.python)"
    try:
        tried = subprocess.run(
            processes.command("perseus_plugin.planning.planner", python=python),
            env=processes.environment(python),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TRIAL_S,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:  # slow is not wrong: it has its own time when there is something to plan
        return ""
    except OSError as error:
        why = error.strerror or str(error)
    else:
        if tried.returncode == 0:
            return ""
        said = tried.stderr.decode(errors="replace").strip().splitlines()
        why = plain(said[-1]) if said and tried.returncode > 0 else processes.ending(tried.returncode)
    return (
        f"perseus.planner.python: {json.dumps(python)} cannot run the planner ({why}); allowed: a Python from 3.10 on, "
        f"of an environment with what it needs ({python} -m pip install 'perseus-plugin[planner]')"
    )
