"""The shipped Prometheus files: valid, about metrics that exist, and right about real experts that are dead or hot."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from model import checkpoint
from service.expert_window import LEAST_TOKENS
from tests.checkpoints import CHARACTERS, tiny_checkpoint
from tests.deploy.monitoring import FOLDER, Prometheus, binary, shortened
from tests.service.serving import ROOT, Server, wait_until
from training.corpora import Corpus

RULES = FOLDER / "rules.yml"
PAGE = ROOT / "docs" / "operations.md"
LAYERS, EXPERTS = 3, 8
OF_PROMETHEUS = {"up"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_promtool_finds_nothing_wrong() -> None:
    for words in (["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"]):
        run = subprocess.run([binary("promtool"), *words], cwd=FOLDER, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    run = subprocess.run(
        [binary("promtool"), "test", "rules", "rules_test.yml"], cwd=FOLDER, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    tested = [each for case in cases for each in case.get("alert_rule_test", [])]
    assert {each["alertname"] for each in tested if each["exp_alerts"]} == set(alerts())
    assert {each["alertname"] for each in tested if not each["exp_alerts"]} == set(alerts())


def test_every_alert_says_what_to_do() -> None:
    headings = set(re.findall(r"^### (\w+)$", PAGE.read_text(), re.MULTILINE))
    assert headings == set(alerts())
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_prometheus_scrapes_what_compose_calls_the_service() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["targets/*.json"]}]
    assert json.loads((FOLDER / "targets" / "compose.json").read_text()) == [{"targets": ["service:8000"]}]
    assert config["global"]["scrape_interval"] == "5s"
    assert config["rule_files"] == ["rules.yml"]


def test_shortening_changes_durations_and_nothing_else() -> None:
    assert shortened("record: a:b:rate5m\nexpr: rate(c_5m[5m]) < 0.05\nfor: 10m") == (
        "record: a:b:rate5m\nexpr: rate(c_5m[5s]) < 0.05\nfor: 10s"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random weights: nobody is dead or hot in it, and its routing is far from the even baseline it claims to have."""
    folder = tmp_path_factory.mktemp("alerts")
    tiny = tiny_checkpoint(folder / "tiny", num_experts=EXPERTS, num_layers=LAYERS)
    server = Server(folder / "log", "--checkpoint", tiny, "--slots", 4, "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def test_every_metric_that_a_rule_names_is_in_the_exposition(server: Server) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    told = {name for name, _ in server.metrics().values} | recorded | OF_PROMETHEUS
    for rule in rules():
        expr = re.sub(r"\{[^}]*\}|\[\w+\]", "", rule["expr"])
        named = set(re.findall(r"\b(?:moescope|process)[\w:]+|\bup\b", expr))
        assert named
        assert named <= told


@contextmanager
def traffic(server: Server, disabled: list[list[int]]) -> Iterator[None]:
    """One client after another, with prompts of every letter, for as long as the block lasts."""
    is_over = threading.Event()
    failures: list[Exception] = []

    def ask() -> None:
        seed = 0
        try:
            while not is_over.is_set():
                generator = torch.Generator().manual_seed(seed)
                prompt = "".join(chr(97 + int(i)) for i in torch.randint(26, (300,), generator=generator))
                server.answer(prompt, max_new_tokens=20, seed=seed, disabled_experts=disabled)
                seed += 1
        except Exception as failure:
            failures.append(failure)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert not failures


@contextmanager
def prometheus_of(server: Server, folder: Path) -> Iterator[Prometheus]:
    prometheus = Prometheus.in_seconds(folder, f"127.0.0.1:{server.port}")
    try:
        yield prometheus.wait_until_ready()
    finally:
        prometheus.stop()


def test_silenced_experts_are_reported_dead_those_that_do_it_all_hot_and_no_others(
    server: Server, tmp_path: Path
) -> None:
    silenced = [[1, 2], *([2, expert] for expert in range(EXPERTS) if expert not in (3, 4))]
    expected = {"ExpertDead": silenced, "ExpertHot": [[2, 3], [2, 4]]}
    with prometheus_of(server, tmp_path / "data") as prometheus, traffic(server, silenced):
        for alert, experts in expected.items():
            for layer, expert in experts:
                wait_until(partial(prometheus.has_fired, alert, layer=layer, expert=expert))
        for alert, experts in expected.items():
            fired = prometheus.query(f'max_over_time(ALERTS{{alertname="{alert}",alertstate="firing"}}[1h])')
            assert len(fired) == len(experts)


def test_ordinary_traffic_to_the_shipped_model_fires_nothing_that_is_not_about_seconds(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Passages of the validation text, continued, for longer than a dead expert needs to be reported.

    On a crowded machine the two alerts that are about seconds are right to fire.
    """
    server = Server(tmp_path / "log", "--threads", 1).wait_until_ready()
    passages = itertools.cycle(range(0, len(corpus.validation) - 600, 600))
    try:
        with prometheus_of(server, tmp_path / "ordinary") as prometheus:
            enough = "min(count_over_time((moescope:expert_mean_tokens:increase5m >= 250)[1m:500ms])) > 22"

            def has_had_enough() -> bool:
                start = next(passages)
                server.answer(corpus.validation[start : start + 600], max_new_tokens=40)
                return bool(prometheus.query(enough))

            wait_until(has_had_enough)
            others = 'alertname!~"FirstTokenSlow|ServiceDown"'
            assert not prometheus.query(f'max_over_time(ALERTS{{alertstate="firing",{others}}}[1h])')
    finally:
        server.stop()


def test_random_characters_to_the_shipped_model_are_reported_as_a_drift(tmp_path: Path) -> None:
    """Ordinary text, above, is none."""
    server = Server(tmp_path / "log", "--threads", 1).wait_until_ready()
    letters = random.Random(1)
    try:
        with prometheus_of(server, tmp_path / "random") as prometheus:

            def has_fired() -> bool:
                server.answer("".join(letters.choices(CHARACTERS, k=600)), max_new_tokens=1)
                return prometheus.has_fired("RoutingDrift")

            wait_until(has_fired)
    finally:
        server.stop()


def test_the_drift_line_has_room_on_both_sides(corpus: Corpus) -> None:
    """With the least tokens that a drift is told of, the line is half as far again from ordinary and random text."""
    from benchmarks.drift import counts_by_chunk, figures

    (told,) = re.findall(r"> ([0-9.]+)", alerts()["RoutingDrift"]["expr"])
    line = float(told)
    loaded = checkpoint.load(ROOT / "checkpoints" / "shakespeare")
    baseline = np.array(loaded.training["routing_baseline"])
    ordinary = torch.tensor(loaded.tokenizer.encode(corpus.validation[:40_000]))
    odd = torch.randint(loaded.config.vocab_size, (8_000,), generator=torch.Generator().manual_seed(1))
    of_ordinary, of_odd = (
        figures("", counts_by_chunk(loaded.model, ids), LEAST_TOKENS, baseline) for ids in (ordinary, odd)
    )
    assert of_ordinary is not None
    assert of_odd is not None
    assert of_ordinary["drift_max"] * 1.5 < line < of_odd["drift_min"] / 1.5
