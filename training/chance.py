"""What is random while a model trains: noise and jitter in the router, dropout, and an expert's limited capacity.

Every number is a function of (seed, step, layer, purpose, place in the global batch), never of a generator that others
draw from: it does not depend on how many processes share the batch or on what was computed before.

Letters: B sequences of this process, T time, N = B * T tokens, C channels, E experts, K experts per token, F expert
size, A = N * K assignments, M rows of the experts' sorted layout, G groups (none unless there are two levels).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.router import Noise, Routing
from model.sampling import uniform
from training.config import TrainingConfig


def noise_weights(config: TrainingConfig, shape: ModelConfig, device: torch.device) -> dict[str, nn.Parameter]:
    """W_noise of every layer's router, (E + G, C) of zeros as in Shazeer et al. 2017, appendix A; empty without noise.

    They are training's own: a model that is served has none.
    """
    if config.router_noise != "gaussian":
        return {}
    rows = shape.num_experts + (shape.num_groups if shape.num_groups > 1 else 0)
    return {
        _noise_name(index): nn.Parameter(torch.zeros(rows, shape.hidden_size, device=device))
        for index in range(shape.num_layers)
    }


def chance_in(
    config: TrainingConfig, noise: Mapping[str, Tensor], step: int, x: Tensor, first_row: int = 0
) -> StepChance | None:
    """The chance in a step on inputs x (B, T) that begin at row first_row of the global batch; None if nothing is."""
    if not (config.dropout or config.expert_dropout or config.capacity_factor or config.router_noise != "none"):
        return None
    places = first_row * x.shape[1] + torch.arange(x.numel(), device=x.device)
    return StepChance(config, noise, step, x.shape[1], first_row, places)


def _noise_name(layer: int) -> str:
    return f"layers.{layer}.moe.router.noise"


@dataclass(frozen=True)
class StepChance:
    """One step of one process: sequences of ``length`` tokens, first_row and places (N,) those in the global batch."""

    config: TrainingConfig
    noise: Mapping[str, Tensor]
    step: int
    length: int
    first_row: int
    places: Tensor

    def layer(self, index: int) -> ChanceOfLayer:
        return ChanceOfLayer(self, index)


@dataclass(frozen=True)
class ChanceOfLayer:
    """What ``model.chance.LayerChance`` asks for."""

    of: StepChance
    index: int

    def jitter(self, x: Tensor) -> Tensor:
        """Times U(1 - eps, 1 + eps) (Fedus et al. 2021, appendix C)."""
        config = self.of.config
        if config.router_noise != "jitter":
            return x
        return x * (1 - config.jitter + 2 * config.jitter * self._uniform("jitter", self.of.places, x.shape[-1]).to(x))

    def router_noise(self, x: Tensor) -> Noise | None:
        """A standard normal times softplus(x W_noise) (Shazeer et al. 2017, eq. 4)."""
        if self.of.config.router_noise != "gaussian":
            return None
        std = F.softplus(F.linear(x.float(), self.of.noise[_noise_name(self.index)]))
        # Half a step up, and never 1: the normals of 0 and 1 are infinite.
        drawn = (self._uniform("noise", self.of.places, std.shape[-1]) + 2.0**-54).clamp(max=1 - 2.0**-53)
        return Noise(torch.special.ndtri(drawn).to(std) * std, std)

    def drop_update(self, update: Tensor, source: str) -> Tensor:
        """Dropout of what is added to the residual stream (Srivastava et al. 2014)."""
        rate = self.of.config.dropout
        return update * self._kept(source, update.shape[-1], rate).view_as(update) if rate else update

    def drop_hidden(self, hidden: Tensor, row_of: Tensor) -> Tensor:
        """Dropout inside the experts (Fedus et al. 2021, section 2.4), by token and choice rather than by row."""
        rate = self.of.config.expert_dropout
        if not rate:
            return hidden
        choices = row_of.numel() // self.of.places.numel()
        kept = torch.ones_like(hidden)
        kept[row_of] = self._kept("expert", choices * hidden.shape[-1], rate).view(-1, hidden.shape[-1])
        return hidden * kept

    def within_capacity(self, routing: Routing) -> Routing:
        factor = self.of.config.capacity_factor
        if not factor:
            return routing
        has_room = has_room_for(routing.expert_ids, routing.logits.shape[-1], self.of.length, factor)
        return replace(routing, expert_weights=routing.expert_weights * has_room)

    def _kept(self, purpose: str, width: int, rate: float) -> Tensor:
        """0 with probability rate, else 1 / (1 - rate): (N, width). The rate is rounded to a multiple of 2^-16.

        A mask has a hundred times the numbers of a router, so they come from torch's generator, one for each sequence.
        A CPU's and a GPU's differ.
        """
        size = self.of.length * width
        shape = (len(self.of.places) // self.of.length, -(-size // 4))
        bits = torch.empty(shape, dtype=torch.int64, device=self.of.places.device)
        generator = torch.Generator(bits.device)
        for row, sequence in enumerate(bits):
            stream = self._stream(f"{purpose} {self.of.first_row + row}")
            sequence.random_(-(2**63), None, generator=generator.manual_seed(stream))
        kept = bits.view(torch.int16)[:, :size] >= round(rate * 2**16) - 2**15
        return kept.float().div_(1 - rate).view(-1, width)

    def _uniform(self, purpose: str, places: Tensor, width: int) -> Tensor:
        """Numbers in [0, 1), float64: (len(places), width)."""
        numbers = places.unsqueeze(-1) * width + torch.arange(width, device=places.device)
        return uniform(torch.tensor(self._stream(purpose), device=places.device), numbers)

    def _stream(self, purpose: str) -> int:
        key = f"{self.of.config.seed} {self.of.step} {self.index} {purpose}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), signed=True)


def has_room_for(expert_ids: Tensor, num_experts: int, length: int, factor: float) -> Tensor:
    """Which assignments find room: every expert takes the first capacity of a sequence's, in the order of position.

    Its capacity is factor x its even share of the sequence's assignments, rounded up (Fedus et al. 2021, eq. 3, by
    sequence as in GShard's groups, so that it does not matter who shares the batch). (N, K) -> (N, K) of bool.
    """
    most = length * expert_ids.shape[-1]
    # Not in floats: a product may round above a whole number.
    capacity = min(math.ceil(Fraction(str(factor)) * most / num_experts), most)
    sequence = torch.arange(expert_ids.shape[0], device=expert_ids.device) // length
    queue = (sequence.unsqueeze(-1) * num_experts + expert_ids).flatten()  # one for each sequence and expert
    order = queue.argsort(stable=True)
    queued = queue[order]
    ahead = torch.empty_like(queue)
    ahead[order] = torch.arange(queue.numel(), device=queue.device) - torch.searchsorted(queued, queued)
    return (ahead < capacity).view_as(expert_ids)
