"""The wire contract: what a body may say. Knows no HTTP and no engine. What answers look like is in answers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from model.config import ModelConfig
from service.errors import ApiError

MAX_PROMPT_CHARACTERS = 8192
DEFAULT_NEW_TOKENS = 256
MIN_TEMPERATURE = 0.01
NULL: dict[str, Any] = {"type": "null"}
LIMITED_BY_SERVER = ("max_new_tokens", "top_k", "timeout_s")

StopString = Annotated[str, Field(min_length=1, max_length=64)]
LayerAndExpert = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Limits:
    """What of the contract depends on the server: its settings and its model."""

    max_new_tokens: int
    timeout_s: float
    model: ModelConfig

    def most(self, field: str) -> float:
        """The largest value of a field whose limit is the server's."""
        return {"max_new_tokens": self.max_new_tokens, "top_k": self.model.vocab_size, "timeout_s": self.timeout_s}[
            field
        ]

    def defaults(self) -> dict[str, Any]:
        """What an absent field means, for those fields that a reader may want to show."""
        names = ("temperature", "top_k", "top_p", "min_p")
        fields = {name: GenerateBody.model_fields[name].default for name in names}
        return {"max_new_tokens": min(DEFAULT_NEW_TOKENS, self.max_new_tokens), **fields}


def _in_vocabulary(value: list[int], info: ValidationInfo) -> list[int]:
    limits = info.context
    assert isinstance(limits, Limits)
    if not all(0 <= token_id < limits.model.vocab_size for token_id in value):
        most = limits.model.vocab_size - 1
        raise PydanticCustomError("out_of_range", "must hold token ids from 0 to {most}", {"most": most})
    return value


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
TokenIds = Annotated[list[int], Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_in_vocabulary)]


class Body(BaseModel):
    """What every body has in common. A field that is absent or null has its default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextBody(Body):
    """What text to draw and how, in whichever dialect: another one may have other names, defaults and spellings."""

    prompt: str | list[int]
    max_new_tokens: int = Field(DEFAULT_NEW_TOKENS, ge=1, description="most tokens to draw; the server sets a limit")
    temperature: float = Field(0.8, ge=0, le=2, description="0 is greedy; otherwise 0.01 to 2")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens; 0 is off; at most the vocabulary's size")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the likeliest tokens that hold this share of probability"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="draw from the tokens at least this many times as likely as the likeliest"
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="fixes every draw; chosen below 2^32 when absent")
    stop: list[StopString] = Field(
        [], max_length=4, description="the text ends before the first of these strings, which is not part of it"
    )
    logprobs: int | None = Field(
        None, ge=0, le=10, description="tell each token's log probability, and those of so many likeliest ones"
    )
    disabled_experts: list[LayerAndExpert] = Field(
        [], max_length=65_536, description="[layer, expert] pairs that this request does without"
    )
    timeout_s: float | None = Field(
        None, ge=0.1, description="longest life of this request in seconds; the server sets a limit, its default"
    )
    stream: bool = Field(True, description="server-sent events as they come, or one JSON body at the end")
    return_routed_experts: bool = Field(False, description="which experts each token was drawn with, and their weights")
    unknown_characters: Literal["refuse", "fold"] = Field(
        "refuse",
        description="characters outside the vocabulary: refuse the request, or fold them to plain ones or nothing",
    )

    @field_validator("temperature")
    @classmethod
    def _greedy_or_warm(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise PydanticCustomError("out_of_range", "must be 0 or between 0.01 and 2")
        return value

    @field_validator(*LIMITED_BY_SERVER)
    @classmethod
    def _within_server_limit(cls, value: float | None, info: ValidationInfo) -> float | None:
        limits, field = info.context, info.field_name
        assert isinstance(limits, Limits)
        assert field is not None
        if value is not None and value > limits.most(field):
            raise PydanticCustomError("out_of_range", "must be at most {most:g}", {"most": limits.most(field)})
        return value

    @field_validator("disabled_experts")
    @classmethod
    def _leaves_enough(cls, value: list[LayerAndExpert], info: ValidationInfo) -> list[LayerAndExpert]:
        limits = info.context
        assert isinstance(limits, Limits)
        layers, experts = limits.model.num_layers, limits.model.num_experts
        if not all(layer < layers and expert < experts for layer, expert in value):
            raise PydanticCustomError(
                "out_of_range",
                "must hold [layer, expert] pairs below [{layers}, {experts}]",
                {"layers": layers, "experts": experts},
            )
        gone: defaultdict[int, set[int]] = defaultdict(set)
        for layer, expert in value:
            gone[layer].add(expert)
        if not all(map(limits.model.can_do_without, gone.values())):
            model = limits.model
            groups = f" in {model.groups_per_token} of the {model.num_groups} groups" if model.num_groups > 1 else ""
            raise PydanticCustomError(
                "out_of_range",
                "must leave at least {least} experts{groups} in every layer",
                {"least": model.experts_per_group_and_token, "groups": groups},
            )
        return value

    @property
    def tells_tokens(self) -> bool:
        """An answer that does not stream has a list of its tokens."""
        return self.return_routed_experts or self.logprobs is not None

    def params(self) -> dict[str, Any]:
        """How the text is made, as the answer repeats it; with the prompt and the seed it makes the same text again."""
        return self.model_dump(exclude={"prompt", "seed", "stream"})


class GenerateBody(TextBody):
    """What to generate. A field that is absent or null has its default."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS, description="text to continue; empty starts from a newline")


