"""The ranks that train one model together under ``torchrun``, and all that they tell one another. Knows no training.

A process by itself is the only rank, and never touches torch.distributed. Several machines need a shared runs folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from model.router import Routing
from training import Refused


class RankLost(Refused):
    """Another rank has died, so this one cannot go on. One sentence."""


class FirstFailed(Refused):
    """The first rank could not do what the others waited for, and says so itself."""


class NoRanks(Refused):
    """The environment does not tell of ranks as torchrun does, or they cannot meet. One sentence."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Every method that talks must be called by all ranks, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says of this process; one rank alone where it says nothing. Raises NoRanks."""
        if "LOCAL_RANK" not in os.environ:
            return cls()
        said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        if not all(value.isdecimal() for value in said.values()):
            found = ", ".join(f"{name}={value}" for name, value in said.items())
            raise NoRanks(f"the environment has {found!r}; start several ranks by torchrun, and one without LOCAL_RANK")
        return cls(*map(int, said.values()))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the others, over gloo on a CPU and NCCL on GPUs; needed before any method that talks. Raises NoRanks."""
        if self.size == 1:
            return
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise NoRanks(f"the {self.size} ranks cannot meet ({reason}); start them all by torchrun") from None

    def leave(self) -> None:
        """End this process in order, if it is one of several; the last thing that it does.

        Neither the group's destructor nor Python's shutdown is run: gloo's threads let go of their last tensors when
        they come to it, and one that asks a Python which is shutting down for its lock takes the process with it.
        """
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    @contextmanager
    def first_goes_ahead(self, device: torch.device) -> Iterator[None]:
        """The first rank does the body, then all others: what it downloaded is there for them.

        Raises FirstFailed on the others if the first raised; they have nothing to add.
        """
        if not self.is_first and self.any(False, device):
            raise FirstFailed
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.is_first:
                self.any(failed, device)

    def rows(self, batch_size: int) -> slice:
        """Which rows of the global batch are this rank's."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: float, device: torch.device) -> float:
        return self._sum(value, device) / self.size

    def any(self, value: bool, device: torch.device) -> bool:
        return self._sum(float(value), device) > 0

    def from_first(self, value: float, device: torch.device) -> float:
        """The first rank's value, whatever the others gave."""
        return self._sum(value if self.is_first else 0.0, device)

    def _sum(self, value: float, device: torch.device) -> float:
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=device)
        with _peers_alive():
            dist.all_reduce(told)
        return told.item()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the ranks, in one exchange."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _peers_alive():
            dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def divide(self, work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """work(stack) for a work that treats every row by itself, (n, ...) -> (n, ...): each rank does a part of it."""
        if self.size == 1:
            return work(stack)
        num_missing = -len(stack) % self.size  # for equal parts
        rows = torch.cat([stack, stack.new_zeros(num_missing, *stack.shape[1:])])
        return self._all(work(rows[self.rows(len(rows))]))[: len(stack)]

    def _all(self, mine: Tensor) -> Tensor:
        """(n, ...) on each rank -> (size * n, ...) on all."""
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with _peers_alive():
            dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    def gather(self, routings: Sequence[Routing]) -> Sequence[Routing]:
        """Each layer's routing of the global batch, its rows in global order: N / size tokens here -> N tokens.

        A balance loss is no mean over tokens, so the ranks' losses do not average to the global one. From gathered
        routings every rank computes that one itself, whatever its formula; gradients flow to the ranks' own rows.
        """
        if self.size == 1:
            return routings
        return [self._gathered(routing) for routing in routings]

    def _gathered(self, part: Any) -> Any:
        """Every tensor of a dataclass, and of the dataclasses in it; what is None stays so."""
        if part is None:
            return None
        if isinstance(part, Tensor):
            return cast("Any", _Gather).apply(part, self)
        return replace(part, **{field.name: self._gathered(getattr(part, field.name)) for field in fields(part)})


class _Gather(torch.autograd.Function):
    """(n, ...) on each rank -> (size * n, ...) on all."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks._all(mine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Own rows, times size: all ranks compute the same loss, and average_gradients divides by size."""
        rows: slice = ctx.ranks.rows(len(gradients[0]))
        return gradients[0][rows] * ctx.ranks.size, None


@contextmanager
def _peers_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of a closed connection, gloo raises nothing more special
        reason = str(error).splitlines()[0]
        raise RankLost(f"another rank is gone ({reason}); start all again with --resume") from None


ALONE = Ranks()
