"""The training loop: batches in, checkpoints out. What a step does depends on (seed, step) alone, so a resume is exact,
and every rank of a parallel run takes its rows of the same global batch.

Letters: B batch, T context_length.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training import Refused, record, runs
from training.baselines import bigram_loss, bits_per_character
from training.chance import chance_in, noise_weights
from training.config import BadConfig, TrainingConfig
from training.corpora import Corpus
from training.evaluate import Evaluation, evaluate
from training.history import History, flops_per_token, lowest
from training.initialise import initialise
from training.journal import Journal, StepFigures
from training.objective import objective
from training.optimizer import Optimizer, schedule
from training.parallel import ALONE, Ranks
from training.process import stop_requested
from training.products import fast_products
from training.progress import Progress
from training.report.experts import chosen_by_class
from training.resume import require_resumable, require_same_text
from training.sample import from_a_new_line

SAMPLE_LENGTH = 200
LOOKED_AT = 2**18
"""Tokens of the validation text that a look scores at the most: a stop has to wait for one."""


class Trainer:
    """One run: its model, its data and where it stands."""

    def __init__(
        self,
        config: TrainingConfig,
        corpus: Corpus,
        run: Path,
        device: torch.device,
        ranks: Ranks = ALONE,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        self.corpus = corpus
        self.run = run
        self.ranks = ranks
        self.tokenizer = tokenizer or _tokenizer_of(config, corpus)
        parts = [self.tokenizer.encode(text) for text in (corpus.train, corpus.validation)]
        _require_windows(corpus.name, min(map(len, parts)), config)
        self.train_ids, self.validation_ids = (torch.tensor(ids, device=device) for ids in parts)
        self.bigram_loss = bigram_loss(self.train_ids, self.validation_ids, self.tokenizer.vocab_size)
        self.model = Transformer(config.model_config(self.tokenizer.vocab_size)).to(device)
        initialise(self.model, config.seed, config.init)
        self.noise = noise_weights(config, self.model.config, device)
        self.optimizer = Optimizer(self.model, config, self.noise, ranks)
        self.history = History()

    @classmethod
    def resume(
        cls, config: TrainingConfig, corpus: Corpus, run: Path, device: torch.device, ranks: Ranks = ALONE
    ) -> Trainer:
        """Continue from a run's newest whole checkpoint, with any number of ranks.

        Raises NothingToResume, or BadConfig for another run.
        """
        folder, facts = require_resumable(config, run)
        require_same_text(corpus, facts, run)
        # Learnt anew, pairs might come out otherwise with another version of the library.
        trainer = cls(config, corpus, run, device, ranks, Tokenizer.load(folder))
        state = runs.read_state(folder)
        weights = {name.removeprefix("model."): state.pop(name) for name in list(state) if name.startswith("model.")}
        trainer.model.load_state_dict(weights)
        trainer.optimizer.restore(state)
        trainer.history = History.from_record(facts)
        if (planned := facts["config"]["steps"]) != config.steps:
            trainer.history.extended.append({"step": facts["steps"], "from": planned, "to": config.steps})
        curve = trainer.history.loss_curve
        trainer.history.best = lowest([at for at in curve if runs.is_whole(runs.step_folder(run, int(at["step"])))])
        return trainer

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.model.config.context_length

    @property
    def tokens(self) -> int:
        return self.history.step * self.tokens_per_step

    @property
    def flops(self) -> int:
        return self.tokens * flops_per_token(self.model.config)

    def train(self) -> Path:
        """Train to the end, or to the end of the step in which SIGINT or SIGTERM came; return the last checkpoint."""
        with stop_requested() as stop, _Watchers(self) as watchers:
            while True:
                figures = self._timed_step()
                watchers.step(figures)
                is_last = self.history.step >= self.config.steps or self._is_asked_to_stop(stop)
                if is_last or self.history.step % self.config.evaluate_every == 0:
                    folder = self.evaluate_and_save(figures, watchers)
                    if is_last or self._is_asked_to_stop(stop):  # the look takes long enough to be asked in
                        return folder

    def _is_asked_to_stop(self, received: list[int]) -> bool:
        """Whether any rank is; all of them ask at once."""
        return self.ranks.any(bool(received), self.model.device)

    def _timed_step(self) -> StepFigures:
        started = time.monotonic()
        factor = self._learning_rate_factor(self.history.step)
        loss = self.train_step(self.history.step)
        seconds = time.monotonic() - started
        self.history.step += 1
        self.history.seconds += seconds
        _require_finite(loss, self.history.step)
        return StepFigures(
            self.history.step, loss, factor, self.tokens, self.history.seconds, self.tokens_per_step / seconds
        )

    def train_step(self, step: int) -> float:
        """One update; returns the cross entropy of its global batch in nats per token, before the update."""
        rows = self.ranks.rows(self.config.batch_size)
        x, y = (ids[rows] for ids in self.batch(step))
        with fast_products(self.model.device):
            logits, routings = self.model(x, chance=chance_in(self.config, self.noise, step, x, rows.start))
            loss, cross_entropy = objective(logits, y, self.ranks.gather(routings), self.config)
            loss.backward()
            self.ranks.average_gradients([*self.model.parameters(), *self.noise.values()])
            self.optimizer.step(step, self._learning_rate_factor(step))
        return self.ranks.mean(cross_entropy.item(), self.model.device)

    def _learning_rate_factor(self, step: int) -> float:
        return schedule(step, self.config.steps, self.config.warmup_steps, self.config.warmdown_share)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of the global batch, drawn by a generator that depends on (seed, step) alone."""
        length = self.model.config.context_length
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, step]))
        starts = generator.integers(0, len(self.train_ids) - length, size=self.config.batch_size)
        rows = torch.from_numpy(starts)[:, None] + torch.arange(length + 1)
        windows = self.train_ids[rows.to(self.train_ids.device)]
        return windows[:, :-1], windows[:, 1:]

    def evaluate_and_save(self, figures: StepFigures, watchers: _Watchers) -> Path:
        """Score the validation text, write a checkpoint folder, and show how far the model has come.

        The first rank does it all; the others wait to hear whether the run goes on.
        """
        rounded = record.as_served(self.model) if self.ranks.is_first else None
        result = evaluate(rounded, self.validation_ids, LOOKED_AT) if rounded else None
        _require_finite(self.ranks.from_first(result.loss if result else 0.0, self.model.device), self.history.step)
        if rounded is None or result is None:
            return runs.step_folder(self.run, self.history.step)
        per_character = len(self.validation_ids) / len(self.corpus.validation)
        point = self.history.remember(
            figures.loss, result.loss, self.tokens, self.flops, tokens_per_character=per_character
        )
        chosen = chosen_by_class(rounded, self.validation_ids, self.tokenizer.token_bytes)
        noted = {} if chosen is None else {"chosen_by_class": chosen}
        sample = from_a_new_line(rounded, self.tokenizer, SAMPLE_LENGTH, seed=1)
        watchers.evaluation({**point, **noted}, figures, result, sample)
        folder = self._save(rounded, result, sample)
        watchers.saved(figures, result, sample)
        return folder

    def _save(self, rounded: Transformer, result: Evaluation, sample: str) -> Path:
        facts = self._facts(result)
        serving = record.serving_files(rounded, self.tokenizer, facts)
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        card = record.card(self.run.name, rounded.config, facts, sample)
        state = {**weights, **self.optimizer.state()}
        assert self.history.best
        return runs.save_step(self.run, self.history.step, serving, card, state, int(self.history.best["step"]))

    @property
    def best_folder(self) -> Path:
        """Where the step of the lowest validation loss is."""
        assert self.history.best
        return runs.step_folder(self.run, int(self.history.best["step"]))

    def _facts(self, result: Evaluation) -> dict[str, Any]:
        """The training record, but for what depends on the weights alone."""
        bits = bits_per_character(result.loss, len(self.validation_ids), len(self.corpus.validation))
        return {
            "config": self.config.as_dict(),
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.digests},
            "tokens": self.tokens,
            "flops": self.flops,
            **self.history.as_record(),
            "validation_loss": round(result.loss, 5),
            "validation_windows": result.num_windows,
            "bits_per_character": round(bits, 5),
            "bigram_loss": round(self.bigram_loss, 5),
            "routing_baseline": result.shares,
            "max_load": round(result.max_load, 4),
        }


