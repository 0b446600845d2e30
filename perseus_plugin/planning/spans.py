"""Where the GPUs of a pipeline wait: the time between one instruction of a stage and the next. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph


@dataclass(frozen=True, eq=False)
class SpanTimes:
    """How long the spans take; all of shape (spans, iterations).

    Attributes:
        total_s: from the end of the instruction before to the beginning of the one after.
        before_s: until the longest wait within begins.
        wait_s: that wait.
        begin_s: when it begins.
    """

    total_s: FloatArray
    before_s: FloatArray
    wait_s: FloatArray
    begin_s: FloatArray


@dataclass(frozen=True, eq=False)
class Spans:
    """What lies between the instructions of each stage: one before the first, one after each. Sorted by stage.

    A *link* of a span leads from one thing that takes time to the next; the time between the two is waited.

    Attributes:
        stage: shape (spans,).
        position: shape (spans,), of the instruction before among the stage's; -1 for the first span.
        before, after: shape (spans,), nodes of the instructions beside it, -1 where there is none.
        first_link: shape (spans,), of its links, which follow each other.
        link_tail, link_head: shape (links,), nodes; -1 for the iteration's begin and end.
        last: shape (stages with instructions,), each one's last node that takes time.
        slack_link: the same stages; the link in which a stage waits for the iteration's end: before the first
            collective that comes after its last instruction, else at the very end.
        end_known: the same stages; false where work follows the last instruction of which nobody knows how long any of
            it takes, so that it cannot be told from waiting.
    """

    stage: IntArray
    position: IntArray
    before: IntArray
    after: IntArray
    first_link: IntArray
    link_tail: IntArray
    link_head: IntArray
    last: IntArray
    slack_link: IntArray
    end_known: IntArray

    @classmethod
    def of(cls, graph: PipelineGraph) -> Spans:
        """Of a graph; constant-time nodes that take no time are left out."""
        stage_of: list[int] = []
        positions: list[int] = []
        before: list[int] = []
        after: list[int] = []
        first_link: list[int] = []
        tails: list[int] = []
        heads: list[int] = []
        last: list[int] = []
        slack: list[int] = []
        end_known: list[int] = []
        takes_time = ~graph.is_constant | (graph.constant_s > 0)
        for stage, all_nodes in enumerate(graph.stage_nodes):
            nodes = all_nodes[takes_time[all_nodes]]
            own = np.flatnonzero(~graph.is_constant[nodes])
            if not len(own):
                continue
            offset = len(tails)
            tails += [-1, *nodes.tolist()]
            heads += [*nodes.tolist(), -1]
            # The link behind the k-th instruction is the first of its span.
            first_link += [offset, *(offset + 1 + own).tolist()]
            before += [-1, *nodes[own].tolist()]
            after += [*nodes[own].tolist(), -1]
            stage_of += [stage] * (len(own) + 1)
            positions += range(-1, len(own))
            last.append(int(nodes[-1]))
            end_known.append(int(nodes[-1] != nodes[own[-1]] or all_nodes[-1] == nodes[-1]))
            collective = np.flatnonzero(graph.collective[nodes[own[-1] + 1 :]])
            slack.append(offset + (int(own[-1] + 1 + collective[0]) if len(collective) else len(nodes)))
        return cls(
            *(
                np.array(one, dtype=np.int64)
                for one in (stage_of, positions, before, after, first_link, tails, heads, last, slack, end_known)
            )
        )

    @cached_property
    def of_link(self) -> IntArray:
        """Shape (links,): the span of each."""
        return np.repeat(np.arange(len(self.stage)), np.diff(np.append(self.first_link, len(self.link_tail))))

    @cached_property
    def tails(self) -> IntArray:
        """Spans after the last instruction of a stage."""
        return np.flatnonzero(self.after < 0)

    @cached_property
    def heads(self) -> IntArray:
        """Spans before the first instruction of a stage, in the same order."""
        return np.flatnonzero(self.before < 0)

    def times(self, start_s: FloatArray, finish_s: FloatArray, end_s: npt.ArrayLike) -> SpanTimes:
        """How long the spans take.

        Args:
            start_s, finish_s: shape (nodes, iterations).
            end_s: shape (iterations,), when the wait for the iteration's end is over.
        """
        zero = np.zeros((1, finish_s.shape[1]))
        finish_s = np.concatenate([finish_s, zero])  # node -1 has ended when the iteration begins
        start_s = np.concatenate([start_s, zero])
        ends = (self.link_head < 0)[:, None]
        link_s = np.where(ends, 0.0, start_s[self.link_head] - finish_s[self.link_tail])
        link_s[self.slack_link] += np.asarray(end_s) - finish_s[self.last]
        link_s = np.maximum(link_s, 0.0)
        until_s = np.where((self.after < 0)[:, None], np.asarray(end_s), start_s[self.after])
        total_s = np.maximum(until_s - finish_s[self.before], 0.0)
        if len(self.link_tail) == len(self.stage):
            return SpanTimes(total_s, np.zeros_like(total_s), link_s, finish_s[self.before])
        wait_s = np.maximum.reduceat(link_s, self.first_link, axis=0)
        is_longest = link_s >= wait_s[self.of_link]
        begin_s = np.minimum.reduceat(np.where(is_longest, finish_s[self.link_tail], np.inf), self.first_link, axis=0)
        return SpanTimes(total_s, begin_s - finish_s[self.before], wait_s, begin_s)
