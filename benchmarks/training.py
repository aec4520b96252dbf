"""``python -m benchmarks.training``: how fast a model trains, and how much of that is the price of being sparse.

A step is forward, backward and optimizer on random tokens, without the balance losses, which multiply no matrices.
Everything takes its turn in every round, and ratios are of one round: a machine that slows down slows both sides. Each
model has a process of its own, as when it is trained.
Prints a table for people and one JSON line for machines, which is also kept in benchmarks/results/.

Letters: N tokens, T context_length, C channels, V vocabulary, L layers, E experts, K experts per token, F expert size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import Result, command_line, take
from model.chance import LayerChance
from model.config import ModelConfig
from model.experts import Experts
from model.router import Routing
from model.transformer import Transformer
from training import config as configs
from training.config import TrainingConfig
from training.optimizer import POLAR_EXPRESS, Optimizer, is_matrix
from training.process import with_patient_malloc
from training.products import fast_products

VOCABULARY = 65  # tiny Shakespeare's
Seconds = dict[str, list[float]]


class DenseLayer(nn.Module):
    """What a dense model has in place of the mixture: one SwiGLU network for all tokens. Nothing is routed or sorted.

    Its weights have the names of an expert's, by which the optimizer tells matrices.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.experts = nn.ParameterDict(
            {"gate_up": torch.empty(2, size, channels), "down": torch.empty(channels, size)}
        )

    def forward(self, x: Tensor, disabled: None, chance: None) -> tuple[Tensor, None]:
        """x (B, T, C) -> (B, T, C), and no routing."""
        gate, up = F.linear(x, self.experts["gate_up"].flatten(0, 1)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.experts["down"]), None