class TokenizeBody(Body):
    """A text whose tokens are asked for."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    unknown_characters: Literal["refuse", "fold"] = "refuse"


class DetokenizeBody(Body):
    """Tokens whose text is asked for."""

    tokens: TokenIds


AnyBody = TypeVar("AnyBody", bound=Body)
AnyTextBody = TypeVar("AnyTextBody", bound=TextBody)


def parse_body(kind: type[AnyBody], raw: dict[str, Any], limits: Limits) -> AnyBody:
    """Raises ApiError with the first thing that is wrong; never with what the client sent."""
    names = _names(kind)
    given = {name: value for name, value in raw.items() if value is not None or name not in names.values()}
    if "max_new_tokens" in names:
        default = kind.model_fields["max_new_tokens"].default
        given.setdefault(names["max_new_tokens"], min(default, limits.max_new_tokens))
    try:
        return kind.model_validate(given, context=limits)
    except ValidationError as error:
        raise _refusal(error, names.values()) from None


def body_schema(kind: type[Body], limits: Limits) -> dict[str, Any]:
    """The body as JSON Schema, with this server's limits; null is as good as absent where there is a default."""
    schema = kind.model_json_schema()
    fields = schema["properties"]
    for field, name in _names(kind).items():
        if name not in schema["required"]:
            fields[name] = _or_null(fields[name])
        if field in LIMITED_BY_SERVER:
            fields[name]["anyOf"][0]["maximum"] = limits.most(field)
        if field == "max_new_tokens":
            fields[name]["default"] = min(fields[name]["default"], limits.max_new_tokens)
    if "temperature" in fields:  # a range of JSON Schema has no gap
        warm = {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 2}
        fields["temperature"]["anyOf"][:1] = [{"const": 0}, warm]
    if "seed" in fields:  # FastAPI makes floats of limits: 2^63 is one, 2^63 - 1 is not
        fields["seed"]["anyOf"][0] = {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}
    if "disabled_experts" in fields:
        fields["disabled_experts"]["anyOf"][0]["items"] = _pair_schema(limits.model)
    _limit_token_ids(schema, limits.model.vocab_size - 1)
    return schema


def _pair_schema(model: ModelConfig) -> dict[str, Any]:
    ends = (model.num_layers - 1, model.num_experts - 1)
    pair = [{"type": "integer", "minimum": 0, "maximum": end} for end in ends]
    return {"type": "array", "prefixItems": pair, "items": False, "minItems": 2}


def _limit_token_ids(schema: Any, most: int) -> None:
    """The only plain integers in a list are token ids."""
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _limit_token_ids(part, most)
    if isinstance(schema, dict) and schema.get("items") == {"type": "integer"}:
        schema["items"] = {"type": "integer", "minimum": 0, "maximum": most}


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
    choices = [each for each in field.get("anyOf", [field]) if each != NULL]
    return {"anyOf": [*choices, NULL], **described}


def _names(kind: type[Body]) -> dict[str, str]:
    """The field names of a kind of body and what they are called on the wire."""
    return {name: field.alias or name for name, field in kind.model_fields.items()}


_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "string_too_long": "out_of_range",
    "string_too_short": "out_of_range",
    "too_long": "out_of_range",
    "too_short": "out_of_range",
    "string_unicode": "invalid_unicode",
    "finite_number": "not_finite",
    "greater_than": "out_of_range",
    "greater_than_equal": "out_of_range",
    "less_than_equal": "out_of_range",
    "literal_error": "out_of_range",
    "out_of_range": "out_of_range",
    "unsupported_value": "unsupported_value",
}


def _refusal(error: ValidationError, names: Iterable[str]) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    code = _CODES.get(first["type"], "wrong_type")
    if code == "unknown_field":  # its name is the client's, so it is not repeated
        return ApiError(code, f"the body has a field that is not known; known are {', '.join(names)}")
    param = str(first["loc"][0]) if first["loc"] else None  # a name that is no Unicode has no place of its own
    if code in ("missing_field", "invalid_unicode"):
        return ApiError(code, param=param)
    reason = re.sub("^(Input|String|List) should", "must", first["msg"])
    if first["type"] == "string_too_long" and param == "prompt":
        code = "prompt_too_long"
    return ApiError(code, f"{param} {reason}", param=param)
