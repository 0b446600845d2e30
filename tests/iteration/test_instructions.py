from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import (
    Compute,
    Constant,
    Receive,
    Send,
    StreamOp,
    stream_from_rows,
    stream_to_rows,
)

NUMBERS = st.integers(0, 1000)
OPERATIONS: st.SearchStrategy[StreamOp] = st.one_of(
    st.builds(Compute, st.text(), NUMBERS, NUMBERS),
    st.builds(Constant, st.text(), st.booleans()),
    st.builds(Send, NUMBERS, st.booleans(), st.text()),
    st.builds(Receive, NUMBERS, st.text()),
)


@given(st.lists(OPERATIONS, max_size=8))
def test_a_stream_passes_through_json(stream: list[StreamOp]) -> None:
    assert stream_from_rows(json.loads(json.dumps(stream_to_rows(stream)))) == stream


@pytest.mark.parametrize(
    "row",
    [
        [],
        ["wait", 1],
        ["compute", "forward", 0],
        ["compute", "forward", "0", 0],
        ["compute", 3, 0, 0],
        ["constant", "load"],
        ["send", 1, 1],
        ["send", "1", 1, ""],
        ["receive", 1],
        ["receive", 1, ""] * 2,
    ],
)
def test_a_row_of_no_known_kind_is_refused(row: list[str | int]) -> None:
    with pytest.raises(ScheduleError) as caught:
        stream_from_rows([["receive", 1, ""], row])
    assert str(caught.value) == f"stream row: got {row!r}; allowed: compute, constant, send or receive"
