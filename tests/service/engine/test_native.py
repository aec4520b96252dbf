"""The native step computes what torch computes, in whatever company, by however many threads and steps at a time."""

from __future__ import annotations

import ctypes
import os
import time
import timeit
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import checkpoint
from model.routing import WEIGHT_SCALE
from model.sampling import SamplingBatch, draw
from model.transformer import Transformer
from service.engine.batch import Batch, DecodeBatch, Piece, PrefillBatch, Wishes
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn
from service.engine.engine import Engine
from service.engine.native import library
from service.engine.native.library import NoLibrary
from service.engine.native.runner import NativeRunner, why_not
from service.engine.probe import find_row_multiple
from service.engine.runner import Runner, TorchRunner
from service.engine.scheduler import PREFILL_ROWS, Scheduler
from service.engine.sequence import SamplingParams, Sequence
from tests.checkpoints import tiny_model
from tests.evidence import At, Evidence
from training import record

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "shakespeare"
SHAPES: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu", "expert_size": 48},
    "top-1 over all": {"experts_per_token": 1, "gates_over": "all"},
    "many experts": {"num_experts": 70, "experts_per_token": 7, "expert_size": 16},
    "one expert": {"num_experts": 1, "experts_per_token": 1},
    "wide": {"hidden_size": 208, "num_heads": 6, "num_kv_heads": 3, "head_dim": 64, "expert_size": 144},
    "long": {"context_length": 100, "num_layers": 1},
}


def model_of(**shape: Any) -> Transformer:
    return record.as_served(tiny_model(**shape)).requires_grad_(False)


@pytest.fixture(params=["native_step", "portable_step"])
def step(request: pytest.FixtureRequest) -> ctypes.CDLL:
    step: ctypes.CDLL = request.getfixturevalue(request.param)
    return step


def native(step: ctypes.CDLL, model: Transformer, slots: int = 16, threads: int = 2) -> NativeRunner:
    return NativeRunner(step, model, slots, ExpertCounters(model.config, slots, model.device), threads)


def counted(runner: NativeRunner | TorchRunner) -> tuple[Tensor, Tensor]:
    return runner.counters.totals()


def options(rows: int, seed: int = 0) -> SamplingBatch:
    """Every filter on and off, in all combinations of neighbours, and greedy rows."""
    chance = torch.Generator().manual_seed(seed)

    def some(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (rows,), generator=chance)]

    seeds = torch.randint(2**63 - 1, (rows,), generator=chance)
    return SamplingBatch(some(0, 0.3, 0.8, 2), some(0, 0, 1, 5, 65, 100).long(), some(1, 0.9, 0.3), some(0, 0.1), seeds)


def batch_of(ids: Tensor, slots: Tensor, positions: Tensor, wishes: Wishes | None = None) -> DecodeBatch:
    wishes = wishes or Wishes(10, None)
    return DecodeBatch(ids, slots, positions, len(ids), options(len(ids)), wishes)


@torch.inference_mode()
def read(runner: Runner, ids: Tensor, rows: int, start: int = 0) -> list[Drawn]:
    """Feed rows of forced ids (T, rows), step by step."""
    slots = torch.arange(rows)
    drawn = [runner.run(batch_of(row, slots, torch.full((rows,), start + at)), 1) for at, row in enumerate(ids)]
    return [each for each in drawn if each]


@torch.inference_mode()
def read_prompt(runner: Runner, ids: Tensor, chunks: list[int], slot: int = 0, wishes: Wishes | None = None) -> Drawn:
    """Read a prompt (T,) in chunks of these lengths, and draw what comes next."""
    start, drawn = 0, None
    for chunk in ids.split(chunks):
        padded = F.pad(chunk, (0, -len(chunk) % PREFILL_ROWS if runner.layout.is_padded else 0))
        ends = start + len(chunk) == len(ids)
        piece = Piece(slot, start, len(chunk), ends)
        batch = PrefillBatch(padded, (piece,), options(int(ends), slot), wishes or Wishes(10, None))
        drawn = runner.run(batch, 1)
        assert bool(drawn) == ends
        start += len(chunk)
    assert drawn
    return drawn


