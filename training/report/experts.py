"""What the experts do: how much each works, what it likes, and what its absence costs. Reads a model, changes nothing.

Letters: W windows, T context_length, L layers, E experts, K experts per token, V vocabulary, C classes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.routing import load_entropy_ratio, max_load_ratio
from model.transformer import Transformer
from training.evaluate import spread_windows, windows_at_once

# Beyond this a picture of single experts shows nothing, and a causal map would take a night.
MOST_EXPERTS = 512

NOTED_WINDOWS = 24
"""On which a run notes at every look what its experts are chosen for."""

CLASSES = ("newline", "space", "upper case", "vowel", "consonant", "digit", "punctuation", "other")
_VOWELS = frozenset("aeiou")


def class_of(token_bytes: bytes) -> str:
    """The class of a token's first character that is no space; of a space or line end if it holds nothing else.

    A letter counts without its accents; one of another alphabet and bytes that are no text are "other".
    """
    try:
        token = token_bytes.decode()
    except UnicodeDecodeError:
        return "other"
    if not token.strip():
        return "newline" if "\n" in token else "space" if token else "other"
    first = token.lstrip()[0]
    plain = unicodedata.normalize("NFKD", first)[0]
    if not plain.isascii():
        return "other"
    if plain.isupper():
        return "upper case"
    if plain.islower():
        return "vowel" if plain in _VOWELS else "consonant"
    return "digit" if plain.isdigit() else "punctuation"


@torch.inference_mode()
def count_choices(model: Transformer, inputs: Tensor) -> Tensor:
    """How often each expert took each token of the vocabulary: inputs (W, T) -> (L, E, V) int64.

    Summed over V it is the load; every layer sums to K times the tokens.
    """
    config = model.config
    shape = (config.num_layers, config.num_experts, config.vocab_size)
    counts = torch.zeros(shape, dtype=torch.int64, device=inputs.device)
    for x in inputs.split(windows_at_once(config)):
        for layer, routing in enumerate(model(x)[1]):
            cells = routing.expert_ids * config.vocab_size + x.flatten()[:, None]  # (W * T, K)
            counts[layer] += torch.bincount(cells.flatten(), minlength=shape[1] * shape[2]).view(shape[1:])
    return counts


def by_class(counts: Tensor, token_bytes: Sequence[bytes]) -> Tensor:
    """(L, E, V) -> (L, E, C)"""
    index = torch.tensor([CLASSES.index(class_of(token)) for token in token_bytes], device=counts.device)
    return counts.new_zeros(*counts.shape[:2], len(CLASSES)).index_add_(2, index, counts)


def chosen_by_class(model: Transformer, ids: Tensor, token_bytes: Sequence[bytes]) -> list[list[list[int]]] | None:
    """What a training run notes of its experts now and then, on a few windows: choices [layer][expert][class].

    None for so many experts that nobody could look at them one by one.
    """
    if model.config.num_layers * model.config.num_experts > MOST_EXPERTS:
        return None
    inputs, _ = spread_windows(ids, model.config.context_length, NOTED_WINDOWS)
    counts: list[list[list[int]]] = by_class(count_choices(model, inputs), token_bytes).tolist()
    return counts


def lift(counts: Tensor) -> Tensor:
    """Observed over expected choices, 1 without preference: (L, E, X) -> (L, E, X), NaN where X or E is unseen.

    Expected is what the expert's load and the column's frequency give when they are independent.
    """
    counts = counts.double()
    total = counts.sum((1, 2), keepdim=True)
    return counts * total / (counts.sum(1, keepdim=True) * counts.sum(2, keepdim=True))


def favourites(
    counts: Tensor, tokens: Sequence[str], experts_per_token: int, most: int = 5
) -> list[list[list[dict[str, Any]]]]:
    """What each expert took most of beyond its share: [layer][expert] -> up to ``most`` of {token, lift, taken}.

    ``taken`` is the share of the token's occurrences that the expert had a part in. They are ranked by the number of
    choices above the expected one, not by lift: the lift of a rarity is luck.
    """
    ratio = lift(counts).nan_to_num(1.0)
    taken = counts / (counts.sum(1, keepdim=True) / experts_per_token)
    best = (counts * (1 - 1 / ratio.clamp(min=1e-9))).topk(min(most, len(tokens)), dim=-1)

    def of_expert(layer: int, expert: int) -> list[dict[str, Any]]:
        return [
            {
                "token": tokens[token],
                "lift": round(float(ratio[layer, expert, token]), 2),
                "taken": round(float(taken[layer, expert, token]), 3),
            }
            for token, beyond in zip(best.indices[layer, expert].tolist(), best.values[layer, expert], strict=True)
            if beyond > 0
        ]

    return [[of_expert(layer, expert) for expert in range(counts.shape[1])] for layer in range(len(counts))]


def load(work: Tensor) -> list[dict[str, Any]]:
    """Of choices or shares (L, E), per layer: shares, busiest over mean, entropy over that of balance, idle ones."""
    shares, ratios, entropies = work / work.sum(-1, keepdim=True), max_load_ratio(work), load_entropy_ratio(work)
    return [
        {
            "shares": [round(share, 5) for share in shares[layer].tolist()],
            "max_load_ratio": round(float(ratios[layer]), 4),
            "entropy_ratio": round(float(entropies[layer]), 5),
            "idle": int((work[layer] == 0).sum()),
        }
        for layer in range(len(work))
    ]


@dataclass(frozen=True)
class CausalMap:
    """What silencing each expert costs on the same windows: nats per token and its standard error, (L, E)."""

    baseline: float
    num_windows: int
    cost: Tensor
    error: Tensor


def causal_map(model: Transformer, inputs: Tensor, targets: Tensor) -> CausalMap:
    """Loss with each expert silenced, minus without, on windows (W, T). Its tokens go to their next choice.

    The difference is taken window by window, so that what makes a window hard cancels; the error is that of the mean.
    On two levels a group that cannot give a token its share any more is passed over, and the cost is the whole group's.
    """
    config = model.config
    baseline = window_losses(model, inputs, targets)
    cost = torch.zeros(config.num_layers, config.num_experts, dtype=torch.float64)
    error = torch.zeros_like(cost)
    for layer in range(config.num_layers):
        for expert in range(config.num_experts):
            disabled = torch.zeros(1, *cost.shape, dtype=torch.bool, device=inputs.device)
            disabled[0, layer, expert] = True
            difference = window_losses(model, inputs, targets, disabled) - baseline
            cost[layer, expert] = difference.mean()
            error[layer, expert] = difference.std() / len(inputs) ** 0.5 if len(inputs) > 1 else torch.nan
    return CausalMap(float(baseline.mean()), len(inputs), cost, error)


@torch.inference_mode()
def window_losses(model: Transformer, inputs: Tensor, targets: Tensor, disabled: Tensor | None = None) -> Tensor:
    """Nats per token of each window: (W, T) -> (W), float64 on the CPU."""
    losses, at_once = [], windows_at_once(model.config)
    for x, y in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        logits, _ = model(x, disabled)
        losses.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none").double().mean(1).cpu())
    return torch.cat(losses)
