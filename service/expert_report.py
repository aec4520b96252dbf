"""What the checkpoint's report found of each expert: the characters it likes, and what silencing it costs.

`python -m training report` writes it beside the manifest; nothing is computed with it, so a service does without.
"""

from __future__ import annotations

import json
import logging

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.checkpoint import Manifest
from model.config import ModelConfig
from service.logs import log_event

FILE = "report.json"


class _Found(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)  # Python's JSON reads NaN, which no other does


class Favourite(_Found):
    """A token that an expert took beyond its share."""

    token: str
    lift: float = Field(description="how often the expert took it, over what load and frequency alone would give")
    taken: float = Field(description="share of its occurrences that the expert had a part in")


class CausalMap(_Found):
    """Nats per token on the validation text with one expert silenced, minus without: [layer][expert]."""

    windows: int
    baseline: float = Field(description="nats per token with all experts")
    cost: list[list[float]]
    standard_error: list[list[float | None]]


class ExpertReport(_Found):
    """What was found of each expert, [layer][expert]; null where nobody looked."""

    favourites: list[list[list[Favourite]]] | None = Field(None, description="what it took most beyond its share")
    causal_map: CausalMap | None = None


class _Written(ExpertReport):
    """With the checkpoint that it is about: the manifest cannot list a file that names the manifest."""

    fingerprint: str


def read_report(manifest: Manifest, config: ModelConfig) -> ExpertReport:
    """The report, or an empty one where there is none, or none of these weights and this shape; the log says which."""
    path = manifest.folder / FILE
    if not path.is_file():
        return ExpertReport()
    try:
        written = _Written.model_validate(json.loads(path.read_bytes()))
        written.model_dump_json()  # refuses half a surrogate pair, which JSON can spell and UTF-8 cannot
    except (OSError, ValueError, ValidationError, RecursionError):
        log_event("report_unread", logging.WARNING, file=str(path))
        return ExpertReport()
    if written.fingerprint != manifest.fingerprint or not _fits(written, config):
        log_event("report_of_another_checkpoint", logging.WARNING, file=str(path))
        return ExpertReport()
    return ExpertReport(favourites=written.favourites, causal_map=written.causal_map)


def _fits(report: ExpertReport, config: ModelConfig) -> bool:
    costs = report.causal_map
    tables = [report.favourites, costs and costs.cost, costs and costs.standard_error]
    shape = [config.num_experts] * config.num_layers
    return all(table is None or [len(layer) for layer in table] == shape for table in tables)
