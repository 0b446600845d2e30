"""How jobs are started here leaves nothing behind."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.launching import started_ranks
from tests.waiting import came_true

SLEEPER = """
import os, pathlib, time
pathlib.Path(os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""
pytestmark = [pytest.mark.e2e, pytest.mark.repeated]


def runs(pid: int) -> bool:
    """Whether there is this process; not one that has ended and that nobody has asked after."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


@pytest.mark.parametrize("torchrun", [True, False])
def test_ranks_that_do_not_end_end_with_the_block(tmp_path: Path, torchrun: bool) -> None:
    script, told = tmp_path / "sleeper.py", [tmp_path / "0", tmp_path / "1"]
    script.write_text(SLEEPER)
    with started_ranks(2, tmp_path, str(script), torchrun=torchrun) as job:
        assert came_true(lambda: all(one.exists() and one.read_text() for one in told))
        ranks = [int(one.read_text()) for one in told]
        assert sorted(job.ranks()) == sorted(ranks)
        assert all(map(runs, ranks))
    assert came_true(lambda: not any(map(runs, ranks)), timeout_s=20.0)
