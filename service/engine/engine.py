"""Continuous batching, a few steps at a time: admit, run, count, publish. Synchronous; knows no threads and no HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np

from model.routing import WEIGHT_SCALE
from service.engine.batch import build_batch
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn, Rows, frozen
from service.engine.reports import Delivery, Figures, StepReport
from service.engine.runner import Runner
from service.engine.scheduler import DecodePlan, Plan, PrefillPlan, Scheduler
from service.engine.sequence import TELLS_ALL, DrawnToken, Event, FinishReason, Phase, Sequence
from service.engine.stopping import release

log = logging.getLogger(__name__)

STALLED_AFTER_S = 15.0
BURST_S = 0.01
"""For about so long the model runs before anybody can come or go; one step may take longer.

Every burst wakes every stream once, which at 64 streams costs a quarter of what a step does.
"""
BURST_WHILE_OTHERS_WAIT_S = 0.002
"""The same while prompts are unread: a tenth of the time that they are given."""


class Engine:
    """A runner, a scheduler and the books. Every sequence added ends exactly once, and ``_end`` is where it does."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        counters: ExpertCounters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self._scheduler = scheduler
        self._counters = counters
        self._clock = clock
        self._fed = dict.fromkeys(Phase, 0)
        self._generated = 0
        self.last_phase: Phase | None = None  # of the newest step, whatever became of it
        self._num_rows = 1  # of the step that last took step_s
        self._step_s = BURST_S
        self._news: list[Delivery] = []  # not told yet: no end is lost when what comes after it raises

    @property
    def num_slots(self) -> int:
        return self._scheduler.num_slots

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_free_slots(self) -> int:
        return self._scheduler.num_free_slots

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.num_running or self._scheduler.num_waiting)

    @property
    def is_held_up(self) -> bool:
        """All who have a slot are paused, so that a step would do nothing until somebody reads or leaves."""
        can_admit = self.num_waiting and self.num_free_slots
        return self.num_running > 0 and not can_admit and all(one.is_paused for one in self._scheduler.running)

    def add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)

    def step(self) -> StepReport:
        """Run one step for whoever's turn it is, or a burst of them where the runner can and nobody is kept waiting."""
        started = self._clock()
        self._scheduler.admit(started)
        plan = self._scheduler.schedule(started, self.runner.most_prompt_tokens)
        if plan is None:
            return StepReport(())
        self.last_phase = plan.phase
        steps = 1 if isinstance(plan, PrefillPlan) else self._burst(plan)
        drawn = self.runner.run(build_batch(plan, self.runner.layout), steps)
        if isinstance(plan, PrefillPlan):
            for chunk in plan.chunks:
                chunk.sequence.num_prefilled += chunk.num_tokens
                self._feed(chunk.sequence, Phase.PREFILL, chunk.num_tokens)
        else:
            for sequence in plan.sequences:  # before anything is made of it: what raises then leaves the books in order
                self._feed(sequence, Phase.DECODE, steps)
            self._step_s, self._num_rows = (self._clock() - started) / steps, len(plan.sequences)
        if drawn:
            self._deliver(plan, drawn)
        return StepReport(self._take_news(), plan.phase, self._clock() - started, len(plan.sequences), steps)

    def _burst(self, plan: DecodePlan) -> int:
        """How many steps to make at once: none for nothing, none beyond what a reader may leave unread."""
        sequences = plan.sequences
        step_s = self._step_s * max(1.0, len(sequences) / self._num_rows)  # no more than that, if many have come
        most = [self.runner.most_steps, round((BURST_WHILE_OTHERS_WAIT_S if plan.somebody_waits else BURST_S) / step_s)]
        most += [max(each.params.max_new_tokens - len(each.token_ids) for each in sequences)]
        most += [each.may_be_unread for each in sequences if each.may_be_unread is not None]
        return max(1, min(most))

    def expire(self) -> tuple[Delivery, ...]:
        """End those whose time is up, and those whose reader has not moved for too long."""
        now = self._clock()
        for sequence in self._scheduler.sequences:
            if reason := self._overdue(sequence, now):
                self._news.append((sequence, self._end(sequence, reason)))
        return self._take_news()

    def _overdue(self, sequence: Sequence, now: float) -> FinishReason | None:
        if not sequence.is_paused:
            sequence.paused_at = None
        elif sequence.paused_at is None:
            sequence.paused_at = now
        elif now - sequence.paused_at >= STALLED_AFTER_S:
            return FinishReason.STALLED
        if now < sequence.expires_at:
            return None
        return FinishReason.QUEUE_TIMEOUT if sequence.admitted_at is None else FinishReason.TIMEOUT

    def end(self, sequences: Iterable[Sequence], reason: FinishReason) -> tuple[Delivery, ...]:
        """End sequences from outside. One that has ended already, or never was here, is left alone."""
        for sequence in sequences:
            if self._scheduler.holds(sequence):
                self._news.append((sequence, self._end(sequence, reason)))
        return self._take_news()

    def end_waiting(self, reason: FinishReason) -> tuple[Delivery, ...]:
        return self.end(self._scheduler.waiting, reason)

    def end_running(self, reason: FinishReason) -> tuple[Delivery, ...]:
        return self.end(self._scheduler.running, reason)

    def rebuild(self) -> None:
        """After a step that raised: nobody knows what it left behind, so the cache begins anew. The queue goes on."""
        assert not self._scheduler.num_running
        self.runner.rebuild()

    def forget_counts(self) -> None:
        """Drop what warm-up counted."""
        assert not self.has_work
        self._counters.reset()
        self._fed = dict.fromkeys(Phase, 0)
        self._generated = 0

    def figures(self) -> Figures:
        tokens, weight = self._counters.totals()
        layers = tokens.shape[1]
        routed = [[self._fed[phase]] * layers for phase in Phase]
        return Figures(
            taken_at=self._clock(),
            expert_counts=tokens.cpu().numpy(),
            gate_weight=weight.cpu().numpy() / WEIGHT_SCALE,
            routed_tokens=np.array(routed, dtype=np.int64),
            running=self._scheduler.num_running,
            queued=self._scheduler.num_waiting,
            prompt_tokens=self._fed[Phase.PREFILL],
            generated_tokens=self._generated,
        )

    def _take_news(self) -> tuple[Delivery, ...]:
        news, self._news = tuple(self._news), []
        return news

    def _feed(self, sequence: Sequence, phase: Phase, num_tokens: int) -> None:
        sequence.num_fed += num_tokens
        self._fed[phase] += num_tokens

    def _deliver(self, plan: Plan, drawn: Drawn) -> None:
        """Enter what was drawn into its sequences. Who ends within a burst has nothing of the rest of it."""
        rows = Rows(drawn, plan.sequences)
        for row, sequence in enumerate(plan.sequences):
            events: list[Event] = []
            reason: FinishReason | None = None
            step = 0
            while step < len(rows.token_ids) and not reason:
                reason = FinishReason.NON_FINITE
                if rows.is_finite[step][row]:
                    reason = self._draw(sequence, rows.token(step, row, sequence), events)
                step += 1
            if reason:
                self._take_back(sequence, drawn, row, step)
                events += self._end(sequence, reason)
            if events:  # none while a stop string may be beginning
                self._news.append((sequence, tuple(events)))

    def _take_back(self, sequence: Sequence, drawn: Drawn, row: int, first: int) -> None:
        """What a burst fed for a sequence after its end was for nothing."""
        if first < len(drawn.token_ids):
            assert sequence.slot is not None
            self._feed(sequence, Phase.DECODE, first - len(drawn.token_ids))
            ids, weights = drawn.expert_ids[first:, row], drawn.expert_weights[first:, row]
            self._counters.take_back(Phase.DECODE, sequence.slot, ids, weights)

    def _draw(self, sequence: Sequence, token: DrawnToken, events: list[Event]) -> FinishReason | None:
        """Append a drawn token, and to the events what may be told now; why the sequence ends with it, if it does."""
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        sequence.token_ids.append(token.token_id)
        self._generated += 1
        is_last = len(sequence.token_ids) == sequence.params.max_new_tokens
        if is_last:  # what lacks bytes for ever is told with the last token: a token that is told is not taken back
            token.text += sequence.spell_rest()
        if not sequence.params.stop:
            events.append(token)
            return FinishReason.LENGTH if is_last else None
        sequence.held.append(token)
        told, has_stopped = release(sequence.held, sequence.params.stop)
        events += told
        if has_stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if is_last else None

    def _end(self, sequence: Sequence, reason: FinishReason) -> tuple[Event, ...]:
        """The one place where a sequence ends and its slot is given back. What was held back is told."""
        assert not sequence.is_finished
        sequence.finish_reason = reason
        now = self._clock()
        counts = self._settle(sequence)
        self._scheduler.release(sequence)
        ended = sequence.end_record(reason, now, sequence.num_fed, frozen(counts))
        # Cut off, it may go on elsewhere: what may begin a stop string is then told there, or is not.
        return (*sequence.held, ended) if reason in TELLS_ALL else (ended,)

    def _settle(self, sequence: Sequence) -> list[list[int]]:
        """Take a sequence's counts (L, E), and leave nothing in its slot that could harm the next."""
        try:
            if sequence.slot is not None and (
                sequence.finish_reason is FinishReason.NON_FINITE or not sequence.is_prefilled
            ):
                self.runner.clear(sequence.slot)  # an unfinished prompt has not been looked at yet
            counts: list[list[int]] = self._counters.take(sequence.slot).tolist()
        except RuntimeError:
            # A device that has failed answers nothing more; whoever waits must hear of the end all the same.
            log.exception("the counts of a sequence are lost")
            return []
        return counts
