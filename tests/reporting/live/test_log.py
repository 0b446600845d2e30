from __future__ import annotations

import logging

import pytest

from perseus_plugin.reporting.live.log import set_up_logging
from tests.factories import placement


def say() -> None:
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("perseus_plugin.somewhere"), level)("%s said", level)


@pytest.mark.parametrize(
    ("level", "rank", "said"),
    [
        ("info", 0, ["perseus: info said", "perseus: warning said"]),
        ("debug", 0, ["perseus: debug said", "perseus: info said", "perseus: warning said"]),
        ("error", 0, []),
        ("info", 3, ["perseus (rank 3): warning said"]),
        ("debug", 3, ["perseus (rank 3): warning said"]),
        ("error", 3, []),
    ],
)
def test_rank_0_speaks_and_the_others_only_of_trouble(
    fresh_logging: logging.Logger, capsys: pytest.CaptureFixture[str], level: str, rank: int, said: list[str]
) -> None:
    set_up_logging(level, placement(rank))
    say()
    assert capsys.readouterr().err.splitlines() == said


def test_a_second_session_says_nothing_twice(fresh_logging: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("info", placement(0))
    set_up_logging("warning", placement(0))
    say()
    assert capsys.readouterr().err.splitlines() == ["perseus: warning said"]


def test_handlers_of_the_program_are_kept(fresh_logging: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    own = logging.NullHandler()
    fresh_logging.addHandler(own)
    set_up_logging("info", placement(0))
    assert fresh_logging.handlers == [own]
    assert fresh_logging.propagate
