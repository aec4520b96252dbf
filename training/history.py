"""What a run remembers of itself from step to step and from one interruption to the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from model.config import ModelConfig

# makeMoE's best and nanoGPT's GPU configuration, both on tiny Shakespeare, in nats per character: a run notes when it
# passes them.
MILESTONES = (1.7439, 1.4697)


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of one token's training step, forward and backward: 6 N + 12 L H Q T.

    PaLM (Chowdhery et al. 2022), appendix B, with N the active parameters. As there, attention is counted over the
    whole window; a look-up in the embedding multiplies nothing and is left out.
    """
    multiplied = config.num_active_parameters - config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_dim * config.context_length
    return 6 * multiplied + 12 * attention


@dataclass
class History:
    """seconds are those of the training steps alone; best is the step of the lowest validation loss; extended is where
    a run was resumed with another number of steps, to which its learning rates then fell."""

    step: int = 0
    seconds: float = 0.0
    loss_curve: list[dict[str, float]] = field(default_factory=list)
    milestones: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict[str, float] | None = None
    extended: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def from_record(cls, facts: dict[str, Any]) -> History:
        """All but best: of the steps on record, not all are still there."""
        extended = facts.get("extended", [])
        return cls(facts["steps"], facts["seconds"], facts["loss_curve"], facts["milestones"], extended=extended)

    def as_record(self) -> dict[str, Any]:
        record = asdict(self)
        return {"steps": record.pop("step"), "seconds": round(record.pop("seconds"), 1), **record}

    def remember(
        self, train_loss: float, validation_loss: float, tokens: int, flops: int, *, tokens_per_character: float = 1.0
    ) -> dict[str, float]:
        """Note an evaluation at the current step; return its point of the curve."""
        point = {
            "step": self.step,
            "train_loss": round(train_loss, 5),
            "validation_loss": round(validation_loss, 5),
        }
        self.loss_curve.append(point)
        self.best = lowest([*([self.best] if self.best else []), point])
        reached = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), "flops": flops}
        for milestone in MILESTONES:
            if validation_loss * tokens_per_character < milestone:
                self.milestones.setdefault(str(milestone), reached)
        return point


def lowest(curve: list[dict[str, float]]) -> dict[str, float]:
    """Step and loss of the first point of the lowest validation loss."""
    best = min(curve, key=lambda point: point["validation_loss"])
    return {"step": best["step"], "validation_loss": best["validation_loss"]}
