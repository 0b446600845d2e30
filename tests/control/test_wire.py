from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.wire import (
    COMMAND,
    HEARTBEAT,
    MAX_PAYLOAD,
    SET_CLOCK,
    Applied,
    Command,
    Deviation,
    DeviceFacts,
    Event,
    Mark,
    SwitchLatency,
    Tick,
    Trouble,
    WireError,
    pack_event,
    pack_reply,
    split_commands,
    split_replies,
    unpack_event,
)

times = st.floats(0, 1e9)
clocks = st.integers(1, 3000)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Tick, times, times, times, clocks, times),
    st.builds(Mark, st.integers(0, 2**32 - 1), times, times, clocks, times),
    st.builds(Applied, st.integers(0, 2**40), st.none() | clocks, times, times, times, times),
    st.builds(SwitchLatency, times, times, clocks, clocks),
    st.builds(Deviation, times, clocks, clocks),
    st.builds(Trouble, st.just("lock_failed"), st.text(alphabet=st.characters(codec="utf-8")), times),
)


@given(st.lists(events, max_size=6), st.integers(1, 50))
def test_events_survive_the_pipe_in_pieces_of_any_size(sent: list[Event], piece: int) -> None:
    stream = b"".join(pack_event(event) for event in sent)
    buffer = bytearray()
    received = []
    for start in range(0, len(stream), piece):
        buffer += stream[start : start + piece]
        received += [unpack_event(what, payload) for what, payload in split_replies(buffer)]
    assert received == sent
    assert not buffer


@given(st.lists(st.builds(Command, st.integers(1, 5), clocks, st.integers(0, 2**40), times, times), max_size=6))
def test_commands_survive_the_pipe(sent: list[Command]) -> None:
    buffer = bytearray(b"".join(command.pack() for command in sent) + b"\x50")
    assert list(split_commands(buffer)) == sent
    assert buffer == b"\x50"


def test_garbage_is_told_from_commands_and_replies() -> None:
    with pytest.raises(WireError, match="not a command"):
        list(split_commands(bytearray(b"reset the clock please, would you?")))
    with pytest.raises(WireError, match="not a command"):
        list(split_commands(bytearray(COMMAND.pack(0x5E50, 99, 0, 0, 0.0, 0.0))))
    with pytest.raises(WireError, match="not a reply"):
        list(split_replies(bytearray(b"Traceback (most recent call last)")))
    with pytest.raises(WireError, match="no event"):
        unpack_event(HEARTBEAT, b"")
    with pytest.raises(WireError, match="wrong payload"):
        unpack_event(2, b"short")


def test_writes_stay_atomic() -> None:
    pipe_buf = 4096  # POSIX's promise on Linux
    assert len(Command(SET_CLOCK, 900, 1, 0.0, 0.0).pack()) <= pipe_buf
    assert len(pack_event(Trouble("lock_failed", "long " * 5000, 1.0))) <= pipe_buf
    assert pipe_buf > MAX_PAYLOAD
    many = DeviceFacts("n" * 96, "u" * 64, True, tuple(range(210, 466)), False, "why " * 100, "left " * 50, 1)
    assert len(pack_reply(1, many.pack())) <= pipe_buf


def test_a_trouble_with_a_path_that_is_not_unicode_is_told() -> None:
    ((what, payload),) = split_replies(bytearray(pack_event(Trouble("lock_failed", "no caf\udce9", 1.0))))
    assert unpack_event(what, payload) == Trouble("lock_failed", r"no caf\udce9", 1.0)


def test_facts_and_nan_survive() -> None:
    facts = DeviceFacts("A100", "GPU-1", False, (1410, 210), False, "no permission", "", 12)
    assert DeviceFacts.unpack(facts.pack()) == facts
    ((what, payload),) = split_replies(bytearray(pack_event(Tick(1.0, 2.0, 3.0, 4, math.nan))))
    tick = unpack_event(what, payload)
    assert isinstance(tick, Tick)
    assert math.isnan(tick.capped_s)