def compare(ours: list[Drawn], theirs: list[Drawn]) -> tuple[float, int, int]:
    """The largest difference of a log-probability; places where experts differ, and where the likeliest letter does."""
    apart, experts, letters = 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs
        assert b.logprobs
        apart = max(apart, (a.logprobs[2] - b.logprobs[2]).abs().max().item())
        experts += int((a.expert_ids != b.expert_ids).sum())
        # Two letters that are this close to each other are a tie.
        clear = b.logprobs[2][..., 0] - b.logprobs[2][..., 1] > 1e-4
        letters += int(((a.logprobs[1] != b.logprobs[1])[..., 0] & clear).sum())
        assert (a.expert_weights - b.expert_weights).abs().max() < 1e-4 or experts
    return apart, experts, letters


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_prompt_of_every_shape_is_read_as_torch_reads_it_and_counted_alike(
    step: ctypes.CDLL, shape: dict[str, Any]
) -> None:
    model = model_of(**shape)
    ids = torch.randint(65, (model.config.context_length + 75,), generator=torch.Generator().manual_seed(1))
    rest = len(ids) - 1 - 20
    ours = native(step, model, threads=3)
    theirs = TorchRunner(model, 16, ExpertCounters(model.config, 16, model.device))
    told = [
        compare([read_prompt(ours, ids, chunks, slot)], [read_prompt(theirs, ids, chunks, slot)])
        for slot, chunks in enumerate([[len(ids)], [1, 20, rest], [rest, 20, 1]])
    ]
    assert max(apart for apart, _, _ in told) < 1e-4
    assert [differing for _, *differing in told] == [[0, 0]] * 3
    (tokens, weight), (tokens_of_torch, weight_of_torch) = counted(ours), counted(theirs)
    assert torch.equal(tokens, tokens_of_torch)
    assert (weight - weight_of_torch).abs().max() <= 1e-5 * WEIGHT_SCALE * 3 * len(ids)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_prompt_has_the_bits_of_as_many_steps_however_it_is_cut_and_by_however_many_it_is_read(
    step: ctypes.CDLL, kv_heads: int
) -> None:
    model = model_of(num_heads=4, num_kv_heads=kv_heads, num_experts=6)
    ids = torch.randint(65, (3 * model.config.context_length + 70,), generator=torch.Generator().manual_seed(2))

    def told(runner: NativeRunner, drawn: Drawn) -> list[object]:
        assert drawn.logprobs
        values = (drawn.token_ids, drawn.expert_ids, drawn.expert_weights, *drawn.logprobs)
        state = (runner.cache.keys[:, 0], runner.cache.values[:, 0], runner.counters.weight[0])
        return [*(value.flatten().tolist() for value in (*values, *state)), runner.counters.tokens[0].sum(0).tolist()]

    runner, zero = native(step, model), torch.tensor([0])
    for at, id_ in enumerate(ids):
        fed = DecodeBatch(id_[None], zero, zero + at, 1, options(1), Wishes(10, None))
        drawn = runner.run(fed, 1)
    assert drawn
    expected = told(runner, drawn)
    for threads, chunks in [(1, [len(ids)]), (2, [16] * 10 + [len(ids) - 160]), (3, [1, 64, len(ids) - 65])]:
        runner = native(step, model, threads=threads)
        assert told(runner, read_prompt(runner, ids, chunks)) == expected, (threads, chunks)


