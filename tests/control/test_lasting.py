"""A helper that is started once more, as real processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from perseus_plugin.control import client
from perseus_plugin.control.lasting import LastingHelper
from perseus_plugin.control.wire import Applied, Mark, SwitchLatency, Tick, Trouble
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import NO_PERMISSION
from tests.waiting import wait_until

from .harness import free_and_unowned, other_events, wait_for_event


@pytest.fixture
def lasting(spec: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LastingHelper]:
    # On a busy machine it may take longer than a clock may stay locked unsaid.
    for limit in ("RESCUE_START_S", "RESCUE_WAIT_S"):
        monkeypatch.setattr(client, limit, 60.0)
    helper = LastingHelper.start(spec)
    assert helper.wait_ready(60) is not None
    yield helper
    helper.close()


def kill(helper: LastingHelper, number: int) -> None:
    facts = helper.wait_ready(60)
    assert facts is not None
    os.kill(facts.pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_helper_takes_up_what_the_first_one_did(lasting: LastingHelper, gpu: EmulatedGpu, number: int) -> None:
    lasting.measure_latency(1)
    wait_for_event(lasting, SwitchLatency)
    lasting.poll_energy(0.001)
    lasting.free_after(600.0)
    lasting.request(900)
    wait_for_event(lasting, Tick)
    wait_until(lambda: gpu.locked_mhz() == 900)
    before = len(gpu.events())
    kill(lasting, number)
    again = wait_for_event(lasting, Trouble)
    assert again.code == "started_again"
    assert again.text.startswith(f"the clock helper ended with status {0 if number == signal.SIGTERM else -9}")
    assert again.text.endswith("its SM clock is free, and a second helper sets it as before")
    wait_until(lambda: gpu.locked_mhz() == 900)
    assert 0 in [event.mhz for event in gpu.events()[before:]]
    other_events(lasting).clear()
    wait_for_event(lasting, Tick)
    lasting.mark(3)
    assert wait_for_event(lasting, Mark).tag == 3
    lasting.request(1005)
    wait_until(lambda: gpu.locked_mhz() == 1005)


def test_whoever_looks_now_and_then_is_woken_as_one_ends(lasting: LastingHelper) -> None:
    woken = threading.Event()
    lasting.on_end(woken.set)
    for code in ("started_again", "helper_died"):
        assert not woken.is_set()
        kill(lasting, signal.SIGKILL)
        assert woken.wait(60)
        woken.clear()
        assert wait_for_event(lasting, Trouble).code == code
    lasting.on_end(woken.set)
    assert woken.is_set(), "it has ended before"


def test_one_that_ends_while_it_starts_is_started_again(spec: str) -> None:
    helper = LastingHelper.start(spec)
    kill_at_once(helper, signal.SIGKILL)
    facts = helper.wait_ready(60)
    assert facts is not None
    assert facts.can_lock
    assert wait_for_event(helper, Trouble).code == "started_again"
    helper.close()


def kill_at_once(helper: LastingHelper, number: int) -> None:
    os.kill(helper._helper.pid or 0, number)


def test_a_timing_that_the_first_one_has_not_ended_is_done_by_the_second(lasting: LastingHelper) -> None:
    lasting.measure_latency(4)
    kill(lasting, signal.SIGKILL)
    assert wait_for_event(lasting, Trouble).code == "started_again"
    assert wait_for_event(lasting, SwitchLatency).samples == 8


def test_the_end_of_the_second_is_trouble(lasting: LastingHelper, gpu: EmulatedGpu, spec: str) -> None:
    lasting.request(900)
    for code in ("started_again", "helper_died"):
        wait_until(lambda: gpu.locked_mhz() == 900)
        kill(lasting, signal.SIGTERM)
        assert wait_for_event(lasting, Trouble).code == code
    assert free_and_unowned(gpu, spec)
    lasting.request(1005)
    assert not any(isinstance(event, Trouble) for event in other_events(lasting))


def test_one_that_may_not_set_clocks_any_more_is_trouble(
    lasting: LastingHelper, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting.request(900)
    wait_for_event(lasting, Applied)
    monkeypatch.setattr(client, "_spawn", without_permission(gpu, client._spawn))
    kill(lasting, signal.SIGKILL)
    trouble = wait_for_event(lasting, Trouble)
    assert (trouble.code, trouble.free) == ("helper_died", True)
    assert "a second helper may not set it: " in trouble.text
    gpu.set_faults(0)


def without_permission(gpu: EmulatedGpu, spawn: object) -> object:
    """Start processes as ever, but take the permission before a helper that is to set clocks."""

    def spawned(spec: str, options: list[str], log_path: object) -> object:
        if "--reset-only" not in options:
            gpu.set_faults(NO_PERMISSION)
        return spawn(spec, options, log_path)  # type: ignore[operator]

    return spawned


def test_one_that_was_retired_or_closed_is_not_started_again(
    lasting: LastingHelper, gpu: EmulatedGpu, spec: str
) -> None:
    lasting.request(900)
    wait_for_event(lasting, Applied)
    lasting.retire()
    wait_until(lambda: gpu.locked_mhz() is None)
    kill(lasting, signal.SIGKILL)
    assert wait_for_event(lasting, Trouble).code == "helper_died"
    assert free_and_unowned(gpu, spec)
