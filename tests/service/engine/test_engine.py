"""The engine writes what the uncached reference writes, whoever else is there, and its books always balance."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.generate import generate
from model.kv_cache import KVCache
from model.transformer import Transformer
from service.engine import engine as engine_module
from service.engine.batch import Batch, DecodeBatch
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn
from service.engine.engine import Engine
from service.engine.native.runner import NativeRunner
from service.engine.probe import find_row_multiple
from service.engine.runner import Runner, TorchRunner
from service.engine.scheduler import Scheduler
from service.engine.sequence import DrawnToken, Ended, Event, FinishReason, Phase, SamplingParams, Sequence
from tests.checkpoints import tiny_model
from tests.evidence import At, Evidence
from training import record

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "shakespeare"
CONTEXT = 32


NATIVE: dict[Transformer, ctypes.CDLL] = {}  # those that the native step decodes


@pytest.fixture(scope="module", params=["cpu torch", "cpu native", pytest.param("cuda torch", marks=pytest.mark.cuda)])
def model(request: pytest.FixtureRequest) -> Transformer:
    device, runner = request.param.split()
    model = record.as_served(tiny_model()).requires_grad_(False).to(device)
    if runner == "native":
        NATIVE[model] = request.getfixturevalue("native_step")
    return model


def engine_for(model: Transformer, num_slots: int = 16, prefill_chunk: int = 16, most_steps: int = 16) -> Engine:
    counters = ExpertCounters(model.config, num_slots, model.device)
    runner: Runner = TorchRunner(model, num_slots, counters)
    if model in NATIVE:
        runner = NativeRunner(NATIVE[model], model, num_slots, counters, threads=2)
        runner.most_steps = most_steps
    return Engine(runner, Scheduler(num_slots, prefill_chunk), counters)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 65, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def sequence(
    length: int = 5, max_new_tokens: int = 20, seed: int = 0, temperature: float = 0.8, *, routed: bool = False
) -> Sequence:
    return Sequence(prompt(length, seed), SamplingParams(max_new_tokens, temperature, seed=seed), routed)


@torch.inference_mode()
def run(engine: Engine, *sequences: Sequence, steps: int | None = None) -> dict[Sequence, list[Event]]:
    """Add sequences and step until all is done, or so often; the events of each."""
    for one in sequences:
        engine.add(one)
    events: dict[Sequence, list[Event]] = {one: [] for one in sequences}
    while engine.has_work and steps != 0:
        for one, news in engine.step().events:
            events.setdefault(one, []).extend(news)
        steps = steps - 1 if steps else None
    return events


def ended(events: list[Event]) -> Ended:
    assert isinstance(events[-1], Ended)
    assert not any(isinstance(event, Ended) for event in events[:-1])
    return events[-1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("length", [1, 16, 17, 3 * CONTEXT + 5])
def test_alone_it_writes_what_the_reference_writes(model: Transformer, length: int, temperature: float) -> None:
    one = sequence(length, max_new_tokens=3 * CONTEXT + 10, seed=4, temperature=temperature)
    run(engine_for(model), one)
    expected = generate(model, list(one.prompt_ids), 3 * CONTEXT + 10, temperature=temperature, seed=4)
    assert one.token_ids == expected


def test_cached_decode_equals_the_reference_alone_and_among_fifteen(
    model: Transformer, at: At, evidence: Evidence
) -> None:
    """Past three contexts; the small size uses a small model, the full size the shipped one."""
    if at.full_size:
        shipped = checkpoint.load(SHIPPED, str(model.device)).model
        NATIVE.update({shipped: NATIVE[model]} if model in NATIVE else {})
        model = shipped
    length = 3 * model.config.context_length + 40
    alone = sequence(7, max_new_tokens=length, seed=1)
    run(engine_for(model), alone)
    assert alone.token_ids == generate(model, list(alone.prompt_ids), length, temperature=0.8, seed=1)
    among = sequence(7, max_new_tokens=length, seed=1)
    others = [sequence(3 + 9 * i, max_new_tokens=length - 5 * i, seed=100 + i) for i in range(15)]
    run(engine_for(model), *others[:8], among, *others[8:])
    assert among.token_ids == alone.token_ids
    for other in others[:: at(3, 15)]:
        text = generate(model, list(other.prompt_ids), len(other.token_ids), temperature=0.8, seed=other.params.seed)
        assert other.token_ids == text
    evidence("tokens equal to the uncached reference, alone and among fifteen", length)


@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(model: Transformer) -> None:
    cache = KVCache(model.config, num_slots=16, device=model.device)
    ids = torch.tensor(prompt(16), device=model.device)
    at = torch.arange(16, device=model.device)
    view = cache.decode(at, at)
    crowd, _ = model.hidden(ids[:, None], at[:, None], view.layer)
    cache = KVCache(model.config, num_slots=16, device=model.device)
    for row in range(0, 16, 4):
        few = at[row : row + 4]
        hidden, _ = model.hidden(ids[few][:, None], few[:, None], cache.decode(few, few).layer)
        assert torch.equal(hidden, crowd[few])


def test_sequences_that_come_later_or_share_a_slot_change_nothing(model: Transformer) -> None:
    expected = sequence(9, seed=3, max_new_tokens=60)
    run(engine_for(model), expected)
    engine = engine_for(model, num_slots=2)
    for seed in range(4):  # two slots, so that later tenants follow earlier ones
        engine.add(sequence(20, seed=50 + seed, max_new_tokens=5 + 3 * seed))
    again = sequence(9, seed=3, max_new_tokens=60)
    run(engine, again)
    assert again.token_ids == expected.token_ids


def test_events_come_in_order_and_end_once(model: Transformer) -> None:
    one = sequence(max_new_tokens=7, routed=True)
    events = run(engine_for(model), one)[one]
    tokens = [event for event in events if isinstance(event, DrawnToken)]
    assert [token.index for token in tokens] == list(range(7))
    assert [token.token_id for token in tokens] == one.token_ids
    end = ended(events)
    assert (end.reason, end.prompt_tokens, end.generated_tokens) == (FinishReason.LENGTH, 5, 7)
    assert end.ttft_s is not None
    assert 0 <= end.queue_s <= end.ttft_s <= end.total_s


def test_the_routing_of_a_token_is_that_of_the_position_it_was_drawn_from(model: Transformer) -> None:
    one = sequence(6, max_new_tokens=12, routed=True)
    events = run(engine_for(model), one)[one]
    ids = torch.tensor([[*one.prompt_ids, *one.token_ids[:-1]]], device=model.device)
    _, routings = model(ids)
    for token in events[:-1]:
        assert isinstance(token, DrawnToken)
        assert token.routed_experts
        assert token.expert_weights
        for layer, routing in enumerate(routings):
            drawn_from = len(one.prompt_ids) - 1 + token.index
            assert token.routed_experts[layer] == tuple(routing.expert_ids[drawn_from].tolist())
            assert token.expert_weights[layer] == pytest.approx(routing.expert_weights[drawn_from].tolist(), abs=1e-5)


def test_the_books_balance_with_prefill_decode_padding_and_a_cancelled_request(model: Transformer) -> None:
    engine = engine_for(model, num_slots=4)
    whole = [sequence(3 + 20 * i, max_new_tokens=4 + i, seed=i) for i in range(5)]
    in_prefill, in_decode, queued = sequence(90, seed=7), sequence(2, 1000, seed=8), sequence(4, seed=9)
    with torch.inference_mode():
        ends = [ended(run(engine, one)[one]) for one in whole]
        run(engine, in_decode, in_prefill, steps=5)
        engine.add(queued)
        assert in_decode.token_ids
        assert 0 < in_prefill.num_prefilled < 90
        cancelled = engine.end([in_prefill, in_decode, queued], FinishReason.CANCELLED)
        assert engine.end([in_decode], FinishReason.CANCELLED) == (), "a sequence ends once"
    ends += [end for _, (end,) in cancelled if isinstance(end, Ended)]
    for end in ends:
        for layer in end.expert_counts:
            assert sum(layer) == model.config.experts_per_token * end.routed_tokens
    for end, one in zip(ends, whole, strict=False):
        assert end.routed_tokens == len(one.prompt_ids) + len(one.token_ids) - 1
    assert ends[-1].routed_tokens == 0

    figures = engine.figures()
    assert (figures.running, figures.queued) == (0, 0)
    assert (figures.expert_counts.sum(-1) == model.config.experts_per_token * figures.routed_tokens).all()
    assert figures.routed_tokens[:, 0].sum() == sum(end.routed_tokens for end in ends)
    by_expert = torch.tensor([end.expert_counts for end in ends]).sum(0)
    assert (torch.from_numpy(figures.expert_counts.sum(0)) == by_expert).all()
    # Each token's gate weights sum to one, up to the fixed point's rounding.
    assert figures.gate_weight.sum(-1) == pytest.approx([figures.routed_tokens[:, 0].sum()] * 3, rel=1e-5)


def test_who_ends_within_a_burst_has_nothing_of_the_rest_of_it(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts as long as can be, lengths of all kinds, a stop string: books and texts are those of single steps."""
    monkeypatch.setattr(engine_module, "BURST_S", 1e9)

    def some() -> list[Sequence]:
        stopped = Sequence(
            prompt(5, 8), SamplingParams(200, 1.0, seed=8, stop=("ab", "ka")), spell=lambda each: chr(97 + each % 26)
        )
        return [*(sequence(3 + i, max_new_tokens=1 + 7 * i, seed=i) for i in range(7)), stopped]

    single, bursts = some(), some()
    expected = run(engine_for(model, most_steps=1), *single)
    engine = engine_for(model)
    events = run(engine, *bursts)
    for one, other in zip(single, bursts, strict=True):
        assert other.token_ids == one.token_ids
        ours, theirs = ended(events[other]), ended(expected[one])
        assert (ours.reason, ours.routed_tokens) == (theirs.reason, theirs.routed_tokens)
        assert ours.expert_counts == theirs.expert_counts
    assert ended(events[bursts[-1]]).reason is FinishReason.STOP
    figures = engine.figures()
    assert (figures.expert_counts.sum(-1) == model.config.experts_per_token * figures.routed_tokens).all()
    assert figures.gate_weight.sum(-1) == pytest.approx([figures.routed_tokens[:, 0].sum()] * 3, rel=1e-5)


