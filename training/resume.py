"""Whether a run goes on from where it was left: its newest whole checkpoint, of the same configuration and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model import checkpoint
from training import config as configs
from training import record, runs
from training.config import BadConfig, TrainingConfig
from training.corpora import Corpus


def require_resumable(config: TrainingConfig, run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run and its training record. Needs no corpus.

    Raises NothingToResume, or BadConfig for another run.
    """
    folder = runs.newest(run)
    if not (folder / runs.RESUME).is_file():
        raise runs.NothingToResume(
            f"{folder} has no {runs.RESUME}: it is a copy for serving; move it, or name another run"
        )
    facts = checkpoint.read_record(folder)
    record.require_trained(folder, facts)
    if facts["steps"] != runs.step_of(folder):
        raise BadConfig(f"{folder} holds step {facts['steps']}; give it back its name, or name another run")
    _require_same(config, facts, run)
    return folder, facts


def _require_same(config: TrainingConfig, facts: dict[str, Any], run: Path) -> None:
    """A resumed run may go on for longer and be looked at more often; anything else would be another run."""
    may_change = {"steps", "evaluate_every"}
    # An older run had the default of an option that came later; a shape may spell its defaults out or not.
    try:
        begun = configs.from_dict({**TrainingConfig().as_dict(), **facts["config"]})
    except BadConfig as error:
        raise BadConfig(f"{run} was begun by another version of this program, begin another run: {error}") from None
    changed = [name for name, value in config.as_dict().items() if getattr(begun, name) != value]
    if begun.model_config(vocab_size=1) == config.model_config(vocab_size=1):
        changed = [name for name in changed if name != "shape"]
    if changed := [name for name in changed if name not in may_change]:
        raise BadConfig(
            f"{run} was begun with another {', '.join(changed)}; resume it with the same, or name another run"
        )
    if facts["steps"] >= config.steps:
        raise BadConfig(f"{run} has its {facts['steps']} steps already; ask for more with --steps")


def require_same_text(corpus: Corpus, facts: dict[str, Any], run: Path) -> None:
    if facts["corpus"]["sha256"] != corpus.digests:
        raise BadConfig(f"{run} was begun with another text; resume it with the same, or name another run with --run")
