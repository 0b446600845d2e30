"""PyTorch's pipeline schedules (`torch.distributed.pipelining`), as instruction streams. Pure: no torch.

A schedule of several stages per rank is a list of *actions* per rank, such as `0F1` (stage 0, forward, microbatch 1);
PyTorch writes and reads it as CSV, with or without the actions that communicate. Stages are parts of the model here;
each rank runs the *chunks* that its list names, which become the chunks of one of our stages. The two schedules of one
stage per rank have loops of their own, whose transfers are posted and waited for in groups.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import (
    BACKWARD,
    FORWARD,
    INPUT_BACKWARD,
    WEIGHT_BACKWARD,
    Compute,
    Constant,
    Receive,
    Send,
    StageStream,
    StreamOp,
    of_chunk,
    of_pair,
)
from perseus_plugin.iteration.stage_program import ACTIVATION, GRADIENT, StageProgram

REDUCE_GRAD = "reduce_grad"
"""Gradients of a chunk are reduced over replicas and shards, and scaled."""

KIND_OF = {"F": FORWARD, "B": BACKWARD, "I": INPUT_BACKWARD, "W": WEIGHT_BACKWARD}
"""Our kinds of instruction by PyTorch's letters."""

_ACTION = re.compile(r"(\d{1,9})(F|I|B|W|UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)(\d{0,9})")
_PAIR = re.compile(r"\((.*)\)OVERLAP_F_B")
_NO_MICROBATCH = ("UNSHARD", "RESHARD", "REDUCE_GRAD")


class Action(NamedTuple):
    """One entry of a rank's list.

    Attributes:
        stage: part of the model, 0-based.
        type: PyTorch's name of it: `F` forward, `B` backward, `I` and `W` its halves, or a name in capitals.
        microbatch: 0-based; -1 where the type has none.
    """

    stage: int
    type: str
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.type}{self.microbatch if self.microbatch >= 0 else ''}"


Step = tuple[Action, ...]
"""What a rank does at once: one action, or those of an overlapped pair."""


def written(step: Step) -> str:
    """As PyTorch writes it; the inverse of `parsed`."""
    return str(step[0]) if len(step) == 1 else f"({';'.join(map(str, step))})OVERLAP_F_B"


def parsed(text: str) -> Step:
    """An entry of a list; of a blank one nothing.

    Raises:
        ScheduleError: it is no action.
    """
    text = text.strip()
    if not text:
        return ()
    pair = _PAIR.fullmatch(text)
    found = [_ACTION.fullmatch(part.strip()) for part in (pair[1].split(";") if pair else [text])]
    step = tuple(Action(int(one[1]), one[2], int(one[3] or -1)) for one in found if one)
    whole = all((one.microbatch < 0) == (one.type in _NO_MICROBATCH) for one in step)
    if len(step) < len(found) or not whole or (pair and not all(one.type in KIND_OF for one in step)):
        raise ScheduleError(
            f"got {text[:80]!r}; allowed: what PyTorch's schedules write: stage, action and microbatch such as 0F1, "
            "3B0, 2I4, 2W4 or 1SEND_F0, 0UNSHARD, or (0F4;7B0)OVERLAP_F_B"
        )
    return step


def lists_from_csv(text: str) -> list[list[str]]:
    """The lists of all ranks from PyTorch's CSV: a line per rank.

    Raises:
        ScheduleError: it is no CSV.
    """
    try:
        return list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise ScheduleError(f"not valid CSV: {error}") from error


def streams_of_actions(
    lists: Sequence[Sequence[str]], *, pairs_as_one: bool = False, first_has_input_gradient: bool = False
) -> tuple[StageStream, ...]:
    """The streams of all ranks from their lists.

    Sends do not wait, and a rank waits for what it computes on just before. What goes to a chunk of the same rank is
    handed over. Where no list communicates, what others need is sent right after it is computed, as PyTorch does.

    Args:
        lists: per rank its actions, as PyTorch writes them.
        pairs_as_one: an overlapped pair is one instruction (a function for it is registered), known by its first
            part's microbatch and chunk; otherwise its parts run one after the other.
        first_has_input_gradient: on the model's first stage `I` does something (a `dw_builder` was given); otherwise
            there is no gradient to compute, and it is no instruction.

    Raises:
        ScheduleError: an entry is no action, or what PyTorch would refuse: a stage on two ranks or on none, a
            microbatch that is not trained on in full on every stage, or an action before what it needs.
    """
    steps: list[list[Step]] = []
    for rank, actions in enumerate(lists):
        try:
            steps.append([step for step in map(parsed, actions) if step])
        except ScheduleError as error:
            raise ScheduleError(f"rank {rank}: {error}") from None
    return streams_of_steps(steps, pairs_as_one=pairs_as_one, first_has_input_gradient=first_has_input_gradient)


