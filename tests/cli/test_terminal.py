"""What is printed fits the terminal, and is whole and plain where it must be."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from perseus_plugin.cli import terminal
from perseus_plugin.cli.encoding import speak_ascii_where_needed
from perseus_plugin.cli.simulate import _print
from perseus_plugin.cli.simulation.scenarios import Aim, Figures, Outcome
from perseus_plugin.cli.terminal import console, progress, say, working

FIGURES = Figures(1.0, 12.5, 12.3456, 123456.7, 12.5, 101234.5, 101000.1, 12, 102345.6)
OUTCOMES = [
    Outcome("NVIDIA A100", 8, (12,) * 8, "interleaved-zero-bubble", 96, aim, FIGURES)
    for aim in (Aim(slowdown=0.0), Aim(straggler=1.25), Aim(power_budget_w=12345.0))
]


def printed(width: int, outcomes: list[Outcome] = OUTCOMES) -> list[str]:
    out = io.StringIO()
    _print(Console(file=out, width=width, force_terminal=True, color_system=None), outcomes, modelled=True)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_simulation_can_be_read_at_80_columns() -> None:
    lines = printed(80)
    table = lines[1:-2]
    assert max(map(len, table)) <= 80
    for text in ("12.3456 s", "123456.7 J", "101234.5 J", "17.100%", "straggler 1.25x"):
        assert any(text in line for line in table), text
    assert "…" not in "".join(lines)
    assert "interleaved-zero-bubble, 96 microbatches" in lines[0]


def test_a_wide_terminal_has_a_row_for_each_scenario() -> None:
    assert sum("12.3456 s, 123456.7 J" in line for line in printed(250)) == len(OUTCOMES)


def test_what_is_piped_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _print(console(), OUTCOMES, modelled=False)
    say("word " * 100)
    with progress("planning", 3.0) as tell:
        tell(1.0, "")
    out, err = capsys.readouterr()
    assert sum("12.3456 s, 123456.7 J" in line for line in out.splitlines()) == len(OUTCOMES)
    assert out.splitlines()[-1] == "word " * 100
    assert err == "", "no progress where nobody watches"


def test_the_cursor_is_there_while_something_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "console", lambda **_: Console(file=out, force_terminal=True))
    for moving in (progress("planning", 3.0), working("reading")):
        with moving:
            said = out.getvalue()
            assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "Ctrl-C may end the process here"


def test_a_terminal_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    speak_ascii_where_needed()
    say("2 × GPU · 300 J → 200 J, café, \udcff, 计")
    sys.stdout.flush()
    assert raw.getvalue() == b"2 x GPU - 300 J -> 200 J, cafe, \\udcff, \\u8ba1\n"
