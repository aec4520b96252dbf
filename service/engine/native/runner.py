"""Decoding by the native step: ctypes around step.cpp. Prompts are read by torch, into the same cache.

Letters: B rows, L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Routing
from model.sampling import log_probabilities
from model.transformer import Transformer
from service.engine.batch import Batch, DecodeBatch
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn
from service.engine.runner import TorchRunner
from service.engine.sequence import Phase

ACTIVATIONS = ("swiglu", "relu", "gelu")


class Shape(ctypes.Structure):
    """As in step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("vocab", "channels", "layers", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("experts", "chosen", "expert_size", "ring", "slots")),
        *((name, ctypes.c_int32) for name in ("activation", "gates_over_all")),
        ("eps", ctypes.c_float),
        ("rope_theta", ctypes.c_double),
    ]

    @classmethod
    def of(cls, config: ModelConfig, slots: int) -> Shape:
        return cls(
            *(config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads),
            *(config.head_dim, config.num_experts, config.experts_per_token, config.expert_size),
            *(config.context_length, slots, ACTIVATIONS.index(config.activation), config.gates_over == "all"),
            *(config.rms_norm_eps, config.rope_theta),
        )


class Weights(ctypes.Structure):
    """As in step.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head")),
        *(
            (name, ctypes.POINTER(ctypes.c_void_p))
            for name in ("attention_norm", "query", "key", "value", "out", "query_norm", "key_norm", "moe_norm")
        ),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("router", "gate_up", "down")),
    ]

    @classmethod
    def of(cls, model: Transformer) -> Weights:
        layers = model.layers
        return cls(
            *(each.weight.data_ptr() for each in (model.embedding, model.norm, model.head)),
            *(
                (ctypes.c_void_p * len(layers))(*(tensor.data_ptr() for tensor in tensors))
                for tensors in zip(*(_weights_of(layer) for layer in layers), strict=True)
            ),
        )


def _weights_of(layer: Any) -> list[Tensor]:
    attention, moe = layer.attention, layer.moe
    modules = (attention.query, attention.key, attention.value, attention.out, attention.query_norm, attention.key_norm)
    return [
        layer.attention_norm.weight,
        *(module.weight for module in modules),
        *(layer.moe_norm.weight, moe.router.weight, moe.experts.gate_up, moe.experts.down),
    ]


class Steps(ctypes.Structure):
    """As in step.cpp."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("ids", "slots", "positions", "disabled")),
        *((name, ctypes.c_void_p) for name in ("temperature", "top_p", "min_p", "top_k", "seed")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "finite", "expert_ids", "expert_weights", "logits")),
    ]


class NativeRunner(TorchRunner):
    """Decodes natively. A row's bits do not depend on its company, so a batch needs no padding."""

    name = "native"

    def __init__(
        self, library: Path, model: Transformer, num_slots: int, counters: ExpertCounters, threads: int
    ) -> None:
        super().__init__(model, num_slots, counters)
        self._library = ctypes.CDLL(str(library))
        self._library.moescope_new.restype = ctypes.c_void_p
        shape, weights = Shape.of(model.config, num_slots + 1), Weights.of(model)
        cache = (ctypes.c_void_p(each.data_ptr()) for each in (self.cache.keys, self.cache.values))
        self._step = ctypes.c_void_p(
            self._library.moescope_new(ctypes.byref(shape), ctypes.byref(weights), *cache, threads)
        )

    def __del__(self) -> None:
        self._library.moescope_delete(self._step)

    def _decode(self, batch: DecodeBatch) -> Drawn:
        return self.decode(batch, 1)

    def decode(self, batch: DecodeBatch, steps: int) -> Drawn:
        config = self._model.config
        rows = len(batch.ids)
        routed = (steps, rows, config.num_layers, config.experts_per_token)
        token_ids = torch.empty(steps, rows, dtype=torch.int64)
        finite = torch.empty(steps, rows, dtype=torch.bool)
        expert_ids, expert_weights = torch.empty(routed, dtype=torch.int64), torch.empty(routed)
        wanted = batch.wishes.num_logprobs
        logits = None if wanted is None else torch.empty(steps, rows, config.vocab_size)
        options = batch.options
        given = [
            *(batch.ids.contiguous(), batch.slots.contiguous(), batch.positions.contiguous(), batch.wishes.disabled),
            *(each.contiguous() for each in (options.temperature, options.top_p, options.min_p)),
            *(each.contiguous() for each in (options.top_k, options.seed)),
            *(token_ids, finite, expert_ids, expert_weights, logits),
        ]
        now = Steps(rows, steps, *(None if each is None else each.data_ptr() for each in given))
        self._library.moescope_run(self._step, ctypes.byref(now))
        self.expert_ids = expert_ids
        logprobs = None if logits is None else log_probabilities(logits[0], token_ids[0], wanted)
        routings = [Routing(None, expert_ids[0, :, l], expert_weights[0, :, l]) for l in range(config.num_layers)]
        if steps == 1:
            self._counters.add(Phase.DECODE, batch.slots, routings)
            return Drawn(token_ids[0], finite[0], expert_ids[0], expert_weights[0], logprobs)
        return Drawn(token_ids, finite, expert_ids, expert_weights, logprobs)
