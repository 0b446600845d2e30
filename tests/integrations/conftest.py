from __future__ import annotations

import sys
import types

import pytest

from perseus_plugin.stragglers.external import ExternalFigures


class FakeSession:
    """Keeps what other straggler detectors tell it."""

    def __init__(self) -> None:
        self.closed = False
        self.took: list[ExternalFigures] = []

    def external_figures(self, figures: ExternalFigures) -> None:
        self.took.append(figures)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    """The only session of this process."""
    session = FakeSession()
    monkeypatch.setitem(sys.modules, "perseus_plugin.session.session", types.SimpleNamespace(live_sessions={session}))  # type: ignore[arg-type]
    return session
