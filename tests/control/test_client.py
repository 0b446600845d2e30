"""The helper as a real process: what it does when asked, and what is left when things die."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perseus_plugin.control import client
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.helper import rescue
from perseus_plugin.control.ownership import holder_of, lock_path, read_record
from perseus_plugin.control.wire import Applied, Deviation, Mark, SwitchLatency, Tick, Trouble
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import GPU_LOST, IGNORE_LOCKS, NO_PERMISSION
from tests.waiting import pipes_here, stop_process, wait_until

from .harness import free_and_unowned, other_events, start_trainer, wait_for_event


def _cannot_spawn(*_: object) -> None:
    raise OSError("no more processes")


def test_it_tells_the_facts_of_its_gpu(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    facts = helper.wait_ready(0)
    assert facts is not None
    assert (facts.name, facts.uuid, facts.clocks_mhz) == (gpu.name, gpu.uuid, gpu.supported_clocks_mhz())
    assert (facts.can_lock, facts.why_not, facts.leftover, facts.pid) == (True, "", "", helper.pid)
    assert facts.power_limit_w == facts.enforced_limit_w == gpu.power_limit_w() > 400
    assert os.getsid(helper.pid or 0) == helper.pid


def test_requests_reach_the_driver_and_repeats_do_not(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    applied: list[Applied] = []
    for mhz in (900, 1005):  # each is waited for: a newer one takes the place of what is not applied yet
        helper.request(mhz)
        helper.request(mhz)
        applied.append(wait_for_event(helper, Applied))
    for later in (1200, None):
        helper.request(later, time.monotonic() + 0.05)
        applied.append(wait_for_event(helper, Applied))
    assert [a.frequency_mhz for a in applied] == [900, 1005, 1200, None]
    assert all(a.requested_s <= a.called_s <= a.applied_s for a in applied)
    assert all(a.called_s >= a.apply_at_s > 0 for a in applied[2:])
    assert [e.mhz for e in gpu.events()][1:] == [900, 1005, 1200, 0]  # the first is the reset at the start


def test_it_reports_ticks_and_marks(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.poll_energy(0.001)
    ticks = [wait_for_event(helper, Tick) for _ in range(3)]
    assert all(t.previous_poll_s < t.time_s for t in ticks)
    assert all(a.energy_j < b.energy_j for a, b in itertools.pairwise(ticks))
    assert ticks[0].clock_mhz == 1410
    helper.poll_energy(None)
    helper.mark(2**32 - 1)
    mark = wait_for_event(helper, Mark)
    assert mark.tag == 2**32 - 1
    assert ticks[-1].energy_j <= mark.energy_j <= gpu.exact_energy_j()


def test_what_it_says_is_there_when_it_is_asked_for_and_its_end_is_seen_while_its_thread_rests(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_REST_S", 3600.0)
    helper = ClockHelper.start(spec)
    assert helper.wait_ready(20) is not None
    for tag in (1, 2):
        helper.mark(tag)
        assert wait_for_event(helper, Mark).tag == tag
    os.kill(helper.pid or 0, signal.SIGKILL)
    assert wait_for_event(helper, Trouble).code == "helper_died"
    assert not helper.alive


def test_one_that_only_reads_makes_no_call_that_changes_the_gpu(gpu: EmulatedGpu, spec: str) -> None:
    gpu.lock_clock(900)
    helper = ClockHelper.start(spec, read_only=True)
    facts = helper.wait_ready(60)
    assert facts is not None
    assert not facts.can_lock
    helper.request(1200)
    helper.measure_latency(1)
    helper.poll_energy(0.001)
    assert wait_for_event(helper, Tick).clock_mhz == 900
    os.kill(helper.pid or 0, signal.SIGKILL)
    assert wait_for_event(helper, Trouble).code == "helper_died"
    assert not helper.close()
    assert [event.mhz for event in gpu.events()] == [900]
    assert gpu.locked_mhz() == 900


def test_it_measures_the_switch_latency_and_leaves_the_clock_free(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.measure_latency(2)
    found = wait_for_event(helper, SwitchLatency)
    assert (found.samples, found.timeouts) == (4, 0)
    assert 0.002 <= found.p50_s <= found.p95_s
    assert gpu.locked_mhz() is None


# Locks of others.


def test_somebody_elses_lock_is_said_and_made_again_at_the_end(gpu: EmulatedGpu, spec: str) -> None:
    gpu.lock_clock(1005)
    helper = ClockHelper.start(spec)
    facts = helper.wait_ready(60)
    assert facts is not None
    assert facts.foreign == "was locked at 1005 MHz by somebody else; it is locked so again when the job ends"
    assert facts.leftover == ""
    assert gpu.locked_mhz() is None
    helper.request(900)
    wait_for_event(helper, Applied)
    assert helper.close()
    assert gpu.locked_mhz() == 1005
    again = ClockHelper.start(spec)
    assert again.wait_ready(60) is not None
    again.close()
    assert gpu.locked_mhz() == 1005


@pytest.mark.parametrize("at_full_clocks", [False, True])
def test_somebody_elses_lock_is_made_again_after_a_kill_too(gpu: EmulatedGpu, spec: str, at_full_clocks: bool) -> None:
    gpu.lock_clock(1005)
    helper = ClockHelper.start(spec)
    assert helper.wait_ready(60) is not None
    if not at_full_clocks:
        helper.request(900)
        wait_for_event(helper, Applied)
    os.kill(helper.pid or 0, signal.SIGKILL)
    wait_until(lambda: gpu.locked_mhz() == 1005 and holder_of(lock_path(spec, gpu.uuid)) is None)


def test_a_lock_taken_away_from_outside_is_made_again(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    gpu.reset_clock()  # `nvidia-smi -rgc` by an administrator
    deviation = wait_for_event(helper, Deviation)
    assert (deviation.requested_mhz, deviation.read_mhz) == (900, 1410)
    wait_until(lambda: gpu.locked_mhz() == 900)
    assert [event for event in other_events(helper) if isinstance(event, Trouble)] == []


def test_one_that_gives_way_leaves_the_clock_as_it_was_set_from_outside(gpu: EmulatedGpu, spec: str) -> None:
    helper = ClockHelper.start(spec, gives_way=True)
    assert helper.wait_ready(60) is not None
    helper.request(900)
    wait_for_event(helper, Applied)
    gpu.lock_clock(1200)
    trouble = wait_for_event(helper, Trouble)
    assert trouble.code == "gave_way"
    assert "(1200 MHz where 900 MHz were asked for)" in trouble.text
    helper.request(810)
    assert helper.close()
    assert gpu.locked_mhz() == 1200


def test_a_power_limit_is_no_change_from_outside(gpu: EmulatedGpu, spec: str) -> None:
    helper = ClockHelper.start(spec, gives_way=True)
    assert helper.wait_ready(60) is not None
    gpu.set_cap(705)
    helper.request(900)
    assert wait_for_event(helper, Deviation).read_mhz == 705
    time.sleep(0.2)
    assert [event for event in other_events(helper) if isinstance(event, Trouble)] == []
    helper.close()


def test_a_change_that_takes_long_is_no_change_from_outside(gpu: EmulatedGpu, spec: str) -> None:
    slow = EmulatedGpu.create(gpu.state.path.parent / "slow", switch_latency_s=0.1, switch_jitter_s=0.0)
    helper = ClockHelper.start(f"emulated:{slow.state.path}", gives_way=True)
    assert helper.wait_ready(60) is not None
    helper.measure_latency(1)
    assert wait_for_event(helper, SwitchLatency).p95_s >= 0.1
    for mhz in (1200, 1005, 810):
        helper.request(mhz)
        time.sleep(0.25)
    assert [event for event in other_events(helper) if isinstance(event, Deviation | Trouble)] == []
    helper.close()


ENDLESS = 100_000
"""Rounds that would take days."""


def test_while_changes_are_timed_it_listens_as_ever(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.measure_latency(ENDLESS)
    wait_until(lambda: len(gpu.events()) > 4)
    helper.mark(7)
    assert wait_for_event(helper, Mark).tag == 7
    helper.poll_energy(0.002)
    wait_for_event(helper, Tick)
    helper.request(900)
    before = len(gpu.events())
    wait_until(lambda: len(gpu.events()) > before + 4)
    assert 900 not in [event.mhz for event in gpu.events()], "nothing else changes the clock meanwhile"
    helper.retire()
    assert wait_for_event(helper, SwitchLatency).timeouts == 0
    wait_until(lambda: gpu.locked_mhz() is None)


@pytest.mark.parametrize("end", ["close", "signal"])
def test_a_timing_ends_at_once_with_the_helper(helper: ClockHelper, gpu: EmulatedGpu, spec: str, end: str) -> None:
    helper.measure_latency(ENDLESS)
    wait_until(lambda: len(gpu.events()) > 4)
    if end == "close":
        assert helper.close()
    else:
        os.kill(helper.pid or 0, signal.SIGTERM)
    wait_until(lambda: free_and_unowned(gpu, spec))


def test_a_timing_ends_with_a_trainer_that_is_killed(gpu: EmulatedGpu, spec: str) -> None:
    code = f"""
