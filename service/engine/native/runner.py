"""The native step: ctypes around step.cpp. Torch only holds the arrays.

Letters: T steps, N rows that draw, L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.sampling import log_probabilities
from model.transformer import Layer, Transformer
from service.engine.batch import Batch, Layout, PrefillBatch
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn
from service.engine.native.library import NoLibrary

ACTIVATIONS = ("swiglu", "relu", "gelu")
HEAD_MULTIPLE = 32
PARTS = ("QKV", "attention", "out", "router", "counting", "experts", "head", "sampling", "rest", "waiting")
"""Of a step, in the order of step.cpp's Part. Each product counts with the norms before it."""
RING_MULTIPLE = 16
"""The step keeps the keys of so many positions together."""


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
    _fields_ = _fields(ctypes.c_void_p, "keys values tokens gate_weight")


class _Steps(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int32, "rows steps drawing prompts team"),
        *_fields(ctypes.c_void_p, "lengths draws ids slots positions disabled temperature top_p min_p top_k seed"),
        *_fields(ctypes.c_void_p, "token_ids finite expert_ids expert_weights logits seconds"),
    ]


def why_not(config: ModelConfig) -> str | None:
    """What of a model the native step does not compute, in a clause; None if it computes all of it."""
    if config.num_groups > 1:
        return "it has no two levels of gating"
    if config.head_dim % HEAD_MULTIPLE:
        return f"head_dim is {config.head_dim}, and it needs a multiple of {HEAD_MULTIPLE}"
    return None


def with_whole_ring(config: ModelConfig) -> ModelConfig:
    """Of the cache that it makes, whose length its vectors divide; the window stays what it was."""
    return replace(config, context_length=config.context_length + -config.context_length % RING_MULTIPLE)


class NativeRunner:
    """Reads prompts, and decodes up to most_steps a call. Nothing is padded: bits of a row are its own in any crowd."""

    name = "native"
    most_steps = 16
    most_prompt_tokens = 256  # step.cpp's MOST_PROMPT_ROWS

    def __init__(
        self, library: ctypes.CDLL, model: Transformer, num_slots: int, counters: ExpertCounters, threads: int
    ) -> None:
        """Raises NoLibrary where there is no memory or no thread to be had, or if a weight is no bfloat16."""
        if any((weight.view(torch.int32) & 0xFFFF).any() for weight in model.parameters()):
            raise NoLibrary("the weights are not bfloat16, and it has no others")
        config = model.config
        self.layout = Layout(model.device, num_slots, config.num_layers, config.num_experts, row_multiple=1)
        self.counters = counters
        self.cache = KVCache(with_whole_ring(config), num_slots + 1, model.device)
        self._config, self._library = config, library
        self.build = sha256(Path(library._name).read_bytes()).hexdigest()
        self.threads = threads  # that share a call; fewer can be asked for at any time
        library.moescope_new.restype = ctypes.c_void_p
        pieces = (_shape(config, num_slots + 1), _weights(model), _memory(self.cache, counters))
        address = library.moescope_new(*map(ctypes.byref, pieces), threads)
        if not address:
            raise NoLibrary("there is no memory or no thread for it")
        self._step = ctypes.c_void_p(address)

    def __del__(self) -> None:
        if hasattr(self, "_step"):
            self._library.moescope_delete(self._step)

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)

    def rebuild(self) -> None:
        self.cache.clear(slice(None))

    def pad_rows_to(self, multiple: int) -> None:
        """Padding would change nothing."""

    def run(self, batch: Batch, steps: int, seconds: Tensor | None = None) -> Drawn | None:
        """Where seconds (PARTS,) of float64 are given, the time of each part, as the first thread sees it, is added."""
        wishes, options = batch.wishes, batch.options
        lengths = draws = None
        if isinstance(batch, PrefillBatch):
            assert steps == 1
            lengths = torch.tensor([piece.num_tokens for piece in batch.pieces])
            draws = torch.tensor([piece.draws for piece in batch.pieces])
            ids, slots, positions, disabled = _rows(batch)
            rows, prompts, drawing = len(ids), len(lengths), sum(piece.draws for piece in batch.pieces)
            assert prompts == 1 or rows <= self.most_prompt_tokens, "the step has room for no more"
        else:
            ids, slots, positions, disabled = batch.ids, batch.slots, batch.positions, wishes.disabled
            rows = drawing = batch.num_tokens
            prompts = 0
        drawn = torch.empty(steps, drawing, dtype=torch.int64), torch.empty(steps, drawing, dtype=torch.bool)
        routed = (steps, drawing, self._config.num_layers, self._config.experts_per_token)
        routing = torch.empty(routed, dtype=torch.int64), torch.empty(routed)
        wanted = wishes.num_logprobs
        logits = None if wanted is None else torch.empty(steps, drawing, self._config.vocab_size)
        arrays = [
            *(lengths, draws, ids, slots, positions, disabled),
            *(options.temperature, options.top_p, options.min_p, options.top_k, options.seed),
            *(*drawn, *routing, logits, seconds),
        ]
        arrays = [None if each is None else each.contiguous() for each in arrays]
        addresses = (None if each is None else each.data_ptr() for each in arrays)
        now = _Steps(rows, steps, drawing, prompts, self.threads, *addresses)
        self._library.moescope_run(self._step, ctypes.byref(now))
        if not drawing:
            return None
        return Drawn(
            *drawn, *routing, None if logits is None or wanted is None else _logprobs(logits, drawn[0], wanted)
        )


def _rows(batch: PrefillBatch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Ids, slots and positions (T,) and disabled experts (T, L, E), with the rows that draw behind all others."""
    rows: list[tuple[int, int, int, int]] = []  # each row's place in the batch, its prompt, slot and position
    drawing: list[tuple[int, int, int, int]] = []
    for prompt, piece in enumerate(batch.pieces):
        first = len(rows) + len(drawing)
        rows += [(first + at, prompt, piece.slot, piece.start + at) for at in range(piece.num_tokens)]
        if piece.draws:
            drawing.append(rows.pop())
    places, prompts, slots, positions = torch.tensor(rows + drawing).unbind(1)
    disabled = batch.wishes.disabled
    return batch.ids[places], slots, positions, None if disabled is None else disabled[prompts]


def _logprobs(logits: Tensor, token_ids: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (T, N, V), token_ids (T, N)"""
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
    return _Memory(*(each.data_ptr() for each in (cache.keys, cache.values, counters.tokens, counters.weight)))
