"""``GET /experts`` and the gauges of the experts' balance: two ways of telling one thing, on a real server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from model import checkpoint as files
from model.checkpoint import RECORD, CheckpointError
from service.card import ModelCard
from tests.checkpoints import plain_files
from tests.service.conftest import StartServer
from tests.service.serving import Samples, Server, run_to_the_end, wait_until

GAUGES = {
    "expert_load_entropy_ratio": "entropy_ratio",
    "expert_max_load_ratio": "max_load_ratio",
    "expert_drift_ratio": "drift",
}
SKEWED = [[0.4, 0.3, 0.2, 0.1]] * 3
WINDOW_S = 300


def checkpoint_with(folder: Path, **record: object) -> Path:
    """The tiny checkpoint with another training record; None takes a field out."""
    content = plain_files()
    told = {**json.loads(content[RECORD]), **record}
    content[RECORD] = json.dumps({name: value for name, value in told.items() if value is not None}).encode()
    files.save(folder, content)
    return folder


def experts_of(server: Server, window: int | None = None) -> dict[str, Any]:
    response = server.client.get("/experts", params={} if window is None else {"window": window})
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def gauge(samples: Samples, name: str, layer: int) -> float:
    return samples.values[f"moescope_{name}", frozenset({("layer", str(layer))})]


@pytest.fixture
def skewed(start_server: StartServer, tmp_path: Path) -> Server:
    checkpoint = checkpoint_with(tmp_path / "skewed", routing_baseline=SKEWED)
    return start_server("--checkpoint", checkpoint, "--expert-window-s", WINDOW_S).wait_until_ready()


def test_the_gauges_and_the_answer_tell_the_same(skewed: Server) -> None:
    skewed.answer("ROMEO:" * 200, max_new_tokens=100, disabled_experts=[[1, 2]])
    samples, told = skewed.metrics(), experts_of(skewed, WINDOW_S)
    assert told["routed_tokens"] == 1200 + 100 - 1
    for layer in told["layers"]:
        number = layer["layer"]
        for name, field in GAUGES.items():
            assert gauge(samples, name, number) == layer[field]
        assert gauge(samples, "experts_idle", number) == len(layer["idle"])
        assert layer["baseline_share"] == SKEWED[number]
        for expert, share in enumerate(layer["baseline_share"]):
            assert samples.total("expert_baseline_share", layer=number, expert=expert) == share
    assert [layer["idle"] for layer in told["layers"]] == [[], [2], []]


def test_the_answer_counts_what_the_requests_counted(skewed: Server) -> None:
    answers = [skewed.answer(prompt, max_new_tokens=9) for prompt in ("JULIET:", "To be, or not to be", "")]
    told = experts_of(skewed)
    assert told["experts_per_token"] == 2
    assert told["routed_tokens"] == sum(answer["routing"]["tokens"] for answer in answers)
    prompt_tokens = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    for number, layer in enumerate(told["layers"]):
        work = [p + d for p, d in zip(layer["prefill"], layer["decode"], strict=True)]
        assert work == [sum(answer["routing"]["counts"][number][expert] for answer in answers) for expert in range(4)]
        assert sum(layer["prefill"]) == 2 * prompt_tokens
        assert layer["share"] == pytest.approx([count / sum(work) for count in work])
        assert sum(layer["gate_weight"]) == pytest.approx(told["routed_tokens"], rel=1e-5)
        assert layer["routed_tokens"] == told["routed_tokens"]


def test_little_traffic_is_no_figure_in_either_place(skewed: Server) -> None:
    def is_silent() -> bool:
        samples, told = skewed.metrics(), experts_of(skewed, WINDOW_S)
        in_gauges = [math.isnan(gauge(samples, name, 0)) for name in (*GAUGES, "experts_idle")]
        in_answer = [told["layers"][0][field] is None for field in (*GAUGES.values(), "idle", "jain")]
        assert len({*in_gauges, *in_answer}) == 1
        return in_gauges[0]

    assert experts_of(skewed)["layers"][0]["share"] is None
    assert is_silent()
    skewed.answer("a" * 998, max_new_tokens=2)  # feeds one less than the least
    assert experts_of(skewed)["routed_tokens"] == 999
    assert is_silent()
    skewed.answer("a", max_new_tokens=1)
    assert not is_silent()
    assert "NaN" not in skewed.client.get("/experts").text


def test_what_is_older_than_the_window_leaves_it(start_server: StartServer) -> None:
    server = start_server("--expert-window-s", 1).wait_until_ready()
    server.answer("a" * 2000, max_new_tokens=1)
    assert not math.isnan(gauge(server.metrics(), "expert_load_entropy_ratio", 0))
    wait_until(lambda: experts_of(server, 1)["routed_tokens"] == 0)
    assert math.isnan(gauge(server.metrics(), "expert_load_entropy_ratio", 0))
    assert experts_of(server, 600)["routed_tokens"] == experts_of(server)["routed_tokens"] == 2000


def test_the_baseline_is_absent_where_the_checkpoint_has_none(start_server: StartServer, tmp_path: Path) -> None:
    checkpoint = checkpoint_with(tmp_path / "none", routing_baseline=None)
    server = start_server("--checkpoint", checkpoint).wait_until_ready()
    server.answer("a" * 1500, max_new_tokens=1)
    samples, told = server.metrics(), experts_of(server)
    assert not any(name == "moescope_expert_baseline_share" for name, _ in samples.values)
    assert math.isnan(gauge(samples, "expert_drift_ratio", 0))
    assert not math.isnan(gauge(samples, "expert_load_entropy_ratio", 0))
    assert [told["layers"][0][field] for field in ("baseline_share", "drift")] == [None, None]


def test_a_baseline_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = checkpoint_with(tmp_path / "odd", routing_baseline=SKEWED[:2])
    run = run_to_the_end("--checkpoint", checkpoint, "--port", 0)
    assert run.returncode == 1
    assert "training.json has a routing_baseline that does not fit" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "baseline",
    [[[0.5, 0.5]] * 3, [[1.4, -0.4, 0.0, 0.0]] * 3, [[0.1] * 4] * 3, "even", [["a"] * 4] * 3, [1, 2, 3]],
    ids=["experts", "negative", "sum", "text", "texts", "flat"],
)
def test_so_is_what_is_no_share_of_each_expert(tmp_path: Path, baseline: object) -> None:
    with pytest.raises(CheckpointError, match=r"training\.json has a routing_baseline that does not fit") as refused:
        ModelCard.read(checkpoint_with(tmp_path / "odd", routing_baseline=baseline))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("window", ["0", "601", "-1", "1.5", "", "abc", "1e2", "٣", "9" * 5000, "5&window=6"])
def test_a_window_that_cannot_be_is_refused(server: Server, window: str) -> None:
    response = server.client.get(f"/experts?window={window}")
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("out_of_range", "window")
    assert error["message"] == "window must be a whole number of seconds from 1 to 600"


@pytest.mark.parametrize("window", ["1", "600", "060"])
def test_a_window_that_can_be_is_answered(server: Server, window: str) -> None:
    assert server.client.get(f"/experts?window={window}").status_code == 200


def test_it_answers_while_the_model_is_being_loaded(start_server: StartServer) -> None:
    server = start_server().wait_until_it_listens()
    told = experts_of(server)
    assert [layer["layer"] for layer in told["layers"]] == [0, 1, 2]
    server.wait_until_ready()
    assert experts_of(server)["routed_tokens"] == 0, "what warm-up and probe did is nobody's traffic"


def test_the_document_tells_its_shape_and_its_window(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    operation = document["paths"]["/experts"]["get"]
    (window,) = operation["parameters"]
    assert window["schema"] == {"type": "integer", "minimum": 1, "maximum": 600}
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    told = experts_of(server)
    assert list(document["components"]["schemas"][schema]["properties"]) == list(told)
    assert list(document["components"]["schemas"]["LayerExperts"]["properties"]) == list(told["layers"][0])
