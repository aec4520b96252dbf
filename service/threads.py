"""How the process's threads, the model's and the event loop's, share its CPUs. Has to come before torch is imported."""

from __future__ import annotations

import os
import sys
from typing import Final

SWITCH_INTERVAL_S: Final = 0.0005


def tune_process() -> None:
    """Has no effect on a torch that is imported already."""
    # torch's threads spin while they wait for each other. For microseconds that pays (sleeping at once halves the speed
    # at one stream); for longer it takes the core from the event loop and from whoever else is there.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # the engine's thread holds the GIL for most of a step otherwise
