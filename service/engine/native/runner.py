"""Decoding by the native step: ctypes around step.cpp. Prompts are read by torch, into the same cache.

Letters: T steps, B rows, L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.sampling import log_probabilities
from model.transformer import Layer, Transformer
from service.engine.batch import Batch, DecodeBatch, Layout, PrefillBatch
from service.engine.counters import PHASES, ExpertCounters
from service.engine.drawn import Drawn
from service.engine.native.library import NoLibrary
from service.engine.runner import TorchRunner
from service.engine.sequence import Phase

ACTIVATIONS = ("swiglu", "relu", "gelu")
HEAD_MULTIPLE = 32


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_Pointers = ctypes.POINTER(ctypes.c_void_p)


class _Shape(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int32, "vocab channels layers heads kv_heads head_dim experts chosen expert_size ring slots"),
        *_fields(ctypes.c_int32, "activation gates_over_all"),
        ("eps", ctypes.c_float),
        ("rope_theta", ctypes.c_double),
    ]


class _Weights(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "embedding norm head"),
        *_fields(_Pointers, "attention_norm query key value out query_norm key_norm moe_norm router gate_up down"),
    ]


class _Memory(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "keys values tokens gate_weight"),
        *_fields(ctypes.c_int64, "tokens_stride gate_weight_stride"),
    ]


class _Steps(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int32, "rows steps"),
        *_fields(ctypes.c_void_p, "ids slots positions disabled temperature top_p min_p top_k seed"),
        *_fields(ctypes.c_void_p, "token_ids finite expert_ids expert_weights logits"),
    ]


def why_not(config: ModelConfig) -> str | None:
    """What of a model the native step does not compute, in a clause; None if it computes all of it."""
    if config.num_groups > 1:
        return "it has no two levels of gating"
    if config.head_dim % HEAD_MULTIPLE:
        return f"head_dim is {config.head_dim}, and it needs a multiple of {HEAD_MULTIPLE}"
    return None


class NativeRunner:
    """Decodes natively, up to most_steps a call. A row's bits do not depend on its company, so nothing is padded."""

    name = "native"
    most_steps = 16

    def __init__(
        self, library: ctypes.CDLL, model: Transformer, num_slots: int, counters: ExpertCounters, threads: int
    ) -> None:
        """Raises NoLibrary where there is no memory or no thread to be had, or if a weight is no bfloat16."""
        if any((weight.view(torch.int32) & 0xFFFF).any() for weight in model.parameters()):
            raise NoLibrary("the weights are not bfloat16, and it has no others")
        self._torch = TorchRunner(model, num_slots, counters)
        self._config = model.config
        self._library = library
        library.moescope_new.restype = ctypes.c_void_p
        pieces = (_shape(model.config, num_slots + 1), _weights(model), _memory(self._torch.cache, counters))
        address = library.moescope_new(*map(ctypes.byref, pieces), threads)
        if not address:
            raise NoLibrary("there is no memory or no thread for it")
        self._step = ctypes.c_void_p(address)

    def __del__(self) -> None:
        if hasattr(self, "_step"):
            self._library.moescope_delete(self._step)

    @property
    def layout(self) -> Layout:
        return replace(self._torch.layout, row_multiple=1)

    @property
    def counters(self) -> ExpertCounters:
        return self._torch.counters

    @property
    def cache(self) -> KVCache:
        return self._torch.cache

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        return self._torch.run(batch, steps) if isinstance(batch, PrefillBatch) else self._decode(batch, steps)

    def clear(self, slot: int) -> None:
        self._torch.clear(slot)

    def rebuild(self) -> None:
        self._torch.rebuild()

    def pad_rows_to(self, multiple: int) -> None:
        self._torch.pad_rows_to(multiple)

    def _decode(self, batch: DecodeBatch, steps: int) -> Drawn:
        rows, config, wanted = len(batch.ids), self._config, batch.wishes.num_logprobs
        drawn = torch.empty(steps, rows, dtype=torch.int64), torch.empty(steps, rows, dtype=torch.bool)
        routed = (steps, rows, config.num_layers, config.experts_per_token)
        routing = torch.empty(routed, dtype=torch.int64), torch.empty(routed)
        logits = None if wanted is None else torch.empty(steps, rows, config.vocab_size)
        options = batch.options
        arrays = [
            *(batch.ids, batch.slots, batch.positions, batch.wishes.disabled),
            *(options.temperature, options.top_p, options.min_p, options.top_k, options.seed),
            *(*drawn, *routing, logits),
        ]
        arrays = [None if each is None else each.contiguous() for each in arrays]
        now = _Steps(rows, steps, *(None if each is None else each.data_ptr() for each in arrays))
        self._library.moescope_run(self._step, ctypes.byref(now))
        return Drawn(
            *drawn, *routing, None if logits is None or wanted is None else _logprobs(logits, drawn[0], wanted)
        )


def _logprobs(logits: Tensor, token_ids: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (T, B, V), token_ids (T, B)"""
    of_rows = log_probabilities(logits.flatten(0, 1), token_ids.flatten(), wanted)
    chosen, ids, best = (each.unflatten(0, token_ids.shape) for each in of_rows)
    return chosen, ids, best


def _shape(config: ModelConfig, slots: int) -> _Shape:
    return _Shape(
        *(config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads),
        *(config.head_dim, config.num_experts, config.experts_per_token, config.expert_size),
        *(config.context_length, slots, ACTIVATIONS.index(config.activation), config.gates_over == "all"),
        *(config.rms_norm_eps, config.rope_theta),
    )


def _weights(model: Transformer) -> _Weights:
    of_layers = zip(*map(_weights_of, model.layers), strict=True)
    return _Weights(
        *(module.weight.data_ptr() for module in (model.embedding, model.norm, model.head)),
        *((ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors)) for tensors in of_layers),
    )


def _weights_of(layer: Layer) -> Iterator[Tensor]:
    attention, moe = layer.attention, layer.moe
    yield layer.attention_norm.weight
    yield from (attention.query.weight, attention.key.weight, attention.value.weight, attention.out.weight)
    yield from (attention.query_norm.weight, attention.key_norm.weight, layer.moe_norm.weight)
    yield from (moe.router.weight, moe.experts.gate_up, moe.experts.down)


def _memory(cache: KVCache, counters: ExpertCounters) -> _Memory:
    tokens = counters.tokens[:, PHASES.index(Phase.DECODE)]
    arrays = (cache.keys, cache.values, tokens, counters.weight)
    return _Memory(*(each.data_ptr() for each in arrays), tokens.stride(0), counters.weight.stride(0))
