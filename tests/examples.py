"""How many examples hypothesis tries of what is costly: few in `make test`, five times as many in `make test-all`."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100
MANY = 5 * USUAL


def examples(few: int) -> settings:
    """For a test that is marked `many`, which `make test-all` runs again under the profile of that name."""
    return settings(max_examples=few * settings.default.max_examples // USUAL, deadline=None)
