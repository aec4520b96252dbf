"""What a person sees of a run: a progress bar with what remains, and a few lines at every evaluation."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from training.evaluate import Evaluation
from training.journal import StepFigures


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process here, without a word."""
        raise


class Progress:
    """A bar on a terminal; in a log file, only the evaluations' lines."""

    def __init__(self, num_steps: int, tokens_per_step: int, done: int) -> None:
        self._console = _Console(highlight=False, soft_wrap=True)
        self._tokens_per_step = tokens_per_step
        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=done, status="")

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float) -> None:
        speed = self._bar.tasks[self._task].speed
        rate = f"{speed * self._tokens_per_step:,.0f} tokens/s" if speed else ""
        self._bar.update(self._task, completed=step, status=f"loss {loss:.4f} {rate}")

    def evaluation(self, figures: StepFigures, result: Evaluation, sample: str) -> None:
        self._console.print(
            f"step {figures.step}: validation loss {result.loss:.4f} over {result.num_windows} windows, "
            f"busiest expert {result.max_load:.2f} x the mean, {result.num_idle} idle, "
            f"entropy {result.min_entropy:.3f}, "
            f"{figures.tokens / figures.seconds:,.0f} tokens/s",
            markup=False,
        )
        for line in sample.strip().splitlines()[:4]:
            self._console.print(f"  | {line}", markup=False)
