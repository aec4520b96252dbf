"""What /metrics says is what the requests say: the sum rule, the growth, and a series for everything from the start."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from model.config import ModelConfig
from service.engine.sequence import FinishReason, SamplingParams, Sequence
from service.histogram import Histogram
from service.metrics import MAX_EXPERT_SERIES, OUTCOMES, Metrics, expert_detail
from tests.checkpoints import tiny_checkpoint
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.serving import FOR_EVER, Samples, Server


def assert_the_sum_rule(samples: Samples, experts_per_token: int) -> None:
    routed = samples.by("routed_tokens_total", "layer")
    worked = samples.by("expert_tokens_total", "layer")
    assert worked == {layer: experts_per_token * tokens for layer, tokens in routed.items()}
    weight = samples.by("expert_gate_weight_total", "layer")
    assert weight == pytest.approx(routed, rel=1e-5)  # every token's weights add up to one


def growth(before: Samples, after: Samples, name: str, **labels: object) -> float:
    return after.total(name, **labels) - before.total(name, **labels)


def generations(log: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in log.splitlines())
    return [line for line in lines if line["event"] == "generated"]


def test_a_histogram_says_what_prometheus_s_own_would() -> None:
    bounds, values = (0.125, 0.5, 2.0), {"a": [(0.0, 3), (0.125, 1), (0.25, 2), (2.5, 7)], "b": []}
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram("some_seconds", "Some", bounds, ("of", values))
    ours.register(mine)
    oracle = prometheus_client.Histogram("some_seconds", "Some", ["of"], buckets=bounds, registry=theirs)
    for name, observed in values.items():
        labelled = oracle.labels(name)
        for value, times in observed:
            mine.observe(value, times, name)
            for _ in range(times):
                labelled.observe(value)

    def series(registry: CollectorRegistry) -> set[str]:
        lines = prometheus_client.generate_latest(registry).decode().splitlines()
        return {line for line in lines if "_created" not in line}

    assert series(ours) == series(theirs)


def test_the_counters_grow_by_what_the_requests_report_themselves(server: Server) -> None:
    """Prefill in several chunks, decode, rows that are padding, and one request that is cancelled half-way."""
    model = server.client.get("/info").json()["model"]
    before, logged = server.metrics(), len(generations(server.log))
    prompts = ["", "ROMEO:", "a" * 15, "b" * 128, "c" * 300]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: server.answer(prompt, max_new_tokens=7), prompts))
    connection = server.send(max_new_tokens=FOR_EVER)
    connection.recv(1)
    connection.close()
    server.wait_for(requests_running=0)
    after = server.metrics()

    assert_the_sum_rule(before, model["experts_per_token"])
    assert_the_sum_rule(after, model["experts_per_token"])
    (cancelled,) = [line for line in generations(server.log)[logged:] if line["reason"] == "cancelled"]
    prompt_tokens = sum(answer["usage"]["prompt_tokens"] for answer in answers) + cancelled["prompt_tokens"]
    generated = sum(answer["usage"]["generated_tokens"] for answer in answers) + cancelled["generated_tokens"]
    requests = len(answers) + 1
    assert growth(before, after, "prompt_tokens_total") == prompt_tokens
    assert growth(before, after, "generated_tokens_total") == generated
    for layer in range(model["num_layers"]):
        assert growth(before, after, "routed_tokens_total", layer=layer, phase="prefill") == prompt_tokens
        assert growth(before, after, "routed_tokens_total", layer=layer, phase="decode") == generated - requests


def test_every_expert_s_counter_grows_by_what_the_answers_count(server: Server) -> None:
    before = server.metrics()
    answers = [server.answer(prompt, max_new_tokens=9) for prompt in ("JULIET:", "To be, or not to be", "")]
    after = server.metrics()
    layers = range(len(answers[0]["routing"]["counts"]))
    for layer in layers:
        for expert in range(len(answers[0]["routing"]["counts"][layer])):
            told = sum(answer["routing"]["counts"][layer][expert] for answer in answers)
            assert growth(before, after, "expert_tokens_total", layer=layer, expert=expert) == told


def test_who_never_had_a_slot_is_no_time_in_the_queue() -> None:
    """The alert on waiting would take the patience of those who left for it."""
    metrics = Metrics()
    for has_slot in (True, False):
        sequence = Sequence((1,), SamplingParams(), created_at=10.0, admitted_at=12.0 if has_slot else None)
        metrics.record_end(sequence.end_record(FinishReason.TIMEOUT, 20.0, 0, ()), stream=True)
    told = Samples.parse(metrics.render("")[0].decode())
    assert told.total("queue_seconds_count") == 1
    assert told.total("queue_seconds_sum") == 2
    assert told.total("request_seconds_count") == 2


def test_requests_and_their_times_are_counted_once_each(server: Server) -> None:
    before = server.metrics()
    server.events(max_new_tokens=5)
    server.answer(max_new_tokens=5)
    server.generate("\u2205")
    after = server.metrics()
    for stream in ("true", "false"):
        assert growth(before, after, "requests_total", outcome="length", stream=stream) == 1
    assert growth(before, after, "requests_total", outcome="rejected_invalid") == 1
    assert growth(before, after, "requests_total") == 3
    for name in ("time_to_first_token_seconds_count", "queue_seconds_count", "request_seconds_count"):
        assert growth(before, after, name) == 2
    assert growth(before, after, "inter_token_seconds_count") == 2 * 4
    assert growth(before, after, "step_seconds_count", phase="prefill") == 2
    assert growth(before, after, "step_seconds_count", phase="decode") == growth(before, after, "batch_size_count") == 8


def series_of(exposition: str) -> int:
    return sum(not line.startswith("#") for line in exposition.splitlines())


def quickest_scrape(server: Server) -> float:
    """Seconds, of the quickest of five: the others tell of the machine."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        server.client.get("/metrics").raise_for_status()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_thousands_of_experts_make_few_series_and_the_sums_stay_true(
    start_server: StartServer, tmp_path: Path, at: At, evidence: Evidence
) -> None:
    layers, num_experts = at((1, 1024), (6, 4096))
    sizes: dict[str, Any] = {"num_layers": layers, "num_experts": num_experts, "expert_size": 16}
    checkpoint = tiny_checkpoint(tmp_path / "many", **sizes)
    server = start_server("--checkpoint", checkpoint, "--slots", 4).wait_until_ready()
    told = dict(server.events("ROMEO:", max_new_tokens=20))["done"]["routing"]
    exposition = server.client.get("/metrics").text
    assert [len(told["counts"]), len(told["counts"][0])] == [layers, num_experts]
    assert [sum(counts) for counts in told["counts"]] == [2 * told["tokens"]] * layers
    assert series_of(exposition) < MAX_EXPERT_SERIES
    samples = Samples.parse(exposition)
    assert_the_sum_rule(samples, experts_per_token=2)
    assert samples.total("routed_tokens_total") == layers * told["tokens"]
    assert "expert=" not in exposition
    assert server.client.get("/info").json()["expert_metrics"] == "layer"
    lines = [json.loads(line) for line in server.log.splitlines()]
    (said,) = [line for line in lines if line["event"] == "expert_metrics_by_layer"]
    assert said["series"] == layers * num_experts * 4
    evidence(f"series of /metrics with {layers} x {num_experts:,} experts", series_of(exposition))
    milliseconds = 1000 * quickest_scrape(server)
    evidence("milliseconds to answer", milliseconds)
    if at.full_size:  # how long it takes says nothing on a busy machine
        assert milliseconds < 100