class _Watchers:
    """Who is told of the steps and evaluations of a run: a person and the run's folder, by the first rank alone."""

    def __init__(self, trainer: Trainer) -> None:
        history, is_first = trainer.history, trainer.ranks.is_first
        self._progress = Progress(trainer.config.steps, trainer.tokens_per_step, history.step) if is_first else None
        self._journal = Journal(trainer.run, history.step) if is_first else None

    def __enter__(self) -> _Watchers:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        if self._journal:
            self._journal.close()

    def step(self, figures: StepFigures) -> None:
        if self._progress and self._journal:
            self._progress.step(figures.step, figures.loss)
            self._journal.step(figures)

    def evaluation(self, point: dict[str, Any], figures: StepFigures, result: Evaluation, sample: str) -> None:
        if self._journal:
            self._journal.evaluation(point, figures, result, sample)

    def saved(self, figures: StepFigures, result: Evaluation, sample: str) -> None:
        """The person is told last: if nobody reads any more the run ends here, and loses nothing."""
        if self._progress:
            self._progress.evaluation(figures, result, sample)


class Diverged(Refused):
    """The loss is not a number any more. One sentence; what was saved before is still there."""


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} after step {step}; lower the learning rates, and start the run anew")


def _tokenizer_of(config: TrainingConfig, corpus: Corpus) -> Tokenizer:
    """Pairs are learnt from the training text alone; characters have to spell the validation text as well."""
    if config.tokenizer == "byte":
        return Tokenizer.of_bytes()
    if config.tokenizer == "bpe":
        return Tokenizer.of_bpe(corpus.train, config.bpe_vocab_size)
    return Tokenizer.of_characters(corpus.train + corpus.validation)


def _require_windows(name: str, shortest: int, config: TrainingConfig) -> None:
    length = config.model_config(vocab_size=1).context_length
    if shortest <= length:
        raise BadConfig(f"{name} has a part of {shortest:,} tokens; context_length {length} needs more in both")
