"""What a run needs of memory at the least, so that one that cannot fit is refused before any work. Knows no text."""

from __future__ import annotations

import torch

from model.machine import usable_memory
from training.config import BadConfig, TrainingConfig
from training.parallel import ALONE, Ranks

FLOAT, ID = 4, 8
"""Bytes of a number and of a token's id."""


def least_bytes(config: TrainingConfig, num_ranks: int = 1) -> int:
    """What each rank holds whatever the text is: a lower bound, so that nothing is refused that could run.

    Weights, gradients and momentum of all but the vocabulary; the ids of the whole batch, beside where they come from;
    and of its own rows every layer's input, which the backward pass needs, and with it several times as much again.
    """
    shape = config.model_config(vocab_size=1)
    tokens = config.batch_size * shape.context_length
    kept = tokens // num_ranks * shape.num_layers * shape.hidden_size
    return 3 * FLOAT * shape.num_parameters + 2 * ID * tokens + FLOAT * kept


def room_for_a_rank(device: torch.device, ranks: Ranks = ALONE) -> int:
    """Bytes of the GPU that a rank has to itself, or its share of what this machine, or container, lends."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return usable_memory() // ranks.local_size


def require_room(config: TrainingConfig, room: int, num_ranks: int = 1) -> None:
    """Raises BadConfig."""
    needed = least_bytes(config, num_ranks)
    if needed > room:
        raise BadConfig(
            f"the model and one batch need at least {needed / 2**30:,.1f} GiB of memory, and there are "
            f"{room / 2**30:,.1f}; lower batch_size ({config.batch_size}) or the model's sizes"
        )