def sorted_slices(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The back end that sorts by expert, as ``Experts.forward`` does, and multiplies slice after slice. -> (N, C)"""
    order = routing.expert_ids.flatten().argsort(stable=True)
    counts = torch.bincount(routing.expert_ids.flatten(), minlength=experts.num_experts).tolist()
    outputs = []
    for expert, rows in enumerate(x[order // routing.expert_ids.shape[1]].split(counts)):
        gate, up = F.linear(rows, experts.gate_up[expert].flatten(0, 1)).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, experts.down[expert]))
    per_choice = torch.cat(outputs)[order.argsort()].unflatten(0, (len(x), -1))  # (N, K, C)
    combined: Tensor = (per_choice * routing.expert_weights.unsqueeze(-1)).sum(dim=1)
    return combined


BACK_ENDS: dict[str, Callable[[Experts, Tensor, Routing], Tensor]] = {
    "grouped_mm": Experts.forward,
    "sorted_slices": sorted_slices,
    "loop": Experts.reference,
}


def _through(back_end: str, experts: Experts) -> Callable[[Tensor, Routing, LayerChance | None], Tensor]:
    """The experts' forward pass by one of the back ends, which know nothing of a training's chance."""
    return lambda x, routing, chance: BACK_ENDS[back_end](experts, x, routing)


@cache
def _squares(side: int) -> Tensor:
    return torch.randn(2, side, side)


class Subject:
    """A model, its optimizer and one batch. A mixture of one expert is built as the dense model that it computes."""

    def __init__(self, config: ModelConfig, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(config)
        if config.num_experts == 1:
            for layer in self.model.layers:
                layer.register_module("moe", DenseLayer(config.hidden_size, config.expert_size))
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.optimizer = Optimizer(self.model, TrainingConfig())
        self.ids = torch.randint(config.vocab_size, (batch_size, config.context_length))

    def forward_backward(self, back_end: str = "grouped_mm") -> None:
        for layer in self.model.layers if self.model.config.num_experts > 1 else ():
            layer.moe.experts.forward = _through(back_end, layer.moe.experts)  # type: ignore[assignment, method-assign]
        for parameter in self.model.parameters():
            parameter.grad = None
        logits, _ = self.model(self.ids)
        F.cross_entropy(logits.flatten(0, 1), self.ids.flatten()).backward()

    def update(self) -> None:
        """With the gradients of the last ``forward_backward``; a factor of 0 keeps the weights, and so the routing."""
        self.optimizer.step(0, factor=0.0)

    def multiply(self, side: int) -> None:
        """Two square matrices, for what this machine can do."""
        torch.mm(*_squares(side))

    @property
    def flops(self) -> int:
        """Of the products of one step, 2 for a multiplication with its addition; gathers and norms count as nothing.

        Each weight that a token meets multiplies once forward and twice backward, and so do queries with the T/2 keys
        that a token sees on average, and their scores with values. What the kernels compute anew is not counted.
        """
        config = self.model.config
        attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
        attention += config.num_heads * config.head_dim * 2 * config.context_length // 2
        experts = config.experts_per_token * 3 * config.hidden_size * config.expert_size
        router = config.hidden_size * config.num_experts if config.num_experts > 1 else 0
        layer = attention + experts + router
        per_token = config.num_layers * layer + config.hidden_size * config.vocab_size
        named = self.model.named_parameters()
        return 3 * 2 * self.ids.numel() * per_token + sum(_muon_flops(p.shape) for name, p in named if is_matrix(name))


def _muon_flops(shape: torch.Size) -> int:
    """Each iteration multiplies x x^T, its square, and the polynomial with x, for every matrix of a stack."""
    small, large = sorted(shape[-2:])
    return len(POLAR_EXPRESS) * shape[:-2].numel() * 2 * (2 * small * small * large + small**3)


_subject: Subject | None = None  # of this process, if it is one of a Worker's


def _prepare(threads: int, config: ModelConfig, batch_size: int) -> None:
    global _subject
    torch.set_num_threads(threads)
    _subject = Subject(config, batch_size)


def _seconds(task: str, *arguments: Any) -> float:
    """What a task of this process's subject takes, with its products as a run multiplies them."""
    with fast_products(torch.device("cpu")):
        started = time.perf_counter()
        getattr(_subject, task)(*arguments)
        return time.perf_counter() - started


class Worker:
    """A subject in a process of its own, as it trains: in one heap, models give each other's tensors cold places."""

    def __init__(self, threads: int, config: ModelConfig, batch_size: int) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(threads, config, batch_size)
        )

    def task(self, name: str, *arguments: Any) -> Callable[[], float]:
        return lambda: self._pool.submit(_seconds, name, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def measure(arguments: argparse.Namespace) -> Result:
    """Medians over the rounds, times in milliseconds."""
    training = configs.from_preset(arguments.preset, {})
    config = training.model_config(VOCABULARY)
    active = config.experts_per_token * config.expert_size
    narrow = replace(config, num_layers=min(2, config.num_layers), expert_size=32)
    shapes = {
        "sparse": config,
        "dense": replace(config, num_experts=1, experts_per_token=1, expert_size=active),
        **{f"{count}": replace(narrow, num_experts=count) for count in arguments.experts},
    }
    workers = {name: Worker(arguments.threads, shape, training.batch_size) for name, shape in shapes.items()}
    tasks = {
        "gemm": workers["sparse"].task("multiply", arguments.gemm),
        **{name: workers["sparse"].task("forward_backward", name) for name in reversed(BACK_ENDS)},
        "optimizer": workers["sparse"].task("update"),
    }
    for name in list(shapes)[1:]:
        tasks |= {name: workers[name].task("forward_backward"), f"{name}_optimizer": workers[name].task("update")}
    try:
        seconds = in_turn(tasks, arguments.rounds)
    finally:
        for worker in workers.values():
            worker.close()
    sparse = Subject(config, training.batch_size)
    return {
        "tokens_per_step": sparse.ids.numel(),
        "step_gflop": round(sparse.flops / 1e9, 2),
        **figures(seconds, sparse.ids.numel(), sparse.flops, 2 * arguments.gemm**3),
        "step_ms_by_experts": {
            f"{count}": _ms(_steps(seconds, f"{count}", f"{count}_optimizer")) for count in arguments.experts
        },
    }


def in_turn(tasks: dict[str, Callable[[], float]], rounds: int) -> Seconds:
    """The seconds of each task in each round, after two rounds to warm up: the second still grows the heap."""
    turns = [{name: task() for name, task in tasks.items()} for _ in range(rounds + 2)][2:]
    return {name: [turn[name] for turn in turns] for name in tasks}


def figures(seconds: Seconds, tokens: int, flops: int, gemm_flops: int) -> dict[str, Any]:
    steps = _steps(seconds, "grouped_mm", "optimizer")
    share = statistics.median(
        flops / step * gemm / gemm_flops for step, gemm in zip(steps, seconds["gemm"], strict=True)
    )
    return {
        "characters_per_second": round(tokens / statistics.median(steps), 1),
        "step_ms": _ms(steps),
        "gemm_gflops": round(gemm_flops / statistics.median(seconds["gemm"]) / 1e9, 1),
        "gemm_peak_share": round(share, 4),
        "forward_backward_ms": {name: _ms(seconds[name]) for name in (*BACK_ENDS, "dense")},
        "over_dense": {name: _ratio(seconds[name], seconds["dense"]) for name in BACK_ENDS},
        "optimizer_ms": {"sparse": _ms(seconds["optimizer"]), "dense": _ms(seconds["dense_optimizer"])},
        "optimizer_share": _ratio(seconds["optimizer"], steps),
    }


def _steps(seconds: Seconds, *parts: str) -> list[float]:
    return [sum(turn) for turn in zip(*(seconds[part] for part in parts), strict=True)]


def _ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1000, 2)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 4)


def table(result: Result) -> str:
    lines = [
        "{preset}, {threads} threads, torch {torch}: {characters_per_second:,.0f} characters/s",
        "a step of {tokens_per_step:,} took {step_ms:,.0f} ms, {gemm_peak_share:.1%} of {gemm_gflops:,.0f} GFLOP/s",
        "the optimizer's share of it: {optimizer_share:.1%}",
    ]
    text = [line.format_map(result) for line in lines]
    for name, ms in result["forward_backward_ms"].items():
        text.append(f"forward and backward, {name:13} {ms:9,.1f} ms, {result['over_dense'].get(name, 1):.2f} x dense")
    text += [f"a narrow step, {count:>5} experts {ms:9,.1f} ms" for count, ms in result["step_ms_by_experts"].items()]
    return "\n".join(text)


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.training", "How fast a model trains.", of_checkpoint=False)
    parser.add_argument("--preset", choices=configs.preset_names(), default="shakespeare")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="in which everything takes its turn")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 1024], metavar="N", help="of 32 units each")
    parser.add_argument("--gemm", type=int, default=2048, metavar="N", help="the side of the peak's square matrices")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    with_patient_malloc("benchmarks.training")  # as `python -m training` has it
    return 0 if take("training", arguments, measure, table) else 1


if __name__ == "__main__":
    sys.exit(main())
