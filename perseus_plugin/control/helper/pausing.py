"""When a clock is to be free because the trainer does nothing that it is for: a suspended job, a debugger, a collective
that hangs. It is taken up again when the trainer goes on. Pure."""

from __future__ import annotations

SUSPENDED_S = 5.0
"""Schedulers announce a stop by SIGTSTP, some seconds before the SIGSTOP that stops the helper, too."""


class Pauses:
    """Tells whether the trainer does nothing.

    Args:
        now_s: the time.
    """

    def __init__(self, now_s: float) -> None:
        self._free_after_s = float("inf")
        self._heard_s = now_s
        self._suspended_until_s = 0.0
        self._stopped = False

    def free_after(self, silence_s: float) -> None:
        """How long it may send nothing; without this, for ever."""
        self._free_after_s = silence_s

    def heard(self, now_s: float) -> None:
        """The trainer has sent something."""
        self._heard_s = now_s

    def suspend(self, now_s: float) -> None:
        """A stop was announced."""
        self._suspended_until_s = now_s + SUSPENDED_S

    def resume(self) -> None:
        """It is over."""
        self._suspended_until_s = 0.0

    def why(self, now_s: float, stopped: bool) -> str:
        """Why the clock is to be free, for people; empty if it is not.

        Args:
            now_s: the time.
            stopped: whether the trainer is stopped, by a signal or a debugger.
        """
        if self._stopped and not stopped:
            self._heard_s = now_s  # its silence counts from when it goes on
        self._stopped = stopped
        if stopped:
            return "the training process was stopped"
        if now_s < self._suspended_until_s:
            return "the job is about to be suspended (SIGTSTP)"
        if now_s - self._heard_s > self._free_after_s:
            return f"the training process asked for nothing for {self._free_after_s:.3g} s"
        return ""
