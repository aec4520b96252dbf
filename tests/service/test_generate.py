"""A stream and a plain answer tell the same story, event by event, and every request ends exactly once."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.service.serving import FOR_EVER, Event, Server, parse_events

TIMES = {"timings"}


def data(events: list[Event], name: str) -> list[dict[str, Any]]:
    return [body for each, body in events if each == name]


def only(events: list[Event], name: str) -> dict[str, Any]:
    (body,) = data(events, name)
    return body


def test_a_stream_is_a_start_then_tokens_then_one_end(server: Server) -> None:
    events = server.events(max_new_tokens=20, seed=1)
    assert [name for name, _ in events] == ["start", *["token"] * 20, "done"]
    assert [token["index"] for token in data(events, "token")] == list(range(20))
    start = only(events, "start")
    assert start["usage"] == {"prompt_tokens": 6}
    assert start["params"]["max_new_tokens"] == 20
    assert "prompt_used" not in start


def test_the_tokens_texts_joined_are_the_text(server: Server) -> None:
    events = server.events(max_new_tokens=50, seed=2)
    done = only(events, "done")
    vocabulary = server.client.get("/info").json()["vocabulary"]
    tokens = data(events, "token")
    assert "".join(token["text"] for token in tokens) == done["text"]
    assert [vocabulary[token["token_id"]] for token in tokens] == [token["text"] for token in tokens]
    assert len(done["text"]) == 50


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5, "temperature": 2}])
def test_a_plain_answer_is_what_the_stream_says(server: Server, sampling: dict[str, Any]) -> None:
    asked = {"max_new_tokens": 40, "seed": 3, "return_routed_experts": True, **sampling}
    events, answer = server.events(**asked), server.answer(**asked)
    start, done = only(events, "start"), only(events, "done")
    assert answer.pop("tokens") == data(events, "token")
    assert {name: value for name, value in answer.items() if name not in {*TIMES, "id"}} == {
        "model": start["model"],
        "params": start["params"],
        **{name: value for name, value in done.items() if name not in TIMES},
    }
    assert set(answer["timings"]) == set(done["timings"]) == {"queue_s", "ttft_s", "total_s", "tokens_per_s"}


def test_the_seed_that_was_drawn_makes_the_same_text_again(server: Server) -> None:
    first = server.answer(max_new_tokens=60)
    assert 0 <= first["seed"] < 2**32
    assert server.answer(max_new_tokens=60, seed=first["seed"])["text"] == first["text"]
    assert server.answer(max_new_tokens=60)["seed"] != first["seed"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(server: Server, stream: bool) -> None:
    def end_of(stop: list[str]) -> dict[str, Any]:
        asked: dict[str, Any] = {"max_new_tokens": 60, "seed": 9, "stop": stop}
        if not stream:
            return server.answer(**asked)
        events = server.events(**asked)
        assert "".join(token["text"] for token in data(events, "token")) == only(events, "done")["text"]
        return only(events, "done")

    text = end_of([])["text"]
    stop = text[30:34]
    end = end_of([stop, "$$$"])
    assert (end["finish_reason"], end["text"]) == ("stop", text[: text.index(stop)])
    assert end["usage"]["generated_tokens"] == text.index(stop) + 4
    at_once = end_of([text[0]])
    assert (at_once["finish_reason"], at_once["text"], at_once["usage"]["generated_tokens"]) == ("stop", "", 1)


def test_log_probabilities_come_with_alternatives_in_both_kinds_of_answer(server: Server) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 5, "seed": 9, "logprobs": 3}
    tokens = server.answer(**asked)["tokens"]
    assert tokens == data(server.events(**asked), "token")
    vocabulary = server.client.get("/info").json()["vocabulary"]
    for token in tokens:
        assert [vocabulary[each["token_id"]] for each in token["top_logprobs"]] == [
            each["text"] for each in token["top_logprobs"]
        ]
        best = [each["logprob"] for each in token["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert token["logprob"] <= best[0] < 0


def test_an_expert_that_is_disabled_a_thousand_times_costs_what_it_costs_once(server: Server) -> None:
    def seconds(times: int) -> float:
        answers = [server.answer(max_new_tokens=3000, seed=1, disabled_experts=[[0, 2]] * times) for _ in range(3)]
        return min(float(answer["timings"]["total_s"]) for answer in answers)

    assert seconds(5_000) < 3 * seconds(1)


def test_a_disabled_expert_does_no_work(server: Server) -> None:
    counts = server.answer(max_new_tokens=30, seed=1, disabled_experts=[[0, 2], [1, 0]])["routing"]["counts"]
    assert (counts[0][2], counts[1][0]) == (0, 0)
    assert min(server.answer(max_new_tokens=30, seed=1)["routing"]["counts"][0]) > 0


def test_an_empty_prompt_starts_from_a_newline(server: Server) -> None:
    empty, newline = (server.answer(prompt, max_new_tokens=10, seed=4) for prompt in ("", "\n"))
    assert empty["text"] == newline["text"]
    assert empty["usage"] == {"prompt_tokens": 1, "generated_tokens": 10, "total_tokens": 11}


def test_folding_says_what_was_read(server: Server) -> None:
    folded = server.answer("\u201cCaf\u00e9\u201d \u2014 \u2205", max_new_tokens=5, seed=5, unknown_characters="fold")
    assert folded["prompt_used"].startswith("Cafe") or folded["prompt_used"].startswith('"Cafe')
    plain = server.answer(folded["prompt_used"], max_new_tokens=5, seed=5)
    assert plain["text"] == folded["text"]
    assert server.answer("\u2205", max_new_tokens=1, unknown_characters="fold")["prompt_used"] == "\n"


def test_a_prompt_may_be_as_long_as_the_limit(server: Server) -> None:
    assert server.answer("a" * 8192, max_new_tokens=2)["usage"]["prompt_tokens"] == 8192


def test_the_routing_of_an_answer_accounts_for_every_token_that_was_fed(server: Server) -> None:
    info = server.client.get("/info").json()["model"]
    answer = server.answer("What light through yonder window breaks?", max_new_tokens=30)
    usage, routing = answer["usage"], answer["routing"]
    assert routing["tokens"] == usage["prompt_tokens"] + usage["generated_tokens"] - 1
    assert len(routing["counts"]) == info["num_layers"]
    assert {len(layer) for layer in routing["counts"]} == {info["num_experts"]}
    assert {sum(layer) for layer in routing["counts"]} == {info["experts_per_token"] * routing["tokens"]}


def test_each_token_names_its_experts_and_weights_when_asked(server: Server) -> None:
    info = server.client.get("/info").json()["model"]
    tokens = server.answer(max_new_tokens=10, return_routed_experts=True)["tokens"]
    for token, layer in itertools.product(tokens, range(info["num_layers"])):
        experts, weights = token["routed_experts"][layer], token["expert_weights"][layer]
        assert len(set(experts)) == len(weights) == info["experts_per_token"]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert "tokens" not in server.answer(max_new_tokens=1)


def test_a_stream_begins_long_before_its_text_is_complete(server: Server) -> None:
    with server.client.stream("POST", "/generate", json={"prompt": "", "max_new_tokens": FOR_EVER}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        head = itertools.islice(response.iter_lines(), 8)  # two events of three lines and an empty one
        assert [name for name, _ in parse_events(head)] == ["start", "token"]
    server.wait_for(requests_running=0)


def test_each_of_many_at_once_gets_its_own_answer(server: Server) -> None:
    asked: list[dict[str, Any]] = [{"max_new_tokens": 30, "seed": seed, "stream": seed % 2 == 0} for seed in range(8)]
    alone = [server.generate(**each, return_routed_experts=True) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: server.generate(**each, return_routed_experts=True), asked))
    assert [text_of(response) for response in together] == [text_of(response) for response in alone]


def text_of(response: httpx.Response) -> str:
    is_stream = response.headers["content-type"].startswith("text/event-stream")
    text = only(parse_events(response.iter_lines()), "done")["text"] if is_stream else response.json()["text"]
    return str(text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server: Server, stream: bool) -> None:
    def cancelled() -> float:
        return server.metrics().total("requests_total", outcome="cancelled", stream=str(stream).lower())

    before = cancelled()
    connection = server.send(max_new_tokens=FOR_EVER, stream=stream)
    server.wait_for(requests_running=1)
    connection.close()
    server.wait_for(requests_running=0)
    assert cancelled() == before + 1


def test_a_client_that_leaves_the_queue_is_forgotten(server: Server) -> None:
    crowd = [server.send(max_new_tokens=FOR_EVER) for _ in range(4)]
    server.wait_for(requests_running=4)
    late = server.send(max_new_tokens=FOR_EVER)
    server.wait_for(requests_queued=1)
    late.close()
    server.wait_for(requests_queued=0, requests_running=4)
    for connection in crowd:
        connection.close()
    server.wait_for(requests_running=0)
