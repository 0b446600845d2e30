"""What takes a job's figures elsewhere: whatever one of them does, the others and training go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from perseus_plugin.config import PerseusConfig
from perseus_plugin.reporting.live.publishers import PUBLISHERS, InMemoryPublisher, Publishers


class Failing(InMemoryPublisher):
    """Fails when it is told something, and when it is closed."""

    def __call__(self, events: Sequence[tuple[str, float]]) -> None:
        raise RuntimeError("the network is gone")

    def close(self) -> None:
        raise RuntimeError("the network is still gone")


@pytest.fixture
def kept() -> Iterator[InMemoryPublisher]:
    """Registered behind one that cannot be made, one that is not wanted, and one that fails."""
    made, before = InMemoryPublisher(), len(PUBLISHERS)

    def broken(config: PerseusConfig, facts: object) -> None:
        raise ValueError("no address")

    PUBLISHERS.extend([broken, lambda config, facts: None, lambda config, facts: Failing(), lambda config, facts: made])
    yield made
    del PUBLISHERS[before:]


def test_one_that_fails_is_said_once_and_the_others_go_on(
    kept: InMemoryPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    publishers = Publishers(PerseusConfig(), {"gpu": "A100"})
    publishers([("Perseus/energy_j/measured", 2.0), ("Perseus/energy_j/predicted", 3.0)])
    publishers([("Perseus/energy_j/measured", 1.0)])
    assert kept.newest == {"Perseus/energy_j/measured": 1.0, "Perseus/energy_j/predicted": 3.0}
    publishers.close()
    assert kept.closed
    broken, failing = caplog.messages
    assert "broken any more: ValueError('no address'); training goes on" in broken
    assert (
        failing
        == "figures are not published by Failing any more: RuntimeError('the network is gone'); training goes on"
    )


def test_one_that_fails_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(InMemoryPublisher):
        def __call__(self, events: Sequence[tuple[str, float]]) -> None:
            raise RuntimeError("the network is gone")

    deaf = Deaf()
    monkeypatch.setattr("perseus_plugin.reporting.live.publishers.PUBLISHERS", [lambda config, facts: deaf])
    publishers = Publishers(PerseusConfig(), {})
    publishers([("Perseus/energy_j/measured", 2.0)])
    publishers.close()
    assert deaf.closed, "what it has opened is open still"


@pytest.mark.usefixtures("kept")
def test_one_that_cannot_be_closed_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    Publishers(PerseusConfig(), {}).close()
    assert "still gone" in caplog.text