def test_a_burst_is_no_longer_than_the_longest_text_needs(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BURST_S", 1e9)
    engine = engine_for(model)
    for length in (2, 9):
        engine.add(sequence(3, max_new_tokens=length, seed=length))
    decoded = 0
    while engine.has_work:
        report = engine.step()
        decoded += report.steps * (report.phase is Phase.DECODE)
    assert decoded <= 9  # the first token is the prompt's; at most one step was made before the second was read


def test_a_burst_is_no_longer_when_many_have_come_and_short_while_prompts_are_unread(model: Transformer) -> None:
    """On a clock that a step moves by half a millisecond for each of its rows, and a chunk of a prompt by one."""
    now = 0.0
    engine = engine_for(model)
    most, real_run = engine.runner.most_steps, engine.runner.run

    def run(batch: Batch, steps: int) -> Drawn | None:
        nonlocal now
        now += steps * len(batch.ids) * 0.0005 if isinstance(batch, DecodeBatch) else 0.001
        return real_run(batch, steps)

    engine.runner.run = run  # type: ignore[method-assign]
    engine._clock = lambda: now

    def bursts(count: int) -> list[tuple[int, int]]:
        """(rows, steps) of the next decode calls."""
        reports: list[tuple[int, int]] = []
        while len(reports) < count:
            report = engine.step()
            if report.phase is Phase.DECODE:
                reports.append((report.batch_size, report.steps))
        return reports

    first = sequence(3, max_new_tokens=10_000)
    engine.add(first)
    assert bursts(3)[-1] == (1, most)
    for seed in range(9):
        engine.add(sequence(3, max_new_tokens=10_000, seed=seed))
    crowd = bursts(12)
    assert all(rows * steps * 0.0005 <= 0.0101 for rows, steps in crowd), crowd
    assert crowd[-1] == (10, min(2, most))
    engine.end([one for one in engine._scheduler.running if one is not first], FinishReason.CANCELLED)
    bursts(2)
    engine.add(sequence(16 * 60, max_new_tokens=10_000))
    assert (1, min(4, most)) in bursts(3)


def test_figures_taken_while_sequences_run_are_consistent(model: Transformer) -> None:
    engine = engine_for(model)
    for seed in range(3):
        engine.add(sequence(40, seed=seed, max_new_tokens=30))
    with torch.inference_mode():
        while engine.has_work:
            engine.step()
            figures = engine.figures()
            assert (figures.expert_counts.sum(-1) == model.config.experts_per_token * figures.routed_tokens).all()
    assert figures.prompt_tokens == 120
    assert figures.generated_tokens == 90


def test_an_expired_sequence_ends_as_timeout_and_frees_its_slot(model: Transformer) -> None:
    engine = engine_for(model)
    one = Sequence(prompt(3), SamplingParams(1000), deadline_s=0.0)
    run(engine, one, steps=3)
    assert (engine.num_running, one.is_finished) == (1, False)
    ((_, events),) = engine.expire()
    assert [ended(list(events)).reason, engine.num_running, engine.num_free_slots] == [FinishReason.TIMEOUT, 0, 16]
    assert engine.expire() == ()


def test_a_row_that_is_not_finite_ends_alone_and_its_slots_next_tenant_is_unharmed(device: torch.device) -> None:
    model = tiny_model().requires_grad_(False).to(device)
    expected = sequence(9, seed=3, max_new_tokens=30)
    run(engine_for(model), expected)

    poisoned = 64  # a token whose embedding is broken; nobody else's text contains it
    assert poisoned not in expected.prompt_ids + tuple(expected.token_ids)
    with torch.no_grad():
        model.embedding.weight[poisoned] = float("nan")
        model.head.weight[poisoned] = -10.0 * model.head.weight.abs().mean()  # and nobody is going to draw it
    survivor, victim, tenant = (sequence(9, seed=3, max_new_tokens=30) for _ in range(3))
    baseline = sequence(9, seed=3, max_new_tokens=30)
    run(engine_for(model), baseline)
    victim = Sequence((1, poisoned, 2), SamplingParams(30), deadline_s=60.0)
    engine = engine_for(model, num_slots=2)
    events = run(engine, survivor, victim, tenant)
    assert ended(events[victim]).reason is FinishReason.NON_FINITE
    assert survivor.token_ids == tenant.token_ids == baseline.token_ids
    figures = engine.figures()
    fed = figures.routed_tokens[:, 0].sum()
    assert (figures.expert_counts.sum(-1) == model.config.experts_per_token * figures.routed_tokens).all()
    assert all(0 < weight <= fed for weight in figures.gate_weight.sum(-1)), "a broken row's weight was summed"


def test_a_row_that_breaks_while_decoding_balances_its_own_books(device: torch.device) -> None:
    model = tiny_model().requires_grad_(False).to(device)
    engine = engine_for(model)
    one = sequence(9, seed=3, max_new_tokens=30)
    events = run(engine, one, steps=4)[one]
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    end = ended(events + run(engine)[one])
    assert end.reason is FinishReason.NON_FINITE
    for layer in end.expert_counts:
        assert sum(layer) == model.config.experts_per_token * end.routed_tokens
    assert engine.figures().routed_tokens[:, 0].sum() == end.routed_tokens


def test_a_prompt_that_was_left_half_read_harms_no_later_tenant(device: torch.device) -> None:
    model = tiny_model().requires_grad_(False).to(device)
    poisoned = 64
    with torch.no_grad():
        model.embedding.weight[poisoned] = float("nan")
        model.head.weight[poisoned] = -10.0 * model.head.weight.abs().mean()
    expected = sequence(9, seed=3, max_new_tokens=30)
    run(engine_for(model), expected)
    engine = engine_for(model, num_slots=1)
    victim, tenant = Sequence((poisoned,) * 60, SamplingParams(30)), sequence(9, seed=3, max_new_tokens=30)
    run(engine, victim, steps=1)
    engine.end([victim], FinishReason.CANCELLED)
    run(engine, tenant)
    assert tenant.token_ids == expected.token_ids


def disabled_mask(model: Transformer, disabled: tuple[tuple[int, int], ...]) -> torch.Tensor:
    mask = torch.zeros(1, model.config.num_layers, model.config.num_experts, dtype=torch.bool)
    for layer, expert in disabled:
        mask[0, layer, expert] = True
    return mask.to(model.device)


def test_disabled_experts_are_silent_for_their_request_alone(model: Transformer) -> None:
    gone = ((0, 1), (1, 0), (1, 3))
    neighbour = sequence(9, seed=3, max_new_tokens=40, routed=True)
    expected = run(engine_for(model), neighbour)[neighbour]
    params = SamplingParams(40, 0.8, seed=5, disabled_experts=gone)
    without = Sequence(prompt(40, 5), params, return_routed_experts=True)
    again = sequence(9, seed=3, max_new_tokens=40, routed=True)
    events = run(engine_for(model), without, again)
    reference = generate(
        model, list(without.prompt_ids), 40, temperature=0.8, seed=5, disabled=disabled_mask(model, gone)
    )
    assert without.token_ids == reference
    assert without.token_ids != generate(model, list(without.prompt_ids), 40, temperature=0.8, seed=5)
    assert [ended(events[without]).expert_counts[layer][expert] for layer, expert in gone] == [0, 0, 0]
    assert ended(events[without]).expert_counts[0][0] > 0
    assert events[again][:-1] == expected[:-1], "a neighbour's experts were disabled as well"


@torch.inference_mode()
def test_log_probabilities_are_told_to_those_who_ask(model: Transformer) -> None:
    params = SamplingParams(15, 1.3, seed=6)
    none, own, some = (Sequence(prompt(7, 6), params, num_logprobs=count) for count in (None, 0, 4))
    events = run(engine_for(model), none, own, some)
    text = torch.tensor([[*some.prompt_ids, *some.token_ids]], device=model.device)
    expected = model(text)[0][0].double().log_softmax(-1)[6:-1].cpu()
    for row, (silent, single, token) in enumerate(zip(*(events[each][:-1] for each in (none, own, some)), strict=True)):
        assert isinstance(silent, DrawnToken)
        assert isinstance(single, DrawnToken)
        assert isinstance(token, DrawnToken)
        assert (silent.logprob, silent.top_logprobs) == (None, None)
        assert (single.logprob, single.top_logprobs) == (token.logprob, ())
        assert token.top_logprobs
        assert token.logprob == pytest.approx(expected[row, token.token_id].item(), abs=1e-4)
        ids, values = zip(*token.top_logprobs, strict=True)
        assert values == pytest.approx(expected[row].topk(4).values.tolist(), abs=1e-4)
        assert ids == tuple(expected[row].topk(4).indices.tolist())


def test_a_stop_string_ends_a_sequence_and_is_not_told(model: Transformer) -> None:
    def spelled(stop: tuple[str, ...] = ()) -> Sequence:
        return Sequence(
            prompt(5, 8), SamplingParams(60, 1.0, seed=8, stop=stop), spell=lambda each: chr(97 + each % 26)
        )

    def text_of(events: list[Event]) -> str:
        return "".join(event.text for event in events if isinstance(event, DrawnToken))

    plain = spelled()
    text = text_of(run(engine_for(model), plain)[plain])
    stopped = spelled((text[20:24], "no such text"))
    events = run(engine_for(model), stopped)[stopped]
    place = text.index(text[20:24])
    assert text_of(events) == text[:place]
    end = ended(events)
    assert (end.reason, end.generated_tokens) == (FinishReason.STOP, place + 4)
    assert end.routed_tokens == 5 + place + 4 - 1
    to_the_end = spelled((text[-2:] + "never",))
    assert text_of(run(engine_for(model), to_the_end)[to_the_end]) == text, "what was held back is told at the end"


@pytest.mark.parametrize(("reason", "is_told"), [(FinishReason.SHUTDOWN, False), (FinishReason.TIMEOUT, True)])
def test_what_was_held_back_is_told_at_an_end_but_not_where_another_process_may_go_on(
    model: Transformer, reason: FinishReason, is_told: bool
) -> None:
    one = Sequence(prompt(5, 8), SamplingParams(60, stop=("a" * 64,)), spell=lambda each: "a")
    engine = engine_for(model, most_steps=1)
    run(engine, one, steps=8)
    assert len(one.held) == 8
    ((_, events),) = engine.end([one], reason)
    assert [type(event) for event in events] == [DrawnToken] * 8 * is_told + [Ended]


def test_the_books_balance_when_what_comes_after_a_step_raises(model: Transformer) -> None:
    """The step has counted every row; the second's text cannot be spelled, and the third is not looked at any more."""
    spellings = ["a", "b", "c", "d"]
    ordinary, bad, late = (sequence(seed=seed) for seed in (1, 2, 3))
    bad.spell = lambda _: spellings.pop()
    engine = engine_for(model)
    for each in (ordinary, bad, late):
        engine.add(each)
    with pytest.raises(IndexError):
        run(engine)
    engine.end_running(FinishReason.INTERNAL)
    figures = engine.figures()
    work = figures.expert_counts.sum(axis=-1)
    assert work.tolist() == (model.config.experts_per_token * figures.routed_tokens).tolist()


def test_no_end_is_lost_when_what_comes_after_it_raises(model: Transformer) -> None:
    def broken(_: int) -> str:
        raise ZeroDivisionError

    short, bad = sequence(3, max_new_tokens=3), sequence(3, seed=1)
    engine = engine_for(model, most_steps=1)
    for one in (short, bad):
        engine.add(one)
    while len(short.token_ids) < 2 or not bad.is_prefilled:
        engine.step()  # until one more token ends the short one
    bad.spell = broken
    with pytest.raises(ZeroDivisionError):
        run(engine)
    ends = {one: ended(list(events)).reason for one, events in engine.end_running(FinishReason.INTERNAL)}
    assert ends == {short: FinishReason.LENGTH, bad: FinishReason.INTERNAL}


def test_a_sequence_that_nobody_reads_pauses_and_goes_on_where_it_was(model: Transformer) -> None:
    expected = sequence(9, seed=3, max_new_tokens=50)
    run(engine_for(model), expected)
    engine = engine_for(model)
    unread, other = sequence(9, seed=3, max_new_tokens=50), sequence(4, seed=1, max_new_tokens=30)
    unread.max_unread = 10
    run(engine, unread, other, steps=60)
    assert (len(unread.token_ids), other.is_finished, engine.num_running) == (10, True, 1)
    held_up = [engine.is_held_up]
    assert engine.step().phase is None
    unread.num_taken = 7
    assert [*held_up, engine.is_held_up] == [True, False]
    run(engine, steps=20)
    assert len(unread.token_ids) == 17
    unread.max_unread = None
    run(engine)
    assert unread.token_ids == expected.token_ids


def test_a_reader_who_does_not_move_is_given_up_and_one_who_waits_too_long_is_told(model: Transformer) -> None:
    now = [100.0]
    counters = ExpertCounters(model.config, 1, model.device)
    engine = Engine(TorchRunner(model, 1, counters), Scheduler(1, 16), counters, clock=lambda: now[0])
    unread = Sequence(prompt(3), SamplingParams(1000), max_unread=2, created_at=100.0)
    waiting = Sequence(prompt(3), SamplingParams(1000), queue_deadline_s=14.0, created_at=100.0)
    for one in (unread, waiting):
        engine.add(one)
    for _ in range(5):
        engine.step()
    assert engine.expire() == ()
    now[0] += 14
    ((ended_first, events),) = engine.expire()
    assert (ended_first, ended(list(events)).reason) == (waiting, FinishReason.QUEUE_TIMEOUT)
    unread.num_taken = 1
    assert engine.expire() == (), "it moves"
    unread.num_taken = 0
    assert engine.expire() == ()
    now[0] += 14.9
    assert engine.expire() == ()
    now[0] += 0.1
    ((ended_second, events),) = engine.expire()
    assert (ended_second, ended(list(events)).reason) == (unread, FinishReason.STALLED)


def test_the_probe_finds_a_runner_out_whose_rows_look_at_each_other(model: Transformer) -> None:
    class Nosy(TorchRunner):
        @torch.inference_mode()
        def run(self, batch: Batch, steps: int) -> Drawn | None:
            drawn = super().run(batch, steps)
            if drawn and drawn.logprobs and isinstance(batch, DecodeBatch):
                drawn.logprobs[0].add_(1e-15 * batch.num_tokens)
            return drawn

    def runner(kind: type[TorchRunner]) -> TorchRunner:
        return kind(model, 16, ExpertCounters(model.config, 16, model.device))

    assert find_row_multiple(runner(TorchRunner), 16, 65) == 4
    assert find_row_multiple(runner(Nosy), 16, 65) is None


def test_a_stranger_cannot_be_ended(model: Transformer) -> None:
    assert engine_for(model).end([sequence()], FinishReason.CANCELLED) == ()


def test_after_a_failed_step_the_running_end_and_the_queue_goes_on(model: Transformer) -> None:
    expected = sequence(9, seed=3)
    run(engine_for(model), expected)
    engine = engine_for(model, num_slots=1)
    running, waiting = sequence(5, seed=1), sequence(9, seed=3)
    run(engine, running, waiting, steps=3)
    failed = engine.end_running(FinishReason.INTERNAL)
    engine.rebuild()
    assert [(one, event[0].reason) for one, event in failed if isinstance(event[0], Ended)] == [
        (running, FinishReason.INTERNAL)
    ]
    run(engine)
    assert waiting.token_ids == expected.token_ids
