"""What the processor is and can do. Reads /proc; knows no torch."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """What the processor calls itself."""
    arm = f"{_field('CPU implementer')} {_field('CPU part')}".strip()
    return _field("model name") or arm or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The extensions that the processor has, as Linux calls them; none where that is not known."""
    return frozenset((_field("flags") or _field("Features")).split())


def _field(name: str) -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
