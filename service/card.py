"""What is known of the served model without loading it: names, sizes, vocabulary, training record. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.checkpoint import MANIFEST, Manifest, read_baseline, read_config, read_record, read_tokenizer, verify
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from service.answers import ModelInfo
from service.expert_report import ExpertReport, read_report

FINGERPRINT_DIGITS = 12


@dataclass(frozen=True)
class ModelCard:
    manifest: Manifest
    config: ModelConfig
    tokenizer: Tokenizer
    validation_loss: float | None
    corpus: str | None
    routing_baseline: list[list[float]] | None
    expert_report: ExpertReport

    @classmethod
    def read(cls, folder: Path) -> ModelCard:
        """Checks every file that serving reads. Raises CheckpointError, which names the file."""
        manifest = verify(folder)
        folder = manifest.folder  # a link may be set to another one meanwhile
        record = read_record(folder)
        config, tokenizer, corpus = read_config(folder), read_tokenizer(folder), record["corpus"]["name"]
        baseline = read_baseline(folder, config)
        report = read_report(manifest, config)
        return cls(manifest, config, tokenizer, record.get("validation_loss"), corpus, baseline, report)

    @property
    def fingerprint(self) -> str:
        """Enough of the manifest's hash to tell checkpoints apart, short enough to be read aloud."""
        return self.manifest.fingerprint[:FINGERPRINT_DIGITS]

    @property
    def written_at(self) -> int:
        """When its files came to be here, in seconds since 1970; the manifest is written last."""
        return int((self.manifest.folder / MANIFEST).stat().st_mtime)

    def describe(self) -> ModelInfo:
        config = self.config
        return ModelInfo(
            name=self.manifest.name,
            parameters=config.num_parameters,
            active_parameters=config.num_active_parameters,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            hidden_size=config.hidden_size,
            context_length=config.context_length,
            corpus=self.corpus,
            validation_loss=self.validation_loss,
        )