import sys, time
from perseus_plugin.control.client import ClockHelper
helper = ClockHelper.start(sys.argv[1])
assert helper.wait_ready(60).can_lock
helper.measure_latency({ENDLESS})
print("ready", flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code, spec], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"ready\n"
    wait_until(lambda: len(gpu.events()) > 4)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: free_and_unowned(gpu, spec))


def test_a_capped_gpu_is_timed_at_clocks_that_it_reaches(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    gpu.set_cap(1100)
    helper.measure_latency(2)
    latency = wait_for_event(helper, SwitchLatency)
    assert (latency.samples, latency.timeouts) == (4, 0)


def test_without_a_dwell_given_it_follows_from_the_switch_latency(spec: str) -> None:
    helper = ClockHelper.start(spec, min_dwell_s=None)
    helper.measure_latency(2)
    latency = wait_for_event(helper, SwitchLatency)
    helper.drain()
    helper.request(1200)
    first = wait_for_event(helper, Applied)
    helper.request(900)
    second = wait_for_event(helper, Applied)
    helper.close(20)
    assert (first.frequency_mhz, second.frequency_mhz) == (1200, 900)
    assert second.called_s - first.called_s >= 2 * latency.p95_s


def test_close_resets_and_ends(spec: str, gpu: EmulatedGpu) -> None:
    helper = ClockHelper.start(spec)
    helper.request(900)  # even before it is ready
    wait_for_event(helper, Applied)
    assert helper.close(20)
    assert free_and_unowned(gpu, spec)
    assert not helper.alive
    helper.request(900)
    helper.mark(1)
    assert helper.drain() == []
    assert helper.close()


def test_dwell_is_kept(spec: str) -> None:
    dwell_s = 1.0  # a busy machine does not keep this test waiting for so long
    helper = ClockHelper.start(spec, min_dwell_s=dwell_s)
    helper.wait_ready(60)
    helper.request(1200)
    first = wait_for_event(helper, Applied)
    helper.request(1005)
    helper.request(900)
    second = wait_for_event(helper, Applied)
    assert (first.frequency_mhz, second.frequency_mhz) == (1200, 900)
    assert second.called_s - first.applied_s >= dwell_s
    helper.request(1410)
    rise = wait_for_event(helper, Applied)
    assert rise.frequency_mhz == 1410
    assert rise.called_s - second.applied_s < dwell_s, "a rise never waits"
    helper.close()


@pytest.mark.parametrize("mode", ["plain", "fork", "raw"])
def test_a_killed_trainer_leaves_no_lock_and_no_helper(spec: str, gpu: EmulatedGpu, mode: str) -> None:
    trainer, child = start_trainer(spec, mode)
    assert gpu.locked_mhz() == 900
    trainer.kill()
    trainer.wait()
    try:
        wait_until(lambda: free_and_unowned(gpu, spec))
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        assert trainer.stdout is not None
        trainer.stdout.close()


@pytest.mark.parametrize("mode", ["exception", "exit"])
def test_a_trainer_that_just_ends_leaves_no_lock(spec: str, gpu: EmulatedGpu, mode: str) -> None:
    trainer, _ = start_trainer(spec, mode)
    trainer.wait(20)
    wait_until(lambda: free_and_unowned(gpu, spec))
    assert trainer.stdout is not None
    trainer.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_helper_frees_the_clock_and_is_trouble(
    helper: ClockHelper, gpu: EmulatedGpu, spec: str, number: int
) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    os.kill(helper.pid or 0, number)
    wait_until(lambda: free_and_unowned(gpu, spec))
    trouble = wait_for_event(helper, Trouble)
    assert (trouble.code, trouble.free) == ("helper_died", True)
    assert trouble.text == "the clock helper ended with status 0: a signal asked it to; its SM clock is free"
    assert not helper.alive
    assert other_events(helper) == []


def test_a_killed_helper_is_reported_once_and_its_lock_freed(helper: ClockHelper, gpu: EmulatedGpu, spec: str) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    os.kill(helper.pid or 0, signal.SIGKILL)
    wait_until(lambda: gpu.locked_mhz() is None)
    wait_until(lambda: not helper.alive)
    helper.request(1005)
    helper.poll_energy(0.001)
    wait_until(lambda: free_and_unowned(gpu, spec))
    assert wait_for_event(helper, Trouble).code == "helper_died"
    assert other_events(helper) == []
    assert gpu.locked_mhz() is None


def test_garbage_on_the_pipe_frees_the_clock(helper: ClockHelper, gpu: EmulatedGpu, spec: str) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    os.write(helper._inlet.number, b"x" * 64)
    wait_until(lambda: free_and_unowned(gpu, spec))
    assert wait_for_event(helper, Trouble).code == "protocol"


def test_a_stopped_helper_never_blocks_the_trainer(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    stop_process(helper.pid or 0)
    before_s = time.monotonic()
    for number in range(5000):
        helper.request(900 if number % 2 else 1005)
    assert time.monotonic() - before_s < 5.0
    assert helper.dropped > 0
    os.kill(helper.pid or 0, signal.SIGCONT)
    helper.request(None)
    wait_until(lambda: gpu.locked_mhz() is None)


# A helper that is alive and says nothing.


@pytest.fixture
def silent_helper(helper: ClockHelper, monkeypatch: pytest.MonkeyPatch) -> ClockHelper:
    """One that has locked the clock, and counts as stuck soon once it is silent."""
    monkeypatch.setattr(client, "STUCK_AFTER_S", 1.5)
    helper.request(900)
    wait_for_event(helper, Applied)
    return helper


def test_a_stopped_helper_is_ended_and_its_clock_freed(silent_helper: ClockHelper, gpu: EmulatedGpu, spec: str) -> None:
    stop_process(silent_helper.pid or 0)
    trouble = wait_for_event(silent_helper, Trouble)
    assert (trouble.code, trouble.free) == ("helper_stuck", True)
    assert trouble.text.endswith("its SM clock is free")
    assert gpu.locked_mhz() is None
    assert not silent_helper.alive
    wait_until(lambda: free_and_unowned(gpu, spec))
    assert other_events(silent_helper) == []


def test_where_processes_start_late_no_clock_is_said_to_be_locked(
    helper: ClockHelper, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that freeing it may take begins with the process that frees it."""
    helper.request(900)
    wait_for_event(helper, Applied)
    command = client.processes.command
    late = ("sh", "-c", f'sleep {client.RESCUE_WAIT_S + 0.5}; exec "$@"', "sh")
    monkeypatch.setattr(client.processes, "command", lambda *words: [*late, *command(*words)])
    os.kill(helper.pid or 0, signal.SIGKILL)
    trouble = wait_for_event(helper, Trouble)
    assert (trouble.code, trouble.free) == ("helper_died", True)
    assert gpu.locked_mhz() is None


def test_of_a_driver_that_hangs_it_is_said_that_the_clock_is_not_free_and_what_frees_it(
    silent_helper: ClockHelper, gpu: EmulatedGpu, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RESCUE_WAIT_S", 0.5)
    gpu.set_faults(0, call_s=6.0)
    silent_helper.request(1005)
    trouble = wait_for_event(silent_helper, Trouble)
    assert (trouble.code, trouble.free) == ("helper_stuck", False)
    assert "the SM clock may still be locked at 900 MHz" in trouble.text
    assert trouble.text.endswith(f"free it with `perseus reset --force --emulated {gpu.state.path}`")
    assert gpu.locked_mhz() == 900
    gpu.set_faults(0)
    wait_until(lambda: free_and_unowned(gpu, spec))  # it is freed as soon as the driver lets us


def test_a_helper_that_not_even_sigkill_ends_does_not_keep_its_clock(
    helper: ClockHelper, gpu: EmulatedGpu, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    stop_process(helper.pid or 0)
    monkeypatch.setattr(rescue.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(rescue, "_DRIVER_HANGS_S", 0.0)
    told: list[str] = []
    rescue.rescue(spec, os.getpid(), instead_of=helper.pid or 0, grace_s=0.0, locked_mhz=900, tell=told.append)
    monkeypatch.undo()
    assert told == [""]
    assert gpu.locked_mhz() is None
    os.kill(helper.pid or 0, signal.SIGCONT)


def test_a_clock_that_stays_where_it_was_is_not_called_free(
    gpu: EmulatedGpu, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "RESET_LIMIT_S", 0.5)
    gpu.lock_clock(900)
    gpu.set_cap(900)
    told: list[str] = []
    rescue.rescue(spec, os.getpid(), instead_of=0, grace_s=0.0, locked_mhz=900, tell=told.append)
    assert "the driver accepted the reset but the clock still reads 900 MHz" in told[0]
    assert read_record(lock_path(spec, gpu.uuid))["clock"] == "locked"


def test_a_stopped_helper_does_not_keep_its_clock_when_the_trainer_ends(gpu: EmulatedGpu, spec: str) -> None:
    code = """
import os, signal, sys
from perseus_plugin.control import client
client.CLOSE_GRACE_S = 3600.0  # a stopped one is not waited for
helper = client.ClockHelper.start(sys.argv[1])
helper.request(900)
while not helper.drain():
    pass
os.kill(helper.pid, signal.SIGSTOP)
assert not helper.close(0.2)
"""
    subprocess.run([sys.executable, "-c", code, spec], check=True)
    wait_until(lambda: free_and_unowned(gpu, spec))


def test_a_suspended_job_has_no_silent_helper(gpu: EmulatedGpu, spec: str) -> None:
    code = """
import os, sys, time
from perseus_plugin.control import client
client.STUCK_AFTER_S = 1.5
helper = client.ClockHelper.start(sys.argv[1])
assert helper.wait_ready(60).can_lock
print(helper.pid, flush=True)
sys.stdin.readline()
time.sleep(0.5)
print([event.code for event in helper.drain()], helper.alive, flush=True)
helper.close()
"""
    trainer = subprocess.Popen([sys.executable, "-c", code, spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    for process in (pid, trainer.pid):
        stop_process(process)
    time.sleep(3.0)
    os.kill(trainer.pid, signal.SIGCONT)
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    assert trainer.communicate(b"\n", 20)[0] == b"[] True\n"


# A trainer that does nothing.


def test_the_clock_is_free_while_the_trainer_is_stopped(gpu: EmulatedGpu, spec: str) -> None:
    trainer, _ = start_trainer(spec, "plain")
    assert gpu.locked_mhz() == 900
    stop_process(trainer.pid)
    wait_until(lambda: gpu.locked_mhz() is None)
    os.kill(trainer.pid, signal.SIGCONT)
    wait_until(lambda: gpu.locked_mhz() == 900)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: free_and_unowned(gpu, spec))
    assert trainer.stdout is not None
    trainer.stdout.close()


def test_the_clock_is_free_while_the_trainer_asks_for_nothing(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.free_after(0.5)
    helper.request(900)
    paused = wait_for_event(helper, Trouble)
    assert paused.code == "paused"
    assert paused.text == "the training process asked for nothing for 0.5 s: its SM clock is free until it goes on"
    assert gpu.locked_mhz() is None
    helper.mark(1)
    assert [wait_for_event(helper, Applied).frequency_mhz for _ in range(3)] == [900, None, 900]
    assert gpu.locked_mhz() == 900


def test_a_clock_that_was_to_rise_meanwhile_is_not_lowered_again(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.free_after(0.3)
    helper.request(900)
    rises_s = time.monotonic() + 1.5
    helper.request(1200, rises_s)
    assert wait_for_event(helper, Trouble).code == "paused"
    time.sleep(max(0.0, rises_s - time.monotonic()) + 0.1)
    helper.mark(1)
    wait_until(lambda: gpu.locked_mhz() == 1200)
    assert [event.mhz for event in gpu.events()][1:] == [900, 0, 1200]


def test_a_suspension_that_is_announced_frees_the_clock_before_all_are_stopped(
    helper: ClockHelper, gpu: EmulatedGpu
) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    os.kill(helper.pid or 0, signal.SIGTSTP)
    wait_until(lambda: gpu.locked_mhz() is None)
    helper.request(1005)
    os.kill(helper.pid or 0, signal.SIGCONT)
    wait_until(lambda: gpu.locked_mhz() == 1005)
    assert helper.alive


def test_a_second_helper_on_the_gpu_observes_only(helper: ClockHelper, spec: str, gpu: EmulatedGpu) -> None:
    second = ClockHelper.start(spec)
    facts = second.wait_ready(60)
    assert facts is not None
    assert not facts.can_lock
    assert "another session of this process controls this GPU" in facts.why_not
    assert f"process {os.getpid()} of user id" in facts.why_not
    second.request(900)
    second.mark(5)
    assert wait_for_event(second, Mark).tag == 5
    assert gpu.locked_mhz() is None
    assert second.close(20)


def test_one_whose_lock_file_was_removed_keeps_its_gpu(
    helper: ClockHelper, spec: str, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STUCK_AFTER_S", 600.0)
    helper.request(900)
    wait_for_event(helper, Applied)
    stop_process(helper.pid or 0)  # else it may have made its file again before the second looks
    lock_path(spec, gpu.uuid).unlink()
    second = ClockHelper.start(spec)
    facts = second.wait_ready(60)
    assert facts is not None
    assert "another job controls this GPU" in facts.why_not
    assert f"its helper is process {helper.pid}" in facts.why_not
    assert second.close(20)
    assert gpu.locked_mhz() == 900
    os.kill(helper.pid or 0, signal.SIGCONT)


def test_a_lock_left_by_a_dead_run_is_found_and_freed(
    helper: ClockHelper, spec: str, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    with monkeypatch.context() as nobody_left:
        nobody_left.setattr(client, "_spawn", _cannot_spawn)  # trainer and helper are killed together
        os.kill(helper.pid or 0, signal.SIGKILL)
        helper._reader.join(20)
    assert gpu.locked_mhz() == 900
    second = ClockHelper.start(spec)
    facts = second.wait_ready(60)
    assert facts is not None
    assert facts.can_lock
    assert f"left locked by process {os.getpid()} of user id" in facts.leftover
    assert gpu.locked_mhz() is None
    assert second.close(20)


def test_permission_taken_away_is_reported_once_and_nothing_is_tried_again(
    helper: ClockHelper, gpu: EmulatedGpu, spec: str
) -> None:
    helper.request(900)
    wait_for_event(helper, Applied)
    gpu.set_faults(NO_PERMISSION)
    helper.request(1005)
    trouble = wait_for_event(helper, Trouble)
    assert (trouble.code, "no permission" in trouble.text) == ("lock_failed", True)
    helper.request(1200)
    helper.mark(1)
    wait_for_event(helper, Mark)
    assert other_events(helper) == []
    assert helper.alive
    gpu.set_faults(0)
    assert helper.close(20)
    assert free_and_unowned(gpu, spec)


def test_a_lost_gpu_is_reported(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    gpu.set_faults(GPU_LOST)
    helper.mark(1)
    assert wait_for_event(helper, Trouble).code == "read_failed"
    helper.request(900)
    assert wait_for_event(helper, Trouble).code == "lock_failed"
    gpu.set_faults(0)


def test_a_counter_that_could_not_be_read_is_polled_again(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    helper.poll_energy(0.002)
    wait_for_event(helper, Tick)
    gpu.set_faults(GPU_LOST)
    assert wait_for_event(helper, Trouble).code == "read_failed"
    time_s = time.monotonic()
    gpu.set_faults(0)
    # One from before may still wait to be taken.
    tick = next(tick for tick in iter(lambda: wait_for_event(helper, Tick), None) if tick.time_s > time_s)
    assert tick.previous_poll_s > time_s, "no tick goes across the gap"


def test_a_gpu_that_does_not_follow_is_reported(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    gpu.set_faults(IGNORE_LOCKS)
    helper.request(900)
    found = wait_for_event(helper, Deviation)
    assert (found.requested_mhz, found.read_mhz) == (900, 1410)


def test_no_permission_at_the_start_leaves_a_helper_that_reads(spec: str, gpu: EmulatedGpu) -> None:
    gpu.set_faults(NO_PERMISSION)
    helper = ClockHelper.start(spec)
    facts = helper.wait_ready(60)
    assert facts is not None
    assert (facts.can_lock, "no permission" in facts.why_not) == (False, True)
    helper.mark(1)
    assert wait_for_event(helper, Mark).tag == 1
    assert helper.close(20)


def test_a_gpu_that_cannot_be_opened_is_one_trouble(tmp_path: Path) -> None:
    helper = ClockHelper.start(f"emulated:{tmp_path / 'missing'}")
    assert helper.wait_ready(60) is None
    wait_until(lambda: not helper.alive)
    assert [(e.code, "cannot open" in e.text) for e in helper.drain() if isinstance(e, Trouble)] == [
        ("helper_failed", True)
    ]
    helper.close()


def test_a_python_that_cannot_start_is_one_trouble(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    helper = ClockHelper.start(spec)
    assert not helper.alive
    assert helper.wait_ready(0) is None
    assert [e.code for e in helper.drain() if isinstance(e, Trouble)] == ["helper_failed"]
    helper.request(900)
    assert not helper.close()


def test_a_forked_child_cannot_touch_the_helper(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    child = os.fork()
    if child == 0:
        helper.request(900)
        os._exit(int(helper.alive or helper.close()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    helper.request(1005)
    assert wait_for_event(helper, Applied).frequency_mhz == 1005
    assert helper.alive


def test_what_the_script_has_opened_in_place_of_our_pipes_is_left_alone(
    gpu: EmulatedGpu, spec: str, tmp_path: Path
) -> None:
    """As a script does that closes all that it does not know."""
    before = pipes_here()
    helper = ClockHelper.start(spec)
    helper.wait_ready(60)
    helper.request(900)
    wait_for_event(helper, Applied)
    pipes = [number for number, pipe in pipes_here().items() if before.get(number) != pipe]
    assert len(pipes) == 2
    theirs = tmp_path / "theirs"
    theirs.write_text("untouched")
    opened = os.open(theirs, os.O_RDWR)
    for number in sorted(pipes, reverse=True):  # what it says goes first, else it may say farewell meanwhile
        os.dup2(opened, number)
    helper.request(1005)
    helper.mark(3)
    wait_until(lambda: free_and_unowned(gpu, spec))
    trouble = wait_for_event(helper, Trouble)
    assert "has closed a file descriptor that is not its own" in trouble.text
    helper.close()
    assert theirs.read_text() == "untouched"
    for number in (*pipes, opened):
        assert os.lseek(number, 0, os.SEEK_CUR) == 0, "nothing was read, and none closed"
        os.close(number)


def test_its_replies_are_not_closed_while_somebody_reads_them(
    spec: str, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who reads them just now reads what the script has opened since, under the same number."""
    monkeypatch.setattr(client, "_LOOK_S", 1.0)
    with monkeypatch.context() as changed:
        changed.setattr(client.processes, "command", lambda *words: ["sh", "-c", "exec >&-; sleep 2"])
        helper = ClockHelper.start(spec)
    assert helper._outlet is not None
    time.sleep(0.3)  # its thread has seen the end, and waits for the process
    with helper._reading:
        time.sleep(1.2)
        assert helper._outlet.number >= 0, "still open"
    assert wait_for_event(helper, Trouble).code == "helper_died"
    with pytest.raises(OSError, match="Bad file descriptor"):
        assert helper._outlet.number


def test_where_the_script_closes_what_the_process_that_frees_the_clock_answers_by_that_is_one_trouble(
    gpu: EmulatedGpu, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pipes_here()
    helper = ClockHelper.start(spec)
    assert helper.wait_ready(60) is not None
    known = {**before, **pipes_here()}
    command = client.processes.command
    late = ("sh", "-c", 'sleep 3; exec "$@"', "sh")
    monkeypatch.setattr(client.processes, "command", lambda *words: [*late, *command(*words)])
    os.kill(helper.pid or 0, signal.SIGKILL)
    wait_until(lambda: helper._rescuer is not None and (said := helper._rescuer.stdout) is not None and said.closed)
    answers: list[int] = []

    def found() -> bool:  # starting a process takes more pipes for a moment
        new = [number for number, pipe in pipes_here().items() if known.get(number) != pipe]
        answers[:] = [number for number in new if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY]
        return len(answers) == 1

    wait_until(found)
    os.close(answers[0])
    trouble = wait_for_event(helper, Trouble)
    assert (trouble.code, trouble.free) == ("helper_died", False)
    assert "the process that was to free it has failed" in trouble.text
    wait_until(lambda: gpu.locked_mhz() is None)
    assert other_events(helper) == []
