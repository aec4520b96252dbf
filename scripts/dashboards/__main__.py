"""Writes Grafana's dashboards, deploy/grafana/dashboards/*.json: ``make dashboards``.

``--check`` writes nothing and says which files are not what this would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from scripts.dashboards.experts import experts
from scripts.dashboards.overview import overview

TARGET: Final = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"


def files() -> dict[str, str]:
    """Name and text of every dashboard's file."""
    return {"overview.json": as_json(overview()), "experts.json": as_json(experts())}


def as_json(page: Dashboard) -> str:
    model: dict[str, Any] = json.loads(json.dumps(page.build(), cls=JSONEncoder))
    for place, panel in enumerate(model["panels"], start=1):
        panel["id"] = place  # without one Grafana numbers them itself
    return json.dumps(model, indent=1, sort_keys=True) + "\n"


def stale(folder: Path) -> list[str]:
    """Names of the files in it that are not what would be written, missing ones and those of nobody included."""
    there = {path.name: path.read_text() for path in folder.glob("*.json")}
    wanted = files()
    return sorted(name for name in there | wanted if there.get(name) != wanted.get(name))


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Grafana's dashboards.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are stale, exit 1")
    if not parser.parse_args().check:
        write(TARGET)
    elif names := stale(TARGET):
        sys.exit(f"deploy/grafana/dashboards: {', '.join(names)} not as the script writes it; run make dashboards")


if __name__ == "__main__":
    main()
