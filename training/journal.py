"""What a run writes down as it goes: ``metrics.jsonl`` and TensorBoard's event files. Both show a step once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.routing import load_entropy_ratio, max_load_ratio
from training import runs
from training.evaluate import Evaluation


@dataclass(frozen=True)
class StepFigures:
    """One step: loss before its update, tokens and seconds of the run so far, and of these the step's own."""

    step: int
    loss: float
    learning_rate_factor: float
    tokens: int
    seconds: float
    tokens_per_second: float

    def as_line(self) -> dict[str, float]:
        return {
            "step": self.step,
            "loss": round(self.loss, 5),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "learning_rate_factor": round(self.learning_rate_factor, 6),
        }


class Journal:
    """Begins after the last step of a resumed run: whatever an earlier process wrote of later steps is dropped."""

    def __init__(self, run: Path, last_step: int) -> None:
        self._run = run
        runs.forget_metrics_after(run, last_step)
        self._board = _board(run / "tensorboard", purge_step=last_step + 1)

    def step(self, figures: StepFigures) -> None:
        runs.append_metrics(self._run, **figures.as_line())
        self._scalars(
            figures.step,
            {
                "train/loss": figures.loss,
                "train/learning_rate_factor": figures.learning_rate_factor,
                "train/tokens_per_second": figures.tokens_per_second,
            },
        )

    def evaluation(self, point: dict[str, Any], figures: StepFigures, result: Evaluation, sample: str) -> None:
        balance = layer_balance(result)
        about = {name: value for name, value in figures.as_line().items() if name not in ("step", "loss")}
        runs.append_metrics(self._run, **point, **about, **balance, max_load=round(result.max_load, 4))
        layers = {
            f"{name}/layer_{layer}": value
            for name in ("layer_max_load", "layer_entropy")
            for layer, value in enumerate(balance[name])
        }
        self._scalars(figures.step, {"validation/loss": result.loss, **layers})
        if self._board:
            self._board.add_text("sample", f"```\n{sample.strip()}\n```", figures.step)
            # Before the checkpoint is written: a run that is killed later resumes after this step.
            self._board.flush()

    def close(self) -> None:
        if self._board:
            self._board.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def layer_balance(result: Evaluation) -> dict[str, list[float]]:
    """max/mean load and normalised entropy of each layer's load on the validation text."""
    return {
        "layer_max_load": [round(load, 4) for load in max_load_ratio(result.counts).tolist()],
        "layer_entropy": [round(entropy, 4) for entropy in load_entropy_ratio(result.counts).tolist()],
    }


def _board(folder: Path, purge_step: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(f"tensorboard is not installed; {folder.parent / 'metrics.jsonl'} has the same numbers", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