def streams_of_steps(
    ranks: Sequence[Sequence[Step]], *, pairs_as_one: bool = False, first_has_input_gradient: bool = False
) -> tuple[StageStream, ...]:
    """`streams_of_actions` from what `parsed` makes of the lists."""
    lists = [[action for step in steps for action in step] for steps in ranks]
    rank_of: dict[int, int] = {}
    for rank, actions in enumerate(lists):
        for action in actions:
            if rank_of.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"stage {action.stage} stands in the lists of ranks {rank_of[action.stage]} and {rank}"
                )
    _check_whole(lists, sorted(rank_of))
    communicates = any(action.type.startswith(("SEND", "RECV")) for actions in lists for action in actions)
    return tuple(
        _RankStream(rank, rank_of, communicates, pairs_as_one, first_has_input_gradient).of(steps)
        for rank, steps in enumerate(ranks)
    )


def _check_whole(lists: Sequence[Sequence[Action]], stages: Sequence[int]) -> None:
    if list(stages) != list(range(len(stages))) or not (lists and all(lists)):
        raise ScheduleError(f"got stages {list(stages)} on {len(lists)} ranks; allowed: all from 0, some on every rank")
    done: set[Action] = set()
    for rank, actions in enumerate(lists):
        for action in actions:
            if action.microbatch >= 0 and action in done:
                raise ScheduleError(f"rank {rank}: {action} stands in the list twice")
            done.add(action)
    microbatches = sorted({action.microbatch for action in done} - {-1})
    if microbatches != list(range(len(microbatches))):
        raise ScheduleError(f"got {len(microbatches)} microbatches up to {microbatches[-1]}; allowed: all from 0")
    for stage in stages:
        for m in microbatches:
            has = "".join(letter for letter in KIND_OF if Action(stage, letter, m) in done)
            if has not in {"FB", "FIW"}:
                raise ScheduleError(
                    f"stage {stage}, microbatch {m}: got {', '.join(has) or 'nothing'}; allowed: F and B, or F, I and W"
                )


class _RankStream:
    """Makes the stream of one rank."""

    def __init__(
        self,
        rank: int,
        rank_of: dict[int, int],
        communicates: bool,
        pairs_as_one: bool,
        first_has_input_gradient: bool,
    ) -> None:
        self._rank, self._rank_of = rank, rank_of
        self._communicates, self._pairs_as_one = communicates, pairs_as_one
        self._without_input_gradient = None if first_has_input_gradient else 0
        own = sorted(stage for stage, of in rank_of.items() if of == rank)
        self._chunk_of = {stage: chunk for chunk, stage in enumerate(own)}
        self._done: set[Action] = set()

    def of(self, steps: Sequence[Step]) -> list[StreamOp]:
        return [op for step in steps for op in self._of_step(step)]

    def _of_step(self, step: Step) -> Iterator[StreamOp]:
        for parts in [step] if self._pairs_as_one else [(action,) for action in step]:
            for action in parts:
                self._check(action)
                giver = self._giver(action)
                if action.type in {"F", "B", "I"} and self._is_elsewhere(giver):
                    yield Receive(self._rank_of[giver], _channel(giver, action))
            instructions = [self._instruction(action) for action in parts if self._is_instruction(action)]
            if instructions:
                first = instructions[0]
                yield Compute(of_pair(*(one.kind for one in instructions)), first.microbatch, first.chunk)
            self._done.update(parts)
        for action in step:
            if action.type == "REDUCE_GRAD":
                yield Constant(of_chunk(REDUCE_GRAD, self._chunk_of[action.stage]))
            sent_here = not self._communicates and action.type in {"F", "B", "I"}
            if action.type in {"SEND_F", "SEND_B"} or (sent_here and self._is_elsewhere(self._taker(action))):
                yield Send(self._rank_of[self._taker(action)], blocking=False, channel=_channel(action.stage, action))

    def _is_instruction(self, action: Action) -> bool:
        return action.type in KIND_OF and (action.type != "I" or action.stage != self._without_input_gradient)

    def _instruction(self, action: Action) -> Compute:
        chunk = self._chunk_of[action.stage]
        return Compute(of_chunk(KIND_OF[action.type], chunk), action.microbatch, chunk)

    def _giver(self, action: Action) -> int:
        """The stage on whose output an action works; there may be none of that number."""
        return action.stage - 1 if action.type.endswith("F") else action.stage + 1

    def _taker(self, action: Action) -> int:
        """The stage that needs its output; there may be none of that number."""
        return action.stage + 1 if action.type.endswith("F") else action.stage - 1

    def _is_elsewhere(self, stage: int) -> bool:
        return self._rank_of.get(stage, self._rank) != self._rank

    def _check(self, action: Action) -> None:
        """Refuse an action before what it needs."""
        stage, type_, m = action
        peer = self._taker(action) if type_.startswith("SEND") else self._giver(action)
        if type_.startswith(("SEND", "RECV")) and not self._is_elsewhere(peer):
            raise ScheduleError(f"rank {self._rank}: {action} has no stage on another rank to communicate with")
        needs: list[tuple[Action, ...]] = []
        if type_ in {"B", "I"}:
            needs.append((Action(stage, "F", m),))
        if type_ in {"F", "B", "I"} and peer in self._rank_of:
            if not self._is_elsewhere(peer):
                needs.append(tuple(Action(peer, one, m) for one in ("F" if type_ == "F" else "BI")))
            elif self._communicates:
                needs.append((Action(stage, "RECV_F" if type_ == "F" else "RECV_B", m),))
        if type_ == "W":
            needs.append((Action(stage, "I", m),))
        if type_.startswith("SEND"):
            needs.append(tuple(Action(stage, one, m) for one in ("F" if type_ == "SEND_F" else "BI")))
        for any_of in needs:
            if self._done.isdisjoint(any_of):
                raise ScheduleError(f"rank {self._rank}: {action} comes before {' or '.join(map(str, any_of))}")


