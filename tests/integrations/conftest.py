from __future__ import annotations

from collections.abc import Iterator

import pytest

from perseus_plugin.config import PerseusConfig
from perseus_plugin.integrations.base import start_session
from perseus_plugin.integrations.in_memory import InMemorySession, sessions_in_memory
from tests.factories import placement


@pytest.fixture
def session() -> Iterator[InMemorySession]:
    """The only session of this process; it keeps what other straggler detectors tell it."""
    with sessions_in_memory() as sessions:
        start_session(PerseusConfig(), placement())
        yield sessions[0]
