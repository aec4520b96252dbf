"""The training loop: batches in, checkpoints out. What a step does depends on (seed, step) alone, so a resume is exact.

Letters: B batch, T context_length.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import checkpoint
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training import record, runs
from training.balance import switch_loss, z_loss
from training.config import BadConfig, TrainingConfig
from training.corpora import Corpus
from training.evaluate import Evaluation, evaluate
from training.initialise import initialise
from training.optimizer import LearningRates, Optimizer, schedule
from training.progress import Progress
from training.report.experts import chosen_by_class

# makeMoE's best and nanoGPT's GPU configuration, both on tiny Shakespeare: a run notes when it passes them.
MILESTONES = (1.7439, 1.4697)


@dataclass
class History:
    """What a run remembers between its steps and across its interruptions."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    milestones: dict[str, dict[str, float]] = field(default_factory=dict)


class Trainer:
    """One run: its model, its data and where it stands."""

    def __init__(self, config: TrainingConfig, corpus: Corpus, run: Path, device: torch.device) -> None:
        _require_windows(corpus, config.model_config(vocab_size=1).context_length)
        self.config = config
        self.corpus = corpus
        self.run = run
        self.tokenizer = Tokenizer.of_characters(corpus.train + corpus.validation)
        self.model = Transformer(config.model_config(self.tokenizer.vocab_size)).to(device)
        initialise(self.model, config.seed)
        self.optimizer = Optimizer(self.model, _learning_rates(config))
        self.train_ids = torch.tensor(self.tokenizer.encode(corpus.train), device=device)
        self.validation_ids = torch.tensor(self.tokenizer.encode(corpus.validation), device=device)
        self.history = History()

    @classmethod
    def resume(cls, config: TrainingConfig, corpus: Corpus, run: Path, device: torch.device) -> Trainer:
        """Continue from a run's newest whole checkpoint. Raises NothingToResume, or BadConfig for another run."""
        folder = runs.newest(run)
        facts = checkpoint.read_record(folder)
        _require_same(config, corpus, facts, run)
        trainer = cls(config, corpus, run, device)
        state = runs.read_state(folder)
        weights = {name.removeprefix("model."): state.pop(name) for name in list(state) if name.startswith("model.")}
        trainer.model.load_state_dict(weights)
        trainer.optimizer.restore(state)
        trainer.history = History(facts["steps"], facts["seconds"], facts["loss_curve"], facts["milestones"])
        runs.forget_metrics_after(run, trainer.history.step)
        return trainer

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.model.config.context_length

    def train(self) -> Path:
        """Train to the end, or to the end of the step in which SIGINT or SIGTERM came; return the last checkpoint."""
        progress = Progress(self.config.steps, self.tokens_per_step, self.history.step)
        with _stop_requested() as stop, progress:
            while True:
                loss = self._timed_step()
                progress.step(self.history.step, loss)
                is_last = self.history.step >= self.config.steps or bool(stop)
                if is_last or self.history.step % self.config.evaluate_every == 0:
                    folder = self.evaluate_and_save(loss, progress)
                if is_last:
                    return folder

    def _timed_step(self) -> float:
        started = time.monotonic()
        loss = self.train_step(self.history.step)
        self.history.step += 1
        self.history.seconds += time.monotonic() - started
        _require_finite(loss, self.history.step)
        runs.append_metrics(self.run, step=self.history.step, loss=round(loss, 5))
        return loss

    def train_step(self, step: int) -> float:
        """One update; returns the cross entropy of its batch in nats per token, before the update."""
        x, y = self.batch(step)
        logits, routings = self.model(x)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        # Summed over the layers, not averaged: averaging lets the last layer drift out of balance.
        balance = torch.stack([switch_loss(routing) for routing in routings]).sum()
        z = torch.stack([z_loss(routing) for routing in routings]).sum()
        (cross_entropy + self.config.balance_weight * balance + self.config.z_weight * z).backward()
        factor = schedule(step, self.config.steps, self.config.warmup_steps, self.config.warmdown_share)
        self.optimizer.step(step, factor)
        return cross_entropy.item()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T), drawn by a generator that depends on (seed, step) alone."""
        length = self.model.config.context_length
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, step]))
        starts = generator.integers(0, len(self.train_ids) - length, size=self.config.batch_size)
        rows = torch.from_numpy(starts)[:, None] + torch.arange(length + 1)
        windows = self.train_ids[rows.to(self.train_ids.device)]
        return windows[:, :-1], windows[:, 1:]

    def evaluate_and_save(self, train_loss: float, progress: Progress) -> Path:
        """Score the validation text, write a checkpoint folder, and show how far the model has come."""
        rounded = record.as_served(self.model)
        result = evaluate(rounded, self.validation_ids)
        _require_finite(result.loss, self.history.step)
        self._remember(train_loss, result)
        chosen = chosen_by_class(rounded, self.validation_ids, self.tokenizer.tokens)
        if chosen is not None:
            runs.append_metrics(self.run, step=self.history.step, chosen_by_class=chosen)
        sample = record.sample(rounded, self.tokenizer)
        progress.evaluation(self.history.step, result, sample)
        serving = record.serving_files(rounded, self.tokenizer, self._facts(result))
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        card = record.card(self.run.name, rounded.config, self._facts(result), sample)
        return runs.save_step(self.run, self.history.step, serving, card, {**weights, **self.optimizer.state()})

    def _remember(self, train_loss: float, result: Evaluation) -> None:
        tokens = self.history.step * self.tokens_per_step
        point = {
            "step": self.history.step,
            "train_loss": round(train_loss, 5),
            "validation_loss": round(result.loss, 5),
        }
        self.history.curve.append(point)
        runs.append_metrics(
            self.run, **point, max_load=round(result.max_load, 4), seconds=round(self.history.seconds, 1)
        )
        for milestone in MILESTONES:
            if result.loss < milestone:
                reached = {"step": self.history.step, "tokens": tokens, "seconds": round(self.history.seconds, 1)}
                self.history.milestones.setdefault(str(milestone), reached)

    def _facts(self, result: Evaluation) -> dict[str, Any]:
        """The training record, but for what depends on the weights alone."""
        return {
            "config": self.config.as_dict(),
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.digests},
            "steps": self.history.step,
            "tokens": self.history.step * self.tokens_per_step,
            "seconds": round(self.history.seconds, 1),
            "loss_curve": self.history.curve,
            "milestones": self.history.milestones,
            "validation_loss": round(result.loss, 5),
            "validation_windows": result.num_windows,
            "routing_baseline": result.shares,
            "max_load": round(result.max_load, 4),
        }


class Diverged(Exception):
    """The loss is not a number any more. One sentence; what was saved before is still there."""


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} after step {step}; lower the learning rates, and start the run anew")


def _require_windows(corpus: Corpus, length: int) -> None:
    shortest = min(len(corpus.train), len(corpus.validation))
    if shortest <= length:
        raise BadConfig(
            f"{corpus.name} has a part of {shortest:,} characters; context_length {length} needs more in both"
        )


def _require_same(config: TrainingConfig, corpus: Corpus, facts: dict[str, Any], run: Path) -> None:
    """A resumed run may go on for longer and be looked at more often; anything else would be another run."""
    may_change = {"steps", "evaluate_every"}
    changed = [name for name, value in config.as_dict().items() if facts["config"].get(name) != value]
    if changed := [name for name in changed if name not in may_change]:
        raise BadConfig(
            f"{run} was begun with another {', '.join(changed)}; resume it with the same, or name another run"
        )
    if facts["corpus"]["sha256"] != corpus.digests:
        raise BadConfig(f"{run} was begun with another text; resume it with the same, or name another run with --run")
    if facts["steps"] >= config.steps:
        raise BadConfig(f"{run} has its {facts['steps']} steps already; ask for more with --steps")


def _learning_rates(config: TrainingConfig) -> LearningRates:
    return LearningRates(
        config.matrix_learning_rate, config.embedding_learning_rate, config.head_learning_rate, config.weight_decay
    )


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes. A second signal interrupts at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