def _channel(sender: int, action: Action) -> str:
    """A name of its own for each tensor that is sent."""
    return str(Action(sender, "SEND_F" if action.type.endswith("F") else "SEND_B", action.microbatch))


MOST_PASSES = 500_000
"""Forward passes of all stages in one iteration: some fifty times those of the largest jobs."""


def check_size(stages: int, microbatches: int, chunks: int = 1) -> None:
    """Refuse what no schedule has.

    Raises:
        ScheduleError: fewer than one stage or microbatch, or more of them than anything here could hold.
    """
    for name, value in (("stages", stages), ("microbatches", microbatches)):
        if value < 1:
            raise ScheduleError(f"{name}: got {value}; allowed: a whole number from 1")
    if stages * microbatches * chunks > MOST_PASSES:
        each = f"{chunks} chunks, " if chunks > 1 else ""
        raise ScheduleError(
            f"schedule: got {stages} stages, {each}{microbatches} microbatches; allowed: at most {MOST_PASSES:,} "
            "forward passes in an iteration"
        )


def pytorch_1f1b(stages: int, microbatches: int) -> list[StageStream]:
    """PyTorch's `Schedule1F1B`: what it sends and receives at once is posted together, and both waited for.

    Raises:
        ScheduleError: fewer microbatches than stages, or none.
    """
    check_size(stages, microbatches)
    if stages > microbatches:
        raise ScheduleError(
            f"PyTorch's 1F1B: got {stages} stages, {microbatches} microbatches; allowed: at least as many microbatches"
        )
    streams: list[StageStream] = []
    for stage in range(stages):
        program = StageProgram(stages, stage)
        sends, receives = _ends(program)
        ahead = min(microbatches, stages - stage)
        for m in range(ahead):
            program.exchange([], receives[ACTIVATION])
            program.compute(FORWARD, m)
            for channel in sends[ACTIVATION]:
                if m > 0:
                    program.wait_send(channel)
                if m < ahead - 1:
                    program.post_send(channel)
        for m in range(microbatches):
            steady = m <= microbatches - ahead
            program.exchange(sends[ACTIVATION] if steady else [], receives[GRADIENT])
            program.compute(BACKWARD, m)
            if m < microbatches - ahead:
                program.exchange(sends[GRADIENT], receives[ACTIVATION])
                program.compute(FORWARD, ahead + m)
                continue
            for channel in sends[GRADIENT]:
                if not steady:
                    program.wait_send(channel)
                program.post_send(channel)
        for channel in sends[GRADIENT]:
            program.wait_send(channel)
        program.constant(REDUCE_GRAD)
        streams.append(program.operations)
    return streams


def pytorch_gpipe(stages: int, microbatches: int) -> list[StageStream]:
    """PyTorch's `ScheduleGPipe`: all forwards, then all backwards, the first microbatch first.

    Raises:
        ScheduleError: fewer than one stage or microbatch.
    """
    check_size(stages, microbatches)
    streams: list[StageStream] = []
    for stage in range(stages):
        program = StageProgram(stages, stage)
        sends, receives = _ends(program)
        for kind, channel in ((FORWARD, ACTIVATION), (BACKWARD, GRADIENT)):
            for m in range(microbatches):
                program.exchange([], receives[channel])
                program.compute(kind, m)
                for one in sends[channel]:
                    program.post_send(one)
            for one in sends[channel] * microbatches:
                program.wait_send(one)
        program.constant(REDUCE_GRAD)
        streams.append(program.operations)
    return streams


def _ends(program: StageProgram) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What a stage of a pipeline without chunks sends and receives, by channel."""
    onward = [] if program.is_last else [ACTIVATION]
    back = [] if program.is_first else [GRADIENT]
    sends = {ACTIVATION: onward, GRADIENT: back}
    receives = {ACTIVATION: [] if program.is_first else [ACTIVATION], GRADIENT: [] if program.is_last else [GRADIENT]}
    return sends, receives
