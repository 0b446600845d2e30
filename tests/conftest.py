from __future__ import annotations

import os

from hypothesis import settings

# No deadline per example: the suite must hold on slow and busy machines.
settings.register_profile("perseus", deadline=None)
settings.load_profile("perseus")

# DeepSpeed looks for an accelerator when it is imported, and finds one by compiling code unless told.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
