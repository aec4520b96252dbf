"""The wire contract: what answers look like. Knows no HTTP and no engine."""

from __future__ import annotations

from math import isnan
from typing import Any, Literal

from pydantic import BaseModel, Field

from service.errors import KINDS
from service.expert_window import ExpertLoad, Floats


class ErrorDetail(BaseModel):
    type: str = Field(json_schema_extra={"enum": [*sorted({kind.type for kind in KINDS.values()})]})
    code: str = Field(json_schema_extra={"enum": [*sorted(KINDS)]})
    message: str
    param: str | None
    request_id: str


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    generated_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """Seconds since the request was accepted; null where there was nothing to time.

    tokens_per_s is the tokens after the first over the time since the first.
    """

    queue_s: float
    ttft_s: float | None
    total_s: float
    tokens_per_s: float | None


class Routing(BaseModel):
    """counts is [layer][expert]; every layer sums to experts_per_token times tokens."""

    tokens: int
    counts: list[list[int]]


class Alternative(BaseModel):
    token_id: int
    text: str
    logprob: float


class TokenBody(BaseModel):
    index: int
    text: str
    token_id: int
    logprob: float | None = None
    top_logprobs: list[Alternative] | None = None
    routed_experts: list[list[int]] | None = None
    expert_weights: list[list[float]] | None = None


class GenerateAnswer(BaseModel):
    """The answer to ``"stream": false``; ``event: done`` has the same fields but id, model, params and tokens."""

    id: str
    model: str
    finish_reason: Literal["stop", "length", "eos", "timeout"]
    text: str
    usage: Usage
    timings: Timings
    seed: int
    params: dict[str, Any]
    routing: Routing
    prompt_used: str | None = None
    tokens: list[TokenBody] | None = None


class TokenizeAnswer(BaseModel):
    count: int
    tokens: list[int]
    prompt_used: str | None = Field(None, description="the text that was folded, and is spelled by these tokens")


class DetokenizeAnswer(BaseModel):
    prompt: str


class ModelInfo(BaseModel):
    name: str
    parameters: int
    active_parameters: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    context_length: int
    corpus: str | None
    validation_loss: float | None


class LimitsInfo(BaseModel):
    prompt_characters: int
    max_new_tokens: int
    timeout_s: float


class DefaultsInfo(BaseModel):
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


class BatchInvariance(BaseModel):
    """What the start-up probe found: whether a text is bitwise the same in any company, and in how many rows at a time
    it is computed for that."""

    holds: bool
    row_multiple: int | None


class Versions(BaseModel):
    moescope: str
    torch: str | None
    python: str


class Info(BaseModel):
    """What is served, where and within which limits. What is known only once the model is loaded is null until then."""

    model: ModelInfo
    vocabulary: list[str]
    limits: LimitsInfo
    defaults: DefaultsInfo
    phase: str
    device: str | None
    threads: int
    runner: str | None
    slots: int | None
    batch_invariance: BatchInvariance | None
    fingerprint: str | None
    checkpoint: str
    expert_metrics: Literal["full", "layer", "off"]
    versions: Versions


class Health(BaseModel):
    phase: str
    elapsed_s: float


class NotReady(ErrorBody, Health):
    """A probe's answer with a status of 503."""


class LayerExperts(BaseModel):
    """What the experts of one layer did, lists by expert; null where there is too little to tell."""

    layer: int
    routed_tokens: int
    prefill: list[int] = Field(description="tokens of prompts that each expert worked on")
    decode: list[int] = Field(description="tokens of texts that each expert worked on")
    share: list[float] | None = Field(description="of the layer's work; null without any")
    gate_weight: list[float] = Field(description="sum of the weights that each expert's work had")
    entropy_ratio: float | None = Field(description="entropy of the shares over that of an even load")
    max_load_ratio: float | None = Field(description="load of the busiest expert over the mean load")
    jain: float | None = Field(description="Jain's fairness index of the loads: 1 is even, 1/E one expert for all")
    idle: list[int] | None = Field(description="experts that no token was routed to")
    baseline_share: list[float] | None = Field(description="of the layer's work on the validation text")
    drift: float | None = Field(description="Jensen-Shannon divergence, base 2, of share from baseline_share")


class Experts(BaseModel):
    """What the experts did in a window of time. The figures of a layer are null below 1,000 tokens routed in it."""

    window_s: float = Field(description="seconds that are covered: as asked for or up to 5 more, less after a start")
    age_s: float = Field(description="seconds since the counts were taken")
    routed_tokens: int
    experts_per_token: int
    layers: list[LayerExperts]

    @classmethod
    def of(cls, load: ExpertLoad, experts_per_token: int, baseline: Floats | None) -> Experts:
        return cls(
            window_s=load.seconds,
            age_s=load.age_s,
            routed_tokens=int(load.routed.max()),
            experts_per_token=experts_per_token,
            layers=[_layer(number, load, baseline) for number in range(len(load.routed))],
        )


def _layer(layer: int, load: ExpertLoad, baseline: Floats | None) -> LayerExperts:
    prefill, decode = load.tokens[:, layer].tolist()
    share, has_work = load.share[layer], load.tokens[:, layer].any()
    return LayerExperts(
        layer=layer,
        routed_tokens=load.routed[layer],
        prefill=prefill,
        decode=decode,
        share=share.tolist() if has_work else None,
        gate_weight=load.gate_weight[layer].tolist(),
        entropy_ratio=_number(load.entropy_ratio[layer]),
        max_load_ratio=_number(load.max_load_ratio[layer]),
        jain=_number(load.jain[layer]),
        idle=None if isnan(load.num_idle[layer]) else load.is_idle[layer].nonzero()[0].tolist(),
        baseline_share=None if baseline is None else baseline[layer].tolist(),
        drift=_number(load.drift[layer]),
    )


def _number(value: float) -> float | None:
    return None if isnan(value) else float(value)
