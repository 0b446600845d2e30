"""The C arithmetic against the Python one, on the same states."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perseus_plugin.gpus.emulated.device import model_tables
from perseus_plugin.gpus.emulated.dynamics import Dynamics, Tables
from perseus_plugin.gpus.emulated.physics import A100, H100, LOAD_CLASSES
from perseus_plugin.gpus.emulated.state import (
    DYNAMICS,
    FILE_BYTES,
    HEADER,
    _pack_dynamics,
    _unpack_dynamics,
    initial_bytes,
)

CLOCKS = A100.clocks_mhz()
GPUS = [
    model_tables(A100, 0.020, 0.020, 0.003),
    model_tables(A100, 0.100, 0.025, 0.0),
    model_tables(H100, 0.100, 0.100, 0.0),
]

steps = st.lists(
    st.tuples(
        st.floats(0.0, 0.08),
        st.sampled_from(["clock", "work", "cap", "slow", "limit", "nothing"]),
        st.integers(0, len(CLOCKS) - 1),
    ),
    max_size=15,
)


class CState:
    """The C functions on a state of their own."""

    def __init__(self, library: ctypes.CDLL, tables: Tables, dynamics: Dynamics) -> None:
        self._library = library
        library.state_draw.restype = ctypes.c_double
        library.state_power_w.restype = ctypes.c_double
        library.state_shown_j.restype = ctypes.c_double
        library.state_switch_s.restype = ctypes.c_double
        content = initial_bytes("GPU-1", "x", tables, dynamics, {})
        self._file = (ctypes.c_char * FILE_BYTES).from_buffer(content)
        self._dynamics = ctypes.create_string_buffer(DYNAMICS.size)
        self.load(dynamics)

    def load(self, d: Dynamics) -> None:
        packed = bytearray(DYNAMICS.size)
        _pack_dynamics(packed, 0, d)
        self._dynamics.raw = bytes(packed)

    def read(self) -> Dynamics:
        return _unpack_dynamics(self._dynamics.raw)

    def advance(self, to_s: float) -> None:
        self._library.state_advance(self._file, self._dynamics, ctypes.c_double(to_s))

    def change_clock(self, mhz: int, locked_mhz: int, at_s: float) -> None:
        self._library.state_change_clock(self._dynamics, mhz, locked_mhz, ctypes.c_double(at_s))

    def draw(self) -> float:
        return float(self._library.state_draw(self._dynamics))

    def power_w(self) -> float:
        return float(self._library.state_power_w(self._file, self._dynamics))

    def shown_j(self) -> float:
        return float(self._library.state_shown_j(self._file, self._dynamics))

    def switch_s(self, mhz: int) -> float:
        return float(self._library.state_switch_s(self._file, self._dynamics, mhz))


@pytest.fixture(scope="session")
def library(simulated_nvml: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(simulated_nvml))


def test_sizes_are_those_that_the_header_asserts() -> None:
    assert (HEADER.size, DYNAMICS.size, FILE_BYTES) == (320, 328, 121920)
    assert struct.calcsize("<d") * LOAD_CLASSES == 32


@given(steps, st.sampled_from(GPUS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_both_reach_the_same_state(library: ctypes.CDLL, history: list[tuple[float, str, int]], tables: Tables) -> None:
    d = Dynamics(
        at_s=5.0,
        clock_mhz=tables.clocks_mhz[0],
        static_w=80.0,
        ticks=int((5.0 - tables.tick_origin_s) / tables.tick_period_s),
        limit_w=tables.limit_w,
        spare_j=tables.burst_j,
    )
    c = CState(library, tables, d)
    now_s = 5.0
    for pause_s, what, number in history:
        now_s += pause_s
        d.advance(tables, now_s)
        c.advance(now_s)
        assert c.read() == d
        assert c.power_w() == d.power_w(tables)
        assert c.shown_j() == d.shown_j(tables)
        if what == "clock":
            assert c.draw() == d.draw()
            assert c.switch_s(CLOCKS[number]) == d.switch_s(tables, CLOCKS[number])
            d.change_clock(CLOCKS[number], CLOCKS[number], now_s + 0.004)
            c.change_clock(CLOCKS[number], CLOCKS[number], now_s + 0.004)
            continue
        if what == "work":
            load = 1 + number % 3
            d.begin_work(tables, load, 0.001 * (1 + number), tables.dynamic_w[load], 0.0)
        elif what == "cap":
            d.cap_mhz = CLOCKS[number]
        elif what == "slow":
            d.slowdown[1 + number % 3] = 1.0 + 0.02 * number
        elif what == "limit":
            d.limit_w = 100.0 + 7.0 * number
        c.load(d)
    d.advance(tables, now_s + 10.0)
    c.advance(now_s + 10.0)
    assert c.read() == d