BALANCE = ("expert_load_entropy_ratio", "expert_max_load_ratio", "experts_idle", "expert_drift_ratio")
OF_LAYERS = {name: {"layer"} for name in BALANCE}


@pytest.mark.parametrize(
    ("detail", "names"),
    [
        (
            "full",
            {
                "expert_tokens_total": {"layer", "expert", "phase"},
                "expert_gate_weight_total": {"layer", "expert"},
                "expert_baseline_share": {"layer", "expert"},
                **OF_LAYERS,
            },
        ),
        (
            "layer",
            {
                "expert_tokens_total": {"layer", "phase"},
                "expert_gate_weight_total": {"layer"},
                **OF_LAYERS,
            },
        ),
        ("off", {}),
    ],
)
def test_how_much_is_told_of_experts_is_a_choice(
    start_server: StartServer, detail: str, names: dict[str, set[str]]
) -> None:
    server = start_server("--expert-metrics", detail).wait_until_ready()
    labels: dict[str, set[str]] = {}
    for name, pairs in server.metrics().values:
        labels.setdefault(name.removeprefix("moescope_"), set()).update(label for label, _ in pairs)
    assert {name: each for name, each in labels.items() if name.startswith("expert")} == names
    assert labels["routed_tokens_total"] == {"layer", "phase"}
    assert server.client.get("/info").json()["expert_metrics"] == detail
    assert "expert_metrics_by_layer" not in server.log, "what was asked for needs no explanation"


@pytest.mark.parametrize(("num_experts", "detail"), [(100, "full"), (101, "layer")])
def test_the_label_goes_above_2_000_series(num_experts: int, detail: str) -> None:
    config = ModelConfig(vocab_size=65, num_layers=5, num_experts=num_experts)
    assert expert_detail("auto", config) == detail
    assert expert_detail("off", config) == "off"
    assert expert_detail("full", config) == "full"


def test_every_series_is_there_from_the_start(server: Server) -> None:
    model, samples = server.client.get("/info").json()["model"], server.metrics()
    assert set(samples.by("requests_total", "outcome")) == set(OUTCOMES)
    experts = {str(expert) for expert in range(model["num_experts"])}
    for layer in range(model["num_layers"]):
        for phase in ("prefill", "decode"):
            assert set(samples.by("expert_tokens_total", "expert", layer=layer, phase=phase)) == experts
    assert samples.total("ready") == 1
    assert samples.total("slots") == 4
    assert samples.total("build_info", checkpoint=server.client.get("/info").json()["checkpoint"]) == 1


def test_the_process_is_measured_too_and_either_format_is_spoken(server: Server) -> None:
    assert "process_cpu_seconds_total" in server.client.get("/metrics").text
    openmetrics = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "accept", [b"text/plain;version=abc;escaping", b"application/openmetrics-text; version=\xff; q=abc"]
)
def test_an_odd_wish_for_a_format_gets_the_usual_one(server: Server, accept: bytes) -> None:
    response = server.client.get("/metrics", headers={b"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
