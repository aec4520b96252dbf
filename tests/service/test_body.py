"""A body is what the contract says or it is refused, with a status of its own and without an echo."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from service.body import parse_json_object
from service.errors import ApiError
from service.schemas import MAX_PROMPT_CHARACTERS, GenerateBody, Limits, parse_body

LIMITS = Limits(max_new_tokens=1000, timeout_s=300, model=ModelConfig(65))


def parse(content: str | bytes) -> GenerateBody:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return parse_body(GenerateBody, parse_json_object(raw), LIMITS)


def body(**fields: object) -> str:
    return json.dumps({"prompt": "ROMEO:", **fields})


def refusal(content: str | bytes) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse(content)
    return refused.value


def accepted_or_refused(content: str | bytes) -> GenerateBody | ApiError:
    try:
        return parse(content)
    except ApiError as refused:
        return refused


def test_absent_null_and_default_are_the_same() -> None:
    names = [name for name in GenerateBody.model_fields if name != "prompt"]
    absent = parse(body())
    assert parse(body(**dict.fromkeys(names))) == absent
    assert parse(body(**{name: getattr(absent, name) for name in names})) == absent


def test_the_default_length_never_exceeds_the_server_s_limit() -> None:
    assert parse_body(GenerateBody, {"prompt": ""}, replace(LIMITS, max_new_tokens=10)).max_new_tokens == 10


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "a" * MAX_PROMPT_CHARACTERS},
        {"prompt": "\u0000 \U0001f600"},
        {"temperature": 0},
        {"temperature": 0.01},
        {"temperature": 2},
        {"max_new_tokens": 1000},
        {"top_k": 65},
        {"min_p": 1},
        {"stop": ["a" * 64, "b", "c", "\n"]},
        {"logprobs": 10},
        {"timeout_s": 300},
        {"disabled_experts": [[0, 0], [0, 7], [0, 7], [5, 1]]},
        {"top_p": 1},
        {"top_p": 1e-300},
        {"seed": 2**63 - 1},
        {"stream": False},
        {"unknown_characters": "fold"},
    ],
)
def test_the_ends_of_every_range_are_in_it(fields: dict[str, Any]) -> None:
    parse(body(**fields))


@pytest.mark.parametrize("content", ["", "{", "{'prompt': 1}", b"\xff\xfe{\x00}\x00", "\ufeff{}", "[" * 60_000, "\0"])
def test_what_is_not_json_is_a_400(content: str | bytes) -> None:
    assert (refusal(content).kind.status, refusal(content).code) == (400, "not_json")


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        ("[]", "not_an_object", None),
        ("NaN", "not_an_object", None),
        ("{}", "missing_field", "prompt"),
        ('{"prompt": null}', "missing_field", "prompt"),
        ('{"prompt": "", "prompt": ""}', "duplicate_field", None),
        ('{"prompt": {"a": 1, "a": 2}}', "duplicate_field", None),
        (body(max_tokens=5), "unknown_field", None),
        (body(max_tokens=None), "unknown_field", None),
        (body(end=[]), "unknown_field", None),
        ('{"prompt": "", "\\ud800": 1}', "invalid_unicode", None),
        ('{"prompt": "\\ud800"}', "invalid_unicode", "prompt"),
        (body(unknown_characters="\ud800"), "invalid_unicode", "unknown_characters"),
        (body(prompt=12), "wrong_type", "prompt"),
        (body(prompt=["a"]), "wrong_type", "prompt"),
        (body(prompt="a" * (MAX_PROMPT_CHARACTERS + 1)), "prompt_too_long", "prompt"),
        (body(max_new_tokens=True), "wrong_type", "max_new_tokens"),
        (body(max_new_tokens="12"), "wrong_type", "max_new_tokens"),
        (body(max_new_tokens=1.0), "wrong_type", "max_new_tokens"),
        (body(max_new_tokens=0), "out_of_range", "max_new_tokens"),
        (body(max_new_tokens=1001), "out_of_range", "max_new_tokens"),
        ('{"prompt": "", "max_new_tokens": %s}' % ("9" * 5000), "out_of_range", "max_new_tokens"),
        (body(temperature=False), "wrong_type", "temperature"),
        (body(temperature="0.5"), "wrong_type", "temperature"),
        (body(temperature=0.001), "out_of_range", "temperature"),
        (body(temperature=-1), "out_of_range", "temperature"),
        (body(temperature=float("nan")), "not_finite", "temperature"),
        (body(temperature=float("inf")), "not_finite", "temperature"),
        ('{"prompt": "", "top_p": 1e400}', "not_finite", "top_p"),
        ('{"prompt": "", "top_p": -1e400}', "not_finite", "top_p"),
        (body(top_p=0), "out_of_range", "top_p"),
        (body(top_p=1.01), "out_of_range", "top_p"),
        (body(top_k=-1), "out_of_range", "top_k"),
        (body(top_k=66), "out_of_range", "top_k"),
        (body(seed=-1), "out_of_range", "seed"),
        (body(seed=2**63), "out_of_range", "seed"),
        (body(seed=1e3), "wrong_type", "seed"),
        (body(stream=1), "wrong_type", "stream"),
        (body(min_p=1.01), "out_of_range", "min_p"),
        (body(stop="a"), "wrong_type", "stop"),
        (body(stop=[""]), "out_of_range", "stop"),
        (body(stop=["a" * 65]), "out_of_range", "stop"),
        (body(stop=["a"] * 5), "out_of_range", "stop"),
        (body(stop=["\ud800"]), "invalid_unicode", "stop"),
        (body(logprobs=11), "out_of_range", "logprobs"),
        (body(logprobs=True), "wrong_type", "logprobs"),
        (body(timeout_s=300.5), "out_of_range", "timeout_s"),
        (body(timeout_s=0.09), "out_of_range", "timeout_s"),
        (body(timeout_s=float("nan")), "not_finite", "timeout_s"),
        (body(disabled_experts=[[6, 0]]), "out_of_range", "disabled_experts"),
        (body(disabled_experts=[[0, 8]]), "out_of_range", "disabled_experts"),
        (body(disabled_experts=[[0, -1]]), "out_of_range", "disabled_experts"),
        (body(disabled_experts=[[0, 1, 2]]), "out_of_range", "disabled_experts"),
        (body(disabled_experts=[[0, expert] for expert in range(7)]), "out_of_range", "disabled_experts"),
        (body(return_routed_experts="yes"), "wrong_type", "return_routed_experts"),
        (body(unknown_characters="drop"), "out_of_range", "unknown_characters"),
    ],
)
def test_what_the_contract_does_not_allow_is_a_422_that_names_the_field(
    content: str, code: str, param: str | None
) -> None:
    refused = refusal(content)
    assert (refused.kind.status, refused.code, refused.param) == (422, code, param)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from([*GenerateBody.model_fields, "other"]), JSON_VALUES)


@given(FIELDS, st.text())
def test_any_object_is_accepted_within_the_contract_or_refused(fields: dict[str, Any], prompt: str) -> None:
    result = accepted_or_refused(json.dumps({"prompt": prompt, **fields}))
    if isinstance(result, ApiError):
        assert result.kind.status == 422
    else:
        assert 1 <= result.max_new_tokens <= LIMITS.max_new_tokens
        assert result.temperature == 0 or 0.01 <= result.temperature <= 2


@given(st.sampled_from([*GenerateBody.model_fields, "a field called correct horse"]))
def test_a_refusal_never_repeats_what_was_sent(name: str) -> None:
    refused = refusal(json.dumps({"prompt": "", name: {"correct horse": ["battery staple"]}}))
    told = json.dumps(refused.describe("id"))
    assert not [sent for sent in ("correct", "horse", "battery", "staple") if sent in told]


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_understood(content: bytes) -> None:
    result = accepted_or_refused(content)
    assert not isinstance(result, ApiError) or result.kind.status in (400, 422)
