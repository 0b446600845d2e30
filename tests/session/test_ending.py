from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from perseus_plugin.session.ending import close_before_the_group

IMPORTED_BEFORE = dist.destroy_process_group


class Session:
    """One that notes whether the group was there when it was closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.closed, self.had_group, self._error = False, False, error

    def close(self) -> None:
        self.closed = True
        self.had_group = dist.distributed_c10d._get_default_store() is not None
        if self._error is not None:
            raise self._error


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Have a session be one of this process, which has a process group."""
    kept: list[Any] = []
    monkeypatch.setattr("perseus_plugin.session.ending.kept_sessions", lambda: list(kept))
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    close_before_the_group()
    close_before_the_group()
    yield lambda session: kept.append(session) or session
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "destroy",
    [
        lambda: dist.destroy_process_group(),
        lambda: dist.destroy_process_group(dist.group.WORLD),
        lambda: dist.destroy_process_group(group=None),
        lambda: dist.distributed_c10d.destroy_process_group(),
        IMPORTED_BEFORE,
    ],
)
def test_sessions_are_closed_while_the_store_is_there(keep: Callable[[Any], Any], destroy: Callable[[], None]) -> None:
    session = keep(Session())
    destroy()
    assert session.closed
    assert session.had_group
    assert not dist.is_initialized()


def test_a_group_that_is_not_the_jobs_ends_nothing(keep: Callable[[Any], Any]) -> None:
    session = keep(Session())
    dist.destroy_process_group(dist.new_group([0]))
    assert not session.closed
    assert dist.is_initialized()


def test_a_session_that_cannot_be_closed_is_said_and_the_group_goes(
    keep: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    keep(Session(ValueError("no")))
    other = keep(Session())
    dist.destroy_process_group()
    assert other.closed
    assert not dist.is_initialized()
    assert "the summary may be incomplete: ValueError('no'). Training is not affected" in caplog.text


def test_a_process_without_torch_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed")
    close_before_the_group()
