"""What every benchmark says of the machine, and where its figures are kept."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.machine import usable_cpus

RESULTS = Path(__file__).parent / "results"


def keep(folder: Path, what: str, result: dict[str, Any]) -> None:
    """Print a result as one JSON line, with the date, and keep it in the folder as that of today."""
    now = datetime.now(UTC)
    line = json.dumps({"date": now.isoformat(timespec="seconds"), **result})
    print(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{what}-{now.date()}.json").write_text(line + "\n")


def machine() -> dict[str, Any]:
    models = [line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"cpu": models[0] if models else os.uname().machine, "cores": usable_cpus()}


def cores_of_others(since: tuple[float, float, float]) -> float:
    """How many cores were busy, on average, with what is not ours. Ours have ended and been waited for."""
    wall, busy, own = (now - then for now, then in zip(clocks(), since, strict=True))
    return round(max(0.0, busy - own) / wall, 2)


def clocks() -> tuple[float, float, float]:
    """Seconds: of the wall, of all processes on all cores, of this process and those it has waited for."""
    busy = [int(jiffies) for jiffies in (_lines("/proc/stat") or ["cpu 0 0 0"])[0].split()[1:4]]
    return time.perf_counter(), sum(busy) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
