"""Muon for the matrices inside the layers, AdamW for everything else; one object, one state that can be saved exactly.

Letters: n matrices of one shape, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from model.transformer import Transformer
from training.config import TrainingConfig
from training.parallel import ALONE, Ranks

# The first four steps of Polar Express (Amsel et al. 2025, arXiv 2505.16932, for a lower bound of 1e-3 on the singular
# values): odd polynomials a x + b x^3 + c x^5, each the best possible after those before it.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)


def polar_factor(matrices: Tensor) -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition U S V^T: (n, O, I) -> (n, O, I), in float32."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose update is made orthogonal (Jordan et al. 2024), for many matrices of many shapes.

    A parameter with more than two dimensions is a stack of matrices. Momentum rises from 0.85 to 0.95 over the first
    200 steps; the step of a matrix is scaled by sqrt(max(1, O / I)). It is as long
    whatever the gradient's size: an expert that one token chose moves as far as one that a thousand did, and one that
    none chooses any more goes on along its last direction for some two hundred steps. Ranks share the work of
    orthogonalising, which is that of all matrices whatever a rank's part of the batch, and each has every matrix's
    momentum.
    """

    def __init__(
        self, named: Mapping[str, Tensor], learning_rate: float, weight_decay: float, ranks: Ranks = ALONE
    ) -> None:
        self._named = named
        self._ranks = ranks
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in named.items()}

    def step(self, number: int, factor: float) -> None:
        beta = 0.85 + 0.10 * min(1.0, number / 200)
        rate = self._learning_rate * factor
        for names in self._by_shape():
            directions = torch.cat([self._direction(name, beta) for name in names])  # (n, O, I)
            scale = rate * max(1.0, directions.shape[-2] / directions.shape[-1]) ** 0.5
            updates = self._ranks.divide(polar_factor, directions)
            sizes = [len(_stack(self._named[name])) for name in names]
            for name, update in zip(names, updates.split(sizes), strict=True):
                parameter = self._named[name]
                parameter.mul_(1 - rate * self._weight_decay).sub_(update.view_as(parameter), alpha=scale)

    def _direction(self, name: str, beta: float) -> Tensor:
        """Nesterov's look-ahead of the momentum."""
        gradient = self._named[name].grad
        assert gradient is not None
        momentum = self.momentum[name].lerp_(gradient, 1 - beta)
        return _stack(gradient.lerp(momentum, beta))

    def _by_shape(self) -> Iterable[list[str]]:
        groups: dict[torch.Size, list[str]] = {}
        for name, parameter in self._named.items():
            groups.setdefault(parameter.shape[-2:], []).append(name)
        return groups.values()


def _stack(parameter: Tensor) -> Tensor:
    return parameter.reshape(-1, *parameter.shape[-2:])


class Optimizer:
    """Muon and AdamW under one learning-rate factor; ``state`` and ``restore`` are exact.

    clip_norm bounds the norm of all gradients together (Pascanu et al. 2013); 0 is no bound. Muon's step has the same
    size whatever the gradient's, so for the matrices a bound only keeps one bad batch from ruling their momentum.
    ``own`` are parameters that training has beside the model's; they are part of the state.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainingConfig,
        own: Mapping[str, Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._clip_norm = config.clip_norm
        self._own = dict(own or {})
        self._named = dict(model.named_parameters()) | self._own
        matrices = {name: parameter for name, parameter in self._named.items() if is_matrix(name)}
        self._muon = Muon(matrices, config.matrix_learning_rate, config.weight_decay, ranks)
        groups = [
            {"params": [p for name, p in self._named.items() if is_chooser(name)], "lr": config.head_learning_rate},
            {
                "params": [p for name, p in self._named.items() if not is_chooser(name) and not is_matrix(name)],
                "lr": config.embedding_learning_rate,
            },
        ]
        self._adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._peaks = [group["lr"] for group in self._adamw.param_groups]

    @torch.no_grad()
    def step(self, number: int, factor: float) -> None:
        """One update from the gradients, which are dropped. number counts from 0; factor scales every learning rate."""
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._named.values(), self._clip_norm)
        self._muon.step(number, factor)
        for group, peak in zip(self._adamw.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._adamw.step()
        for parameter in self._named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, besides the model's weights."""
        tensors = {f"muon.{name}": tensor for name, tensor in self._muon.momentum.items()}
        tensors |= {f"own.{name}": tensor.detach() for name, tensor in self._own.items()}
        for name, parameter in self._named.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"adamw.{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._own.items():
            parameter.copy_(tensors[f"own.{name}"])
        for name, momentum in self._muon.momentum.items():
            momentum.copy_(tensors[f"muon.{name}"])
        for name, parameter in self._named.items():
            if f"adamw.step.{name}" in tensors:
                self._adamw.state[parameter] = {
                    key: tensors[f"adamw.{key}.{name}"].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def is_matrix(name: str) -> bool:
    return (".attention." in name and "norm" not in name) or ".experts." in name


def is_chooser(name: str) -> bool:
    """What turns a state into choices: the head into tokens, a router into experts."""
    return name == "head.weight" or name.endswith(("router.weight", "router.group_weight", "router.noise"))


def schedule(step: int, num_steps: int, warmup_steps: int, warmdown_share: float) -> float:
    """The factor on every learning rate: up over warmup_steps, flat, and down to zero over the last warmdown_share."""
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    down = min(1.0, (num_steps - step) / (warmdown_share * num_steps)) if warmdown_share else 1.0
    return up * down
