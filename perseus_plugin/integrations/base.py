"""The seam between us and training frameworks: what an adapter calls, in which order, and what all adapters need.

An adapter makes a framework's training loop call a `PipelineSession`. There is no policy in it: it knows where in the
framework an iteration and an instruction begin and end, and nothing of clocks. On every rank:

    session = started(lambda: start_session(config, placement, monitor, facts, about))   # None: train on without us
    session.on_close(take_the_hooks_out)

    with iteration(session):                          # around every training iteration, the optimizer's step included
        if session.begin_schedule(key, stream_of):    # once in it, where the pipeline's work begins
            session.tap.begin(); ...; session.tap.end()   # around every compute and constant operation of the stream
        session.end_schedule()

    session.evaluation()                              # before whatever else runs on the GPU
    session.close()                                   # when training is over

`in_memory.py` has a session that does nothing but note and check these calls. `docs/extending.md` adds a framework.
This module imports nothing of what a session needs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from perseus_plugin.errors import ConfigError, PerseusError, os_problem

if TYPE_CHECKING:
    from perseus_plugin.config import PerseusConfig
    from perseus_plugin.exchange.messages import Placement
    from perseus_plugin.exchange.store import Exchange
    from perseus_plugin.iteration.instructions import StreamOp
    from perseus_plugin.stragglers.external import ExternalFigures

logger = logging.getLogger(__name__)

Function = Callable[..., Any]
_PATCHED = "_perseus_patched"


class Tap(Protocol):
    """Told of the operations of a schedule, each between `begin` and `end`. Neither raises nor waits for the GPU."""

    def begin(self) -> None:
        """The next operation begins: the stream says which one that is."""
        ...

    def end(self) -> None:
        """It has ended, as far as Python is concerned."""
        ...


class PipelineSession(Protocol):
    """What an adapter calls on the training thread; nothing of it raises, blocks or changes what is computed.

    All ranks call it alike: the same iterations with the same keys, of which each rank runs the stream of its own
    stage. Whatever goes wrong, on whatever rank, ends in full clocks and one message; then `closed` is true, and calls
    do nothing. An iteration whose operations are not all seen is not measured; what is called out of order costs that
    iteration and nothing else.

    Attributes:
        tap: called around operations between `begin_schedule` and `end_schedule`; the same object for good.
        closed: whether it has ended, by `close` or a failure; on a thread of its own, so at any time.
    """

    @property
    def tap(self) -> Tap: ...

    @property
    def closed(self) -> bool: ...

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call this once it ends, on whichever thread: the framework shall be as it was."""
        ...

    def begin_iteration(self) -> None:
        """A training iteration begins: before anything of it runs on the GPU."""
        ...

    def begin_schedule(
        self, key: str, stream_of: Callable[[int], Sequence[StreamOp]], *, replayed: bool = False
    ) -> bool:
        """The pipeline's work of this iteration begins.

        Args:
            key: what the schedule is known by, to people too. Another number of stages, microbatches or whatever else
                changes the streams is another key.
            stream_of: the operations of any stage in program order, sends and receives included; asked when the key is
                new, for all stages. Send and receive pairs must match (`perseus_plugin.build_graph` checks that).
            replayed: it runs as one CUDA graph that is launched next; the tap is called where a GPU is emulated only.

        Returns:
            Whether the tap is to be called; where not, calls of it do nothing.
        """
        ...

    def end_schedule(self) -> None:
        """The pipeline's work is over; the loss is still to be exchanged, the optimizer's step may follow. Idempotent.

        Called in the midst of a schedule it says that this iteration is not followed any further.
        """
        ...

    def end_iteration(self) -> None:
        """The iteration has ended, with whatever waits for other ranks; so has its schedule."""
        ...

    def evaluation(self) -> None:
        """Something runs that is no part of training as planned: full clocks, and the iteration is not measured."""
        ...

    def external_figures(self, figures: ExternalFigures) -> None:
        """What another straggler detector has measured; of use on rank 0 only."""
        ...

    def close(self) -> None:
        """End it: clocks reset, files written. Idempotent."""
        ...


Monitor = Callable[[list[tuple[str, float]]], None]
"""Writes (name, value) figures to the framework's own metrics; called on the training thread, between iterations."""

StartSession = Callable[..., PipelineSession]

_stand_in: list[tuple[StartSession, list[Any]]] = []