def test_the_probe_finds_a_step_out_whose_prompts_look_at_each_other(native_step: ctypes.CDLL) -> None:
    class Nosy(NativeRunner):
        def run(self, batch: Batch, steps: int, seconds: Tensor | None = None) -> Drawn | None:
            drawn = super().run(batch, steps, seconds)
            if drawn and drawn.logprobs and isinstance(batch, PrefillBatch):
                drawn.logprobs[0].add_(1e-15 * len(batch.pieces))
            return drawn

    model = model_of()

    def runner(kind: type[NativeRunner]) -> NativeRunner:
        return kind(native_step, model, 16, ExpertCounters(model.config, 16, model.device), 1)

    assert find_row_multiple(runner(NativeRunner), 16, 65) == 4
    assert find_row_multiple(runner(Nosy), 16, 65) is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_prompts_that_are_read_together_have_the_bits_of_each_alone(step: ctypes.CDLL, threads: int) -> None:
    """Some end with the chunk, some go on, one has begun earlier, and one may not have all experts."""
    model = model_of(num_heads=4, num_kv_heads=2, num_experts=6)
    context, chance = model.config.context_length, torch.Generator().manual_seed(6)
    lengths, starts, draws = [5, 70, 1, 33], [0, context - 20, 0, 7], [True, False, True, True]
    texts = [torch.randint(65, (length,), generator=chance) for length in lengths]
    disabled = torch.zeros(4, model.config.num_layers, 6, dtype=torch.bool)
    disabled[3, 1, 2] = True

    def told(together: bool) -> list[Any]:
        runner, drawn = native(step, model, threads=threads), list[Any]()
        for slot, start in enumerate(starts):
            if start:  # what stands before
                before = torch.arange(start) % 65
                runner.run(PrefillBatch(before, (Piece(slot, 0, start, False),), options(0), Wishes(None, None)), 1)
        pieces = tuple(map(Piece, range(4), starts, lengths, draws))
        for group in [range(4)] if together else [[each] for each in range(4)]:
            ids, wishes = torch.cat([texts[each] for each in group]), Wishes(10, disabled[list(group)])
            seeds = options(sum(draws))
            rows = [sum(draws[:each]) for each in group if draws[each]]
            own = SamplingBatch(*(value[rows] for value in vars(seeds).values()))
            answer = runner.run(PrefillBatch(ids, tuple(pieces[each] for each in group), own, wishes), 1)
            if answer and answer.logprobs:
                values = (answer.token_ids, answer.expert_ids, answer.expert_weights, *answer.logprobs)
                drawn += [[value[0, row].tolist() for value in values] for row in range(len(rows))]
        assert len(drawn) == 3
        state = (runner.cache.keys, runner.cache.values, runner.counters.tokens, runner.counters.weight)
        return [*drawn, *([value.flatten().tolist()] for value in state)]

    assert told(together=True) == told(together=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_shape_is_what_torch_computes_past_its_context_and_is_counted_alike(
    step: ctypes.CDLL, shape: dict[str, Any]
) -> None:
    model = model_of(**shape)
    steps, rows = model.config.context_length + 20, 5
    ids = torch.randint(65, (steps, rows), generator=torch.Generator().manual_seed(1))
    ours = native(step, model)
    theirs = TorchRunner(model, 16, ExpertCounters(model.config, 16, model.device))
    theirs.pad_rows_to(1)
    apart, experts, letters = compare(read(ours, ids, rows), read(theirs, ids, rows))
    assert apart < 1e-4
    assert (experts, letters) == (0, 0)
    (tokens, weight), (tokens_of_torch, weight_of_torch) = counted(ours), counted(theirs)
    assert torch.equal(tokens, tokens_of_torch)
    assert (weight - weight_of_torch).abs().max() <= 1e-5 * WEIGHT_SCALE * steps * rows


def test_the_shipped_model_is_what_torch_computes(step: ctypes.CDLL, at: At, evidence: Evidence, corpus: Any) -> None:
    loaded = checkpoint.load(SHIPPED)
    rows, steps = 10, at(60, 1000)
    text = torch.tensor(loaded.tokenizer.encode(corpus.validation[: rows * steps]))
    ids = text.view(rows, steps).T
    ours, theirs = (
        native(step, loaded.model),
        TorchRunner(loaded.model, 16, ExpertCounters(loaded.config, 16, loaded.model.device)),
    )
    told, expected = read(ours, ids, rows), read(theirs, ids, rows)
    apart, experts, letters = compare(told, expected)
    differ = torch.stack([(a.expert_ids != b.expert_ids)[0].any(-1) for a, b in zip(told, expected, strict=True)])
    in_doubt = margins(loaded.model, ids) < 1e-4
    evidence("forced tokens", rows * steps)
    evidence("largest difference of a log-probability", apart)
    evidence("choices of experts with a margin below 1e-4", int(in_doubt.sum()))
    evidence("places where another expert was chosen, all of them among these", experts)
    assert apart < 1e-4
    assert letters == 0
    assert not (differ & ~in_doubt).any()


@torch.inference_mode()
def margins(model: Transformer, ids: Tensor) -> Tensor:
    """By how much each choice of experts is clear: ids (T, B) -> (T, B, L), the least distance from one of the largest
    K + 1 router logits to the next."""
    steps, rows = ids.shape
    _, routings = model(ids.T)  # (B, T)
    best = [routing.logits.topk(model.config.experts_per_token + 1, dim=-1).values for routing in routings]
    least = torch.stack([-each.diff(dim=-1).amax(dim=-1) for each in best], dim=-1)
    return least.view(rows, steps, -1).transpose(0, 1)


def test_a_greedy_text_is_what_torch_writes(native_step: ctypes.CDLL, at: At, evidence: Evidence) -> None:
    """Far beyond what its context holds, the shipped model by itself, with every burst as long as can be."""
    loaded, length = checkpoint.load(SHIPPED), at(150, 2000)
    prompt_ids = tuple(loaded.tokenizer.encode("ROMEO:\n"))

    def written(runner: Runner, counters: ExpertCounters) -> list[int]:
        engine = Engine(runner, Scheduler(1, 128), counters)
        one = Sequence(prompt_ids, SamplingParams(max_new_tokens=length, temperature=0.0))
        engine.add(one)
        while engine.has_work:
            engine.step()
        return one.token_ids

    ours, theirs = (ExpertCounters(loaded.config, 1, loaded.model.device) for _ in range(2))
    text = written(NativeRunner(native_step, loaded.model, 1, ours, 2), ours)
    assert text == written(TorchRunner(loaded.model, 1, theirs), theirs)
    assert len(text) == length
    evidence("greedy tokens, all the same", length)


def test_bits_depend_neither_on_company_nor_on_threads_nor_on_the_length_of_a_burst(step: ctypes.CDLL) -> None:
    model = model_of(hidden_size=80, num_experts=6)
    ids = torch.randint(65, (17,), generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(17, dtype=torch.int64)

    def trace(threads: int, rows: Iterable[int], bursts: list[int]) -> list[list[object]]:
        """What each of these rows draws, in one batch."""
        runner, chosen = native(step, model, 17, threads), torch.tensor(list(rows))
        told: list[list[object]] = [[] for _ in chosen]
        whole = batch_of(ids[chosen], chosen, zero[chosen])
        fed, done = replace(whole, options=rows_of(options(17), chosen)), 0
        for steps in bursts:
            drawn = runner.run(fed, steps)
            assert drawn
            assert drawn.logprobs
            for at in range(steps):
                for row, events in enumerate(told):
                    values = (drawn.token_ids, drawn.expert_ids, drawn.expert_weights, *drawn.logprobs)
                    events.append([value[at, row].tolist() for value in values])
            done += steps
            fed = replace(fed, ids=drawn.token_ids[-1], positions=zero[chosen] + done)
        return told

    expected = trace(1, range(17), [1] * 32)
    assert trace(2, range(17), [16, 16]) == expected
    assert trace(3, range(17), [1, 2, 3, 4, 5, 6, 11]) == expected
    for row in (0, 7, 16):
        assert trace(2, [row], [7] * 4 + [4]) == [expected[row]]
    some = [16, 3, 9, 4, 11]
    assert trace(2, some, [32 - 15, 15]) == [expected[row] for row in some]


def rows_of(batch: SamplingBatch, rows: Tensor) -> SamplingBatch:
    return SamplingBatch(*(getattr(batch, name)[rows] for name in ("temperature", "top_k", "top_p", "min_p", "seed")))


def test_it_draws_what_the_reference_draws_from_the_same_logits(step: ctypes.CDLL, at: At) -> None:
    """Where all logarithms are told, the logits are known but for a constant."""
    model = model_of(vocab_size=64)
    runner, rows = native(step, model, 512), 512
    with torch.inference_mode():
        for round_ in range(at(4, 100)):
            ids = torch.randint(64, (rows,), generator=torch.Generator().manual_seed(round_))
            given = replace(
                batch_of(ids, torch.arange(rows), torch.full((rows,), round_), Wishes(64, None)),
                options=options(rows, round_),
            )
            drawn = runner.run(given, 1)
            assert drawn
            assert drawn.logprobs
            _, order, values = (each[0] for each in drawn.logprobs)
            logits = torch.empty_like(values).scatter(-1, order, values)
            assert torch.equal(drawn.token_ids[0], draw(logits, given.options, given.positions + 1))


def test_among_equals_it_keeps_whom_the_reference_keeps(step: ctypes.CDLL) -> None:
    """A head of zeros: 64 letters of 1/64 each, so that every bound of a filter is met exactly."""
    model = model_of(vocab_size=64)
    model.head.weight.zero_()
    rows, runner = 256, native(step, model, 256)
    halves = SamplingBatch(
        temperature=torch.ones(rows, dtype=torch.float64),
        top_k=torch.tensor([0, 1, 7, 64]).repeat(rows // 4),
        top_p=torch.tensor([0.25, 0.5, 1, 1 / 64], dtype=torch.float64).repeat_interleave(rows // 4),
        min_p=torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(2).repeat(rows // 4),
        seed=torch.arange(rows),
    )
    given = replace(batch_of(torch.arange(rows) % 64, torch.arange(rows), torch.arange(rows)), options=halves)
    with torch.inference_mode():
        drawn = runner.run(given, 1)
        assert drawn
        expected = draw(torch.zeros(rows, 64), halves, given.positions + 1)
    assert torch.equal(drawn.token_ids[0], expected)
    assert len(set(expected.tolist())) > 20


def test_experts_that_a_row_does_without_are_never_chosen_and_others_keep_theirs(step: ctypes.CDLL) -> None:
    model = model_of()
    disabled = torch.zeros(2, 3, 4, dtype=torch.bool)
    disabled[1, 0, [0, 2]] = True
    ids, slots, positions = torch.tensor([5, 5]), torch.tensor([3, 4]), torch.tensor([0, 0])
    runner = native(step, model)
    plain = runner.run(batch_of(ids, slots, positions), 8)
    without = runner.run(batch_of(ids, slots, positions, Wishes(3, disabled)), 8)
    assert plain
    assert without
    assert torch.equal(plain.expert_ids[:, 0], without.expert_ids[:, 0])
    assert set(without.expert_ids[:, 1, 0].flatten().tolist()) == {1, 3}


def test_experts_that_a_prompt_does_without_are_never_chosen(step: ctypes.CDLL) -> None:
    model = model_of()
    disabled = torch.zeros(1, 3, 4, dtype=torch.bool)
    disabled[0, 0, [0, 2]] = True
    disabled[0, 2, 1] = True
    ids = torch.randint(65, (100,), generator=torch.Generator().manual_seed(3))
    ours, theirs = native(step, model), TorchRunner(model, 16, ExpertCounters(model.config, 16, model.device))
    apart, *differing = compare(
        *([read_prompt(each, ids, [64, 36], 0, Wishes(10, disabled))] for each in (ours, theirs))
    )
    assert apart < 1e-4
    assert differing == [0, 0]
    assert torch.equal(counted(ours)[0], counted(theirs)[0])
    assert counted(ours)[0][0][disabled[0]].tolist() == [0, 0, 0]


def test_a_prompt_that_is_not_finite_says_so_and_leaves_others_alone(step: ctypes.CDLL) -> None:
    model = model_of()
    ids = torch.randint(65, (40,), generator=torch.Generator().manual_seed(4))
    runner = native(step, model)
    expected = read_prompt(native(step, model), ids, [40], slot=1)
    runner.cache.values[:, 0] = float("nan")
    whole = read_prompt(runner, ids, [40])  # overwrites what it looks at
    assert whole.is_finite.all()
    runner.cache.values[:, 0] = float("nan")
    batch = PrefillBatch(ids[:16], (Piece(0, 40, 16, True),), options(1), Wishes(None, None))
    drawn = runner.run(batch, 1)
    assert drawn
    assert not drawn.is_finite.any()
    assert read_prompt(runner, ids, [40], slot=1).token_ids.tolist() == expected.token_ids.tolist()


def test_a_prompt_that_is_not_finite_leaves_those_alone_that_are_read_with_it(step: ctypes.CDLL) -> None:
    model = model_of()
    ids = torch.randint(65, (3, 20), generator=torch.Generator().manual_seed(4))
    pieces = [Piece(slot, 9, 20, True) for slot in range(3)]

    def told(places: list[int], spoilt: int | None = None) -> Drawn:
        runner = native(step, model)
        if spoilt is not None:
            runner.cache.values[:, spoilt] = float("nan")
        given = tuple(pieces[place] for place in places)
        drawn = runner.run(
            PrefillBatch(ids[places].flatten(), given, rows_of(options(3), torch.tensor(places)), Wishes(3, None)), 1
        )
        assert drawn
        return drawn

    together, others = told([0, 1, 2], spoilt=1), told([0, 2])
    assert together.is_finite.tolist() == [[True, False, True]]
    assert together.token_ids[:, [0, 2]].tolist() == others.token_ids.tolist()
    assert torch.equal(together.expert_weights[:, [0, 2]], others.expert_weights)


def test_more_rows_of_several_prompts_than_there_is_room_for_are_our_own_mistake(native_step: ctypes.CDLL) -> None:
    runner = native(native_step, model_of())
    half = NativeRunner.most_prompt_tokens // 2
    for more in (0, 1):
        pieces = (Piece(0, 0, half, False), Piece(1, 0, half + more, False))
        batch = PrefillBatch(torch.zeros(2 * half + more, dtype=torch.int64), pieces, options(0), Wishes(None, None))
        if more:
            with pytest.raises(AssertionError):
                runner.run(batch, 1)
        else:
            assert runner.run(batch, 1) is None


def test_a_row_that_is_not_finite_says_so_and_leaves_its_neighbours_alone(step: ctypes.CDLL) -> None:
    model = model_of()
    three = batch_of(torch.tensor([1, 3, 2]), torch.tensor([0, 2, 1]), torch.tensor([9, 9, 9]))
    two = torch.tensor([0, 2])
    others = batch_of(three.ids[two], three.slots[two], three.positions[two])
    expected = native(step, model).run(replace(others, options=rows_of(three.options, two)), 4)
    runner = native(step, model)
    runner.cache.values[:, 2] = float("nan")
    drawn = runner.run(three, 4)
    assert expected
    assert drawn
    assert drawn.is_finite.tolist() == [[True, False, True]] * 4
    assert torch.equal(drawn.expert_weights[:, two], expected.expert_weights)
    runner.clear(2)
    again = runner.run(batch_of(torch.tensor([3]), torch.tensor([2]), torch.tensor([0])), 4)
    assert again
    assert again.is_finite.all()


def test_who_is_cleared_takes_nothing_from_his_neighbours(step: ctypes.CDLL) -> None:
    """A ring that no vector's length divides, whose places the step and the cache must count alike."""
    model = record.as_served(tiny_model(context_length=40)).requires_grad_(False)
    ids = torch.randint(65, (90, 3), generator=torch.Generator().manual_seed(5))
    told = []
    for is_cleared in (False, True):
        runner = native(step, model, slots=3)
        read(runner, ids[:60], rows=3)
        if is_cleared:
            runner.clear(0)
        drawn = read(runner, ids[60:], rows=3, start=60)
        told.append(torch.stack([each.logprobs[0][:, 1:] for each in drawn if each.logprobs]))
    assert len(told[0]) == 30
    assert told[0].equal(told[1])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux tells a thread where to run")
def test_two_threads_that_have_one_core_do_not_spin_for_each_other(native_step: ctypes.CDLL) -> None:
    model, batch = checkpoint.load(SHIPPED).model, batch_of(torch.tensor([5]), torch.tensor([0]), torch.tensor([40]))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        runners = [native(native_step, model, 1, threads) for threads in (1, 2)]  # their threads inherit the core
        for runner in runners:
            runner.run(batch, 16)
        cpu_s = [
            timeit.timeit(partial(runner.run, batch, 16), timer=time.process_time, number=30) for runner in runners
        ]
    finally:
        os.sched_setaffinity(0, cores)
    assert cpu_s[1] < 6 * cpu_s[0]  # some 2; some 14 where both spin for as long as on cores of their own


def test_what_it_cannot_compute_is_named(native_step: ctypes.CDLL) -> None:
    assert why_not(tiny_model(num_experts=16, num_groups=4).config) == "it has no two levels of gating"
    assert "head_dim is 48" in (why_not(tiny_model(head_dim=48).config) or "")
    with pytest.raises(NoLibrary, match="bfloat16"):
        native(native_step, tiny_model())


def test_without_a_compiler_or_with_a_broken_one_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "BUILT", tmp_path / "built")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoLibrary, match="no C\\+\\+ compiler"):
        library.load()
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: not today' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(NoLibrary, match="not today"):
        library.load()
    assert list((tmp_path / "built").iterdir()) == []
    broken.write_bytes(b"#!/bin/sh\nprintf 'error: \\377\\376' >&2\nexit 1\n")
    with pytest.raises(NoLibrary, match="\ufffd\ufffd"):
        library.load()
    monkeypatch.setattr(library, "BUILT", tmp_path / ("x" * 300))  # as a folder that may not be entered
    with pytest.raises(NoLibrary, match="does not load"):
        library.load()
