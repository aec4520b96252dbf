"""OpenAI's own client gets what /generate writes, in the words it knows; the rest it is refused by name."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import Completion as OpenAICompletion

from model.config import ModelConfig
from service.body import parse_json_object
from service.engine.sequence import DrawnToken, Ended, FinishReason
from service.errors import ApiError
from service.openai import Completion, CompletionAnswer, CompletionBody, parse_completion
from service.schemas import MAX_PROMPT_CHARACTERS, Limits
from service.streaming import Generation
from tests.checkpoints import CHARACTERS
from tests.service.conftest import StartServer
from tests.service.serving import FOR_EVER, Server
from tests.service.test_body import JSON_VALUES

LIMITS = Limits(max_new_tokens=1000, timeout_s=300, model=ModelConfig(65))
VOCABULARY = sorted(CHARACTERS)


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return client_of(server)


def ask(client: OpenAI, prompt: Any = "ROMEO:", **asked: Any) -> OpenAICompletion:
    completion = client.completions.create(model="tiny", prompt=prompt, **asked)
    assert isinstance(completion, OpenAICompletion)
    return completion


def chunks_of(client: OpenAI, prompt: Any = "ROMEO:", **asked: Any) -> list[OpenAICompletion]:
    return list(client.completions.create(model="tiny", prompt=prompt, stream=True, **asked))


def text_of(chunks: list[OpenAICompletion]) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


# The same in both dialects: what OpenAI has a word for, and what goes through extra_body.
SAMPLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {}),
    ({"temperature": 1.0, "seed": 11}, {}),
    ({"temperature": 1.3, "top_p": 0.7, "seed": 12}, {}),
    ({"temperature": 1.0, "seed": 13}, {"top_k": 5, "min_p": 0.01, "disabled_experts": [[0, 1], [2, 3]]}),
    ({"temperature": 1.0, "seed": 14, "stop": ["e", "th"]}, {}),
]


@pytest.mark.parametrize(("official", "ours"), SAMPLINGS)
def test_it_is_the_text_of_generate_streamed_or_not(
    server: Server, client: OpenAI, official: dict[str, Any], ours: dict[str, Any]
) -> None:
    expected = server.answer(max_new_tokens=40, **official, **ours)
    whole = ask(client, max_tokens=40, **official, extra_body=ours)
    chunks = chunks_of(client, max_tokens=40, **official, extra_body=ours)
    (choice,) = whole.choices
    assert choice.text == text_of(chunks) == expected["text"]
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == expected["finish_reason"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == expected["usage"]["generated_tokens"]


def test_what_is_not_said_is_openai_s_default(server: Server, client: OpenAI) -> None:
    whole = ask(client, seed=21)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (6, 16, 22)
    assert whole.choices[0].text == server.answer(max_new_tokens=16, temperature=1.0, seed=21)["text"]


def test_the_seed_that_was_drawn_is_told_and_makes_the_same_text_again(client: OpenAI) -> None:
    first = ask(client, max_tokens=40)
    assert first.model_extra is not None
    assert ask(client, max_tokens=40, seed=first.model_extra["seed"]).choices[0].text == first.choices[0].text


def test_a_stream_is_a_chunk_per_token_one_with_the_reason_one_with_the_usage_and_done(server: Server) -> None:
    asked = {"model": "tiny", "prompt": "A", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    response = server.client.post("/v1/completions", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
    assert all(len(chunk["choices"][0]["text"]) == 1 for chunk in chunks[:5])
    assert [chunk.pop("usage") for chunk in chunks] == [None] * 6
    assert usage.pop("usage") == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
    assert usage.pop("choices") == []
    heads = [{name: chunk[name] for name in usage} for chunk in chunks]
    assert heads == [usage] * 6
    assert usage["id"] == f"cmpl-{response.headers['x-request-id']}"
    for chunk in chunks:
        CompletionAnswer.model_validate(chunk)


def test_without_stream_options_no_chunk_tells_a_usage(client: OpenAI) -> None:
    chunks = chunks_of(client, max_tokens=3)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert len(chunks) == 4


def test_the_log_probabilities_are_those_of_generate(server: Server, client: OpenAI) -> None:
    expected = server.answer(max_new_tokens=12, temperature=2, seed=31, logprobs=3)["tokens"]
    told = ask(client, max_tokens=12, temperature=2, seed=31, logprobs=3).choices[0].logprobs
    assert told is not None
    assert told.tokens == [token["text"] for token in expected]
    assert told.token_logprobs == [token["logprob"] for token in expected]
    assert told.text_offset == list(range(12))
    likeliest = [{each["text"]: each["logprob"] for each in token["top_logprobs"]} for token in expected]
    assert told.top_logprobs == [
        each | {token["text"]: token["logprob"]} for each, token in zip(likeliest, expected, strict=True)
    ]
    assert {len(each) for each in likeliest} == {3}
    streamed = [
        chunk.choices[0].logprobs for chunk in chunks_of(client, max_tokens=12, temperature=2, seed=31, logprobs=3)
    ]
    assert streamed.pop() is None
    assert [each.tokens for each in streamed if each] == [[token] for token in told.tokens]
    assert [each.text_offset for each in streamed if each] == [[index] for index in range(12)]
    assert [each.top_logprobs for each in streamed if each] == [[each] for each in told.top_logprobs]


def test_no_alternatives_are_the_drawn_token_alone(client: OpenAI) -> None:
    told = ask(client, max_tokens=2, logprobs=0).choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert [list(each) for each in told.top_logprobs or []] == [[token] for token in told.tokens]
    assert ask(client, max_tokens=2).choices[0].logprobs is None


def test_a_stop_string_may_come_alone_and_ends_the_text_before_it(client: OpenAI) -> None:
    text = ask(client, max_tokens=30, seed=41).choices[0].text
    stop = text[20:22]
    for asked in (stop, [stop]):
        choice = ask(client, max_tokens=30, seed=41, stop=asked).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_text_that_stops_before_it_begins_is_empty_and_no_error(server: Server, client: OpenAI) -> None:
    first = ask(client, max_tokens=1, seed=42).choices[0].text
    for stream in (False, True):
        asked = {"max_tokens": 5, "seed": 42, "stop": first}
        chunks = chunks_of(client, **asked) if stream else [ask(client, **asked)]
        assert (text_of(chunks), chunks[-1].choices[0].finish_reason) == ("", "stop")
    assert server.answer(max_new_tokens=5, seed=42, temperature=1.0, stop=[first])["text"] == ""


def test_a_prompt_of_token_ids_is_the_text_they_spell(client: OpenAI) -> None:
    ids = [VOCABULARY.index(character) for character in "Speak, I charge"]
    prompts: list[Any] = [ids, [ids], "Speak, I charge", ["Speak, I charge"]]
    texts = {ask(client, prompt, seed=51).choices[0].text for prompt in prompts}
    assert len(texts) == 1
    whole = ask(client, [0] * MAX_PROMPT_CHARACTERS, max_tokens=1)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == MAX_PROMPT_CHARACTERS


def test_an_empty_prompt_starts_from_a_newline(client: OpenAI) -> None:
    prompts: list[Any] = ["", [], [""], [[]], "\n", [0]]
    texts = {ask(client, prompt, seed=52).choices[0].text for prompt in prompts}
    assert len(texts) == 1


def test_the_experts_of_every_token_come_when_asked(server: Server, client: OpenAI) -> None:
    tokens = server.answer(max_new_tokens=6, temperature=1.0, seed=61, return_routed_experts=True)["tokens"]
    asked: dict[str, Any] = {"max_tokens": 6, "seed": 61, "extra_body": {"return_routed_experts": True}}
    whole, chunks = ask(client, **asked), chunks_of(client, **asked)
    for name in ("routed_experts", "expert_weights"):
        expected = [token[name] for token in tokens]
        assert (whole.choices[0].model_extra or {})[name] == expected
        assert [(chunk.choices[0].model_extra or {})[name] for chunk in chunks] == [[each] for each in expected] + [[]]
    assert "routed_experts" not in (ask(client, max_tokens=1).choices[0].model_extra or {})


def test_folding_says_what_was_read(client: OpenAI) -> None:
    for stream in (False, True):
        asked: dict[str, Any] = {"max_tokens": 2, "extra_body": {"unknown_characters": "fold"}}
        last = (chunks_of(client, "Caf\u00e9", **asked) if stream else [ask(client, "Caf\u00e9", **asked)])[-1]
        assert (last.model_extra or {})["prompt_used"] == "Cafe"


def test_a_deadline_is_a_length_to_the_client_and_a_timeout_beside_it(client: OpenAI) -> None:
    choice = ask(client, max_tokens=FOR_EVER, extra_body={"timeout_s": 0.5}).choices[0]
    assert (choice.finish_reason, (choice.model_extra or {})["end_reason"]) == ("length", "timeout")
    assert choice.text


def test_the_models_are_the_one_that_is_served(client: OpenAI) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, listed.owned_by) == ("tiny", "model", "moescope")
    assert client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("large")
    assert refused.value.code == "model_not_found"


def test_the_client_raises_what_the_status_means(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="")
    assert (wrong_model.value.code, wrong_model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError) as two:
        ask(client, n=2)
    assert (two.value.code, two.value.param) == ("unsupported_value", "n")
    assert "n is implemented at its neutral value only: 1" in two.value.message
    with pytest.raises(openai.NotFoundError) as chat:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert chat.value.code == "no_chat"
    assert "/v1/completions" in chat.value.message


def test_a_full_queue_is_a_rate_limit(start_server: StartServer) -> None:
    server = start_server("--slots", 1, "--queue", 1).wait_until_ready()
    running = server.send(max_new_tokens=FOR_EVER)
    server.wait_for(requests_running=1)
    waiting = server.send(max_new_tokens=FOR_EVER)
    server.wait_for(requests_queued=1)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client_of(server))
    assert refused.value.code == "queue_full"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert server.metrics().total("requests_total", outcome="rejected_full", stream="false") == 1
    running.close()
    waiting.close()


def test_a_stream_that_is_cut_off_ends_with_an_error_and_never_with_done(start_server: StartServer) -> None:
    server = start_server("--slots", 1, "--grace-s", 0).wait_until_ready()
    stream = client_of(server).completions.create(model="tiny", prompt="", max_tokens=FOR_EVER, stream=True)
    next(stream)
    server.signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shut down"):
        list(stream)
    assert server.exit_code() == 0


def test_a_client_that_leaves_frees_its_slot(server: Server, client: OpenAI) -> None:
    before = server.metrics().by("requests_total", "stream", outcome="cancelled")
    stream = client.completions.create(model="tiny", prompt="", max_tokens=FOR_EVER, stream=True)
    next(stream)
    stream.close()
    server.wait_for(requests_running=0)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=1), max_tokens=FOR_EVER)
    server.wait_for(requests_running=0)
    after = server.metrics().by("requests_total", "stream", outcome="cancelled")
    assert {stream: after[stream] - before[stream] for stream in after} == {"true": 1, "false": 1}


def test_completions_are_counted_with_all_others(server: Server, client: OpenAI) -> None:
    before = server.metrics()
    ask(client, max_tokens=3)
    chunks_of(client, max_tokens=4)
    with pytest.raises(openai.UnprocessableEntityError):
        ask(client, max_tokens=0)
    after = server.metrics()
    for name, labels, growth in (
        ("requests_total", {"outcome": "length", "stream": "false"}, 1),
        ("requests_total", {"outcome": "length", "stream": "true"}, 1),
        ("requests_total", {"outcome": "rejected_invalid"}, 1),
        ("generated_tokens_total", {}, 7),
    ):
        assert after.total(name, **labels) - before.total(name, **labels) == growth


def test_many_at_once_share_the_batch_with_generate(server: Server, client: OpenAI) -> None:
    alone = [ask(client, seed=seed, max_tokens=30).choices[0].text for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        theirs = pool.map(lambda seed: text_of(chunks_of(client, seed=seed, max_tokens=30)), range(0, 6, 2))
        ours = pool.map(lambda seed: server.answer(seed=seed, max_new_tokens=30, temperature=1)["text"], range(1, 6, 2))
        assert [text for pair in zip(theirs, ours, strict=True) for text in pair] == alone


def parse(content: str | bytes) -> CompletionBody:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return parse_completion("tiny", parse_json_object(raw), LIMITS)


def body(**fields: object) -> str:
    return json.dumps({"model": "tiny", "prompt": "", **fields})


def refusal(content: str | bytes) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse(content)
    return refused.value


def accepted_or_refused(content: str) -> CompletionBody | ApiError:
    try:
        return parse(content)
    except ApiError as refused:
        return refused


def test_every_official_field_may_be_neutral_or_null() -> None:
    neutral = {"n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False}
    neutral |= {"suffix": "", "stop": [], "stream_options": {"include_usage": None, "include_obfuscation": False}}
    parse(body(**neutral, user="anybody"))
    official = [field.alias or name for name, field in CompletionBody.model_fields.items()]
    assert parse(body(**{name: None for name in official if name not in ("model", "prompt")})) == parse(body())


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        ("{}", "missing_field", "prompt"),
        ('{"prompt": ""}', "missing_field", "model"),
        (body(model=None), "missing_field", "model"),
        (body(model=1), "wrong_type", "model"),
        (body(model="Tiny"), "model_not_found", "model"),
        (body(model="\ud800"), "invalid_unicode", "model"),
        (body(user="\ud800"), "invalid_unicode", "user"),
        ('{"model": "tiny", "prompt": "", "n": 1, "n": 1}', "duplicate_field", None),
        (body(max_new_tokens=5), "unknown_field", None),
        (body(messages=[]), "unknown_field", None),
        (body(prompt=5), "wrong_type", "prompt"),
        (body(prompt={}), "wrong_type", "prompt"),
        (body(prompt=["a", "b"]), "out_of_range", "prompt"),
        (body(prompt=[[1], [2]]), "out_of_range", "prompt"),
        (body(prompt=[["a"]]), "wrong_type", "prompt"),
        (body(prompt=[1, "a"]), "wrong_type", "prompt"),
        (body(prompt=[True]), "wrong_type", "prompt"),
        (body(prompt=[1.0]), "wrong_type", "prompt"),
        (body(prompt=[None]), "wrong_type", "prompt"),
        (body(prompt=[65]), "out_of_range", "prompt"),
        (body(prompt=[-1]), "out_of_range", "prompt"),
        (body(prompt=[0] * 8193), "out_of_range", "prompt"),
        (body(prompt="a" * 8193), "prompt_too_long", "prompt"),
        (body(prompt=["\ud800"]), "invalid_unicode", "prompt"),
        (body(max_tokens=0), "out_of_range", "max_tokens"),
        (body(max_tokens=1001), "out_of_range", "max_tokens"),
        (body(max_tokens=True), "wrong_type", "max_tokens"),
        (body(temperature=2.01), "out_of_range", "temperature"),
        (body(temperature=float("nan")), "not_finite", "temperature"),
        (body(logprobs=11), "out_of_range", "logprobs"),
        (body(logprobs=True), "wrong_type", "logprobs"),
        (body(stop=""), "out_of_range", "stop"),
        (body(stop=["a"] * 5), "out_of_range", "stop"),
        (body(stop=1), "wrong_type", "stop"),
        (body(stream=1), "wrong_type", "stream"),
        (body(stream_options={"include": True}), "out_of_range", "stream_options"),
        (body(stream_options={"include_usage": 1}), "wrong_type", "stream_options"),
        (body(stream_options={"include_obfuscation": True}), "unsupported_value", "stream_options"),
        (body(n=2), "unsupported_value", "n"),
        (body(n=True), "wrong_type", "n"),
        (body(best_of=0), "unsupported_value", "best_of"),
        (body(presence_penalty=0.1), "unsupported_value", "presence_penalty"),
        (body(frequency_penalty=-2), "unsupported_value", "frequency_penalty"),
        (body(frequency_penalty=float("nan")), "not_finite", "frequency_penalty"),
        (body(logit_bias={"5": 1}), "unsupported_value", "logit_bias"),
        (body(echo=True), "unsupported_value", "echo"),
        (body(echo=0), "wrong_type", "echo"),
        (body(suffix="."), "unsupported_value", "suffix"),
        (body(user=1), "wrong_type", "user"),
        (body(top_k=66), "out_of_range", "top_k"),
        (body(timeout_s=301), "out_of_range", "timeout_s"),
        (body(disabled_experts=[[6, 0]]), "out_of_range", "disabled_experts"),
    ],
)
def test_what_cannot_be_done_is_refused_by_the_client_s_name_for_it(content: str, code: str, param: str | None) -> None:
    refused = refusal(content)
    assert refused.kind.status == (404 if code == "model_not_found" else 422)
    assert (refused.code, refused.param) == (code, param)
    assert "max_new_tokens" not in refused.message


def test_more_than_one_prompt_is_refused_in_words() -> None:
    assert refusal(body(prompt=["a", "b"])).message == "prompt must be one prompt per request"
    assert refusal(body(prompt=[65])).message == "prompt must hold token ids from 0 to 64"


FIELDS = st.dictionaries(
    st.sampled_from([*(field.alias or name for name, field in CompletionBody.model_fields.items()), "other"]),
    JSON_VALUES,
)


@given(FIELDS)
def test_any_object_is_accepted_within_the_contract_or_refused(fields: dict[str, Any]) -> None:
    result = accepted_or_refused(body(**fields))
    if isinstance(result, ApiError):
        assert result.kind.status in (404, 422)
    else:
        assert 1 <= result.max_new_tokens <= LIMITS.max_new_tokens
        assert (result.n, result.best_of, result.echo, result.suffix) == (1, 1, False, "")


@given(st.sampled_from([*CompletionBody.model_fields, "a field called correct horse"]))
def test_a_refusal_never_repeats_what_was_sent(name: str) -> None:
    told = json.dumps(refusal(body(**{name: {"correct horse": ["battery staple"]}})).describe("id"))
    assert not [sent for sent in ("correct", "horse", "battery", "staple") if sent in told]


def test_every_way_to_end_is_a_word_that_the_client_knows_or_an_error() -> None:
    generation = Generation("an-id", "tiny", 7, {}, 1, None, ["a"], "0123456789ab")
    ended = Ended(FinishReason.EOS, 1, 1, 1, ((1, 1),), queue_s=0.0, ttft_s=0.1, total_s=0.2)
    for reason in FinishReason:
        written = Completion(generation, parse(body())).event(Ended(**{**vars(ended), "reason": reason})).decode()
        first = json.loads(written.partition("\n\n")[0].removeprefix("data: "))
        if "error" in first:
            assert "[DONE]" not in written
            assert first["error"]["request_id"] == "an-id"
        else:
            assert written.endswith("data: [DONE]\n\n")
            assert CompletionAnswer.model_validate(first).choices[0].end_reason == reason
    chunk = Completion(generation, parse(body())).event(DrawnToken(0, 0, "\u2028\n"))
    assert chunk.count(b"\n") == 2


@given(st.text(max_size=3) | st.sampled_from(VOCABULARY), st.booleans())
@example("\0", True)
@example('","text":"', True)
def test_a_chunk_of_a_stream_is_json_as_the_encoder_writes_it(text: str, includes_usage: bool) -> None:
    generation = Generation("an-id", "tiny", 7, {}, 1, None, ["a"], "0123456789ab")
    completion = Completion(generation, parse(body(stream_options={"include_usage": includes_usage})))
    written = completion.event(DrawnToken(0, 0, text)).decode()
    chunk = json.loads(written.removeprefix("data: "))
    assert written == f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    (choice,) = CompletionAnswer.model_validate(chunk).choices
    assert (choice.text, choice.finish_reason, "usage" in chunk) == (text, None, includes_usage)


def test_the_schema_describes_bodies_answers_and_refusals(server: Server) -> None:
    schema = server.client.get("/openapi.json").json()
    for path, body_fields in (
        ("/v1/completions", {"model", "prompt", "max_tokens", "n", "disabled_experts"}),
        ("/tokenize", {"prompt", "unknown_characters"}),
        ("/detokenize", {"tokens"}),
    ):
        operation = schema["paths"][path]["post"]
        described = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body_fields <= set(described["properties"])
        assert "$ref" not in json.dumps(described)
        for name in described["properties"].keys() - described["required"]:
            assert {"type": "null"} in described["properties"][name]["anyOf"]
        assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert "ErrorBody" in json.dumps(operation["responses"]["422"])
    assert {"/v1/models", "/v1/models/{model}"} <= set(schema["paths"])
    tokens = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert tokens["properties"]["max_tokens"]["anyOf"][0]["maximum"] == FOR_EVER