def start_session(
    config: PerseusConfig,
    placement: Placement,
    monitor: Monitor | None = None,
    facts: Mapping[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    exchange: Exchange | None = None,
) -> PipelineSession:
    """Start this rank's session, when its model is there and all ranks do; imports what it needs only here.

    Args:
        config: the `perseus` block, enabled.
        placement: where this rank sits.
        monitor: writes figures, on ranks whose framework has somewhere to write them; rank 0's are brought there.
        facts: what makes this rank's part of the job what it is (model, microbatch size, versions): a profile kept from
            an earlier run is used only if they are the same.
        about: further facts for the records alone.
        exchange: to the job's other ranks; None: through the default store of `torch.distributed`.

    Raises:
        ConfigError: a setting does not fit this job; on every rank alike, before training starts.
    """
    if _stand_in:
        return _stand_in[-1][0](config, placement, monitor, facts, about, exchange)
    from perseus_plugin.session.start import start_session as start

    return start(config, placement, monitor, facts, about, exchange)


def started(start: Callable[[], PipelineSession | None]) -> PipelineSession | None:
    """The session that `start` makes, with all that it asks the framework for; None where that fails.

    Nothing here may stop the job: the configuration has been checked, everything else degrades to full clocks.

    Raises:
        ConfigError: a setting does not fit this job.
    """
    try:
        return start()
    except ConfigError:
        raise
    except (OSError, PerseusError) as error:
        problem = os_problem(error) if isinstance(error, OSError) else error
        logger.warning("perseus is off: it could not start: %s; training goes on at full clocks", problem)
    except Exception:
        say_could_not_start()
    return None


def say_could_not_start(in_front: str = "") -> None:
    """Say that an exception, which is being handled, keeps us from starting."""
    logger.exception(
        "%sperseus is off: it could not start; training goes on at full clocks. This is a fault of perseus_plugin or "
        "of the machine: `perseus doctor` tells the latter; else please report it with what follows",
        in_front,
    )


@contextmanager
def iteration(session: PipelineSession) -> Iterator[None]:
    """Around one training iteration. A script that catches its exception does not go on at the clock that failed."""
    session.begin_iteration()
    try:
        yield
    except BaseException:
        session.evaluation()
        raise
    finally:
        session.end_iteration()


# What a job is.


def model_digest(parameters: Iterable[tuple[str, Any]]) -> str:
    """A model by its parameters' names, shapes and types: the same for all ranks and runs that train it."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
    return digest.hexdigest()[:16]


def captures() -> bool:
    """Whether what runs now is captured as a CUDA graph, in which nothing of ours may be."""
    import torch

    return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())


def job_rank() -> int:
    """This process's rank in the job, 0 without a process group."""
    import torch.distributed

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def local_rank(device: str) -> int:
    """This process's number on its machine: the launcher's, else (processes that a script spawns) that of its GPU.

    Args:
        device: torch device, e.g. "cuda:0" or "cpu".
    """
    return int(os.environ.get("LOCAL_RANK") or device.partition(":")[2] or "0")


def is_first_of_machine() -> bool:
    """Whether this is the rank that speaks for its machine; before the job has its process group."""
    # Launchers that set no LOCAL_RANK leave rank 0 to speak for all.
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def rank_in_front() -> str:
    """What to begin a line with that several ranks may say; nothing without a launcher."""
    rank = os.environ.get("RANK", "")
    return f"rank {rank}: " if rank else ""


# Patches.


def wrap_once(owner: Any, name: str, around: Callable[[Function], Function]) -> None:
    """Put a function around one of a class's or module's, unless that was done before.

    Args:
        owner: the class or module; None, or one without such a function, is left alone.
        name: of its function; a class method stays one.
        around: makes ours from what it goes around.
    """
    if owner is None:
        return
    found = vars(owner).get(name, getattr(owner, name, None))
    stock: Any = found.__func__ if isinstance(found, classmethod) else found
    # A module keeps its attributes when it is reloaded, but not its functions.
    patched: frozenset[str] = vars(owner if isinstance(owner, type) else stock or owner).get(_PATCHED, frozenset())
    if stock is None or name in patched:
        return
    wrapper = functools.wraps(stock)(around(stock))
    setattr(owner, name, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)
    setattr(owner if isinstance(owner, type) else wrapper, _PATCHED, patched | {name})


# Straggler detectors.


class StragglerSource(Protocol):
    """Another straggler detector, by the reports that it makes in this process.

    Our sessions know the plan, and which slowness it explains; the detector goes on undisturbed. Registered where its
    class is imported: `pass_on`. A source outside the process uses `perseus straggler`, and one that has its own
    opinion, `perseus_plugin.report_straggler`.

    Attributes:
        name: for people and records; reports of different sources stand side by side.
        known_as: what it is called in a warning about a report of it.
    """

    name: str
    known_as: str

    def figures(self, report: Any) -> ExternalFigures | None:
        """What a report says of all ranks; None if nothing (on ranks that have no report of it).

        May raise whatever it likes on one that it does not understand: that costs a warning.
        """
        ...


def pass_on(detector: Any, method: str, source: StragglerSource) -> None:
    """Have the sessions of this process told of what a detector's method returns. Idempotent."""

    def around(stock: Function) -> Function:
        def observed(*args: Any, **kwargs: Any) -> Any:
            report = stock(*args, **kwargs)
            try:
                tell(source, report)
            except Exception:
                logger.warning("a report of %s was not understood; training goes on", source.known_as, exc_info=True)
            return report

        return observed

    wrap_once(detector, method, around)


def tell(source: StragglerSource, report: Any) -> bool:
    """Tell this process's sessions of a report; whether one took it."""
    sessions = _sessions()
    figures = source.figures(report) if sessions else None
    if figures is None:
        return False
    for session in sessions:
        session.external_figures(figures)
    return True


def _sessions() -> Sequence[PipelineSession]:
    from perseus_plugin.session.running import running_sessions

    return [one for one in _stand_in[-1][1] if not one.closed] if _stand_in else running_sessions()
