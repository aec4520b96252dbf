"""What a checkpoint says of itself: the files that serving reads, the training record and a model card."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from model import checkpoint, weights
from model.config import MAX_POSITIONS, ModelConfig
from model.generate import generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.config import CHOICES, BadConfig
from training.corpora import VALIDATION_SHA256, Corpus

KNOWN_TOKENS = 64
KNOWN_PROMPTS = ("ROMEO:\n", "KING HENRY:\n", "First Citizen:\n", "The ")

_NUMBERS = ("steps", "tokens", "seconds", "validation_loss", "validation_windows", "bits_per_character", "bigram_loss")
_NUMBERS_OF_A_POINT = ("step", "train_loss", "validation_loss")


def require_trained(folder: Path, facts: dict[str, Any]) -> None:
    """Raises CheckpointError for a record that no training wrote: serving needs less than a resume and a report do."""
    config, curve = facts.get("config"), facts.get("loss_curve")
    is_sound = {
        **{name: _is_number(facts.get(name)) for name in (*_NUMBERS, "max_load")},
        "milestones": isinstance(facts.get("milestones"), dict),
        "routing_baseline": isinstance(facts.get("routing_baseline"), list),
        "corpus.sha256": isinstance(facts["corpus"].get("sha256"), dict),
        "config": isinstance(config, dict)
        and all(_is_number(config.get(name)) for name in ("steps", "batch_size", "seed"))
        and config.get("tokenizer") in CHOICES["tokenizer"],
        "loss_curve": isinstance(curve, list)
        and curve != []
        and all(isinstance(at, dict) and all(_is_number(at.get(name)) for name in _NUMBERS_OF_A_POINT) for at in curve),
    }
    if lacking := [name for name, sound in is_sound.items() if not sound]:
        path = folder / checkpoint.RECORD
        raise checkpoint.CheckpointError(f"{path} has no sound {', '.join(lacking)}, so no training here wrote it")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def require_text_of(loaded: checkpoint.Checkpoint, corpus: Corpus) -> None:
    """Raises BadConfig if a checkpoint was trained on another text, whatever the names of the two."""
    if loaded.training["corpus"].get("sha256") != corpus.digests:
        raise BadConfig(f"{loaded.manifest.folder} was trained on another text than {corpus.name}; name its own")


def as_served(model: Transformer) -> Transformer:
    """A copy whose weights went through bfloat16, as they will have when they come back from disk."""
    rounded = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return rounded


def serving_files(model: Transformer, tokenizer: Tokenizer, facts: dict[str, Any]) -> dict[str, bytes]:
    """Every file that serving reads, for a model as it is served."""
    full = {"format": checkpoint.FORMAT, **facts, "known_answer": known_answer(model, tokenizer)}
    generation = {"do_sample": True, "temperature": 0.8, "max_length": MAX_POSITIONS}
    return {
        checkpoint.WEIGHTS: weights.dump(model),
        checkpoint.CONFIG: _json(model.config.to_hf()),
        checkpoint.RECORD: _json(full),
        "generation_config.json": _json(generation),
        **tokenizer.files(),
    }


@torch.inference_mode()
def known_answer(model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """A prompt with its greedy continuation, which a server compares before it serves.

    Of a few prompts the one is taken whose closest decision was clearest, so that another summation order on another
    machine does not flip it.
    """
    spelled = [text for text in (tokenizer.fold(prompt) for prompt in KNOWN_PROMPTS) if text] or [tokenizer.tokens[0]]
    answers = []
    for prompt in spelled:
        prompt_ids = tokenizer.encode(prompt)
        ids = generate(model, prompt_ids, KNOWN_TOKENS)
        logits, _ = model(torch.tensor([prompt_ids + ids[:-1]], device=model.device))
        best = logits[0, len(prompt_ids) - 1 :].topk(min(2, tokenizer.vocab_size)).values
        margin = float((best[:, 0] - best[:, -1]).min())
        answers.append({"prompt": prompt, "ids": ids, "margin": round(margin, 6)})
    return max(answers, key=lambda answer: answer["margin"])


def card(name: str, config: ModelConfig, facts: dict[str, Any], text: str) -> str:
    """A short model card in Markdown; ``python -m training report`` writes the long one."""
    sample = f"## A sample, temperature 0.8\n\n{code_block(text)}\n"
    return "\n\n".join((introduction(name, config, facts), training_section(config, facts), sample))


def code_block(text: str) -> str:
    fence = code_fence(text, shortest=3)
    return f"{fence}\n{text.strip()}\n{fence}"


def code_fence(text: str, shortest: int = 1) -> str:
    """The backticks to put around a text in Markdown: more than it has in a row itself."""
    return "`" * max(shortest, 1 + max(map(len, re.findall("`+", text)), default=0))


def introduction(name: str, config: ModelConfig, facts: dict[str, Any]) -> str:
    """What the model is, and its shape."""
    units = {"character": "one character", "byte": "one byte", "bpe": "a few letters"}
    written = units[facts["config"]["tokenizer"]]
    kind_of_model, experts = "dense", f"a feed-forward network of width {config.expert_size} in every layer"
    if config.num_experts > 1:
        kind_of_model = "sparse mixture-of-experts"
        experts = (
            f"{config.num_experts} experts of width {config.expert_size} in every layer, "
            f"{config.experts_per_token} for each token"
        )
    return f"""# {name}

A {kind_of_model} language model that writes {written} at a time. It continues text in the manner of its
corpus; it is no assistant, knows no facts and follows no instructions.

- {config.num_parameters:,} parameters, {config.num_active_parameters:,} of them at work for each token
- {config.num_layers} layers of width {config.hidden_size}
- {config.num_heads} query heads of {config.head_dim} that share {config.num_kv_heads} heads for keys and values
- {experts}
- attention over the last {config.context_length} positions; {config.vocab_size} tokens"""


def training_section(config: ModelConfig, facts: dict[str, Any]) -> str:
    """What the run cost and reached."""
    minutes = facts["seconds"] / 60
    bits, bigram = facts["bits_per_character"], facts["bigram_loss"]
    lines = [
        f"- corpus `{facts['corpus']['name']}`; "
        f"{facts['steps']:,} steps, {facts['tokens']:,} tokens, {minutes:.0f} minutes",
        f"- validation loss **{facts['validation_loss']:.4f}** nats per token over {facts['validation_windows']} "
        f"exact windows of\n  {config.context_length} inputs, with the weights as they are in this folder "
        "(rounded to bfloat16)",
        f"- {bits:.4f} bits per character; counts of token pairs reach {bigram:.4f} nats per token",
    ]
    lines += [
        f"- below {milestone} nats per character by step {at['step']:,}, "
        f"after {at['tokens']:,} tokens and {at['seconds'] / 60:.1f} minutes"
        for milestone, at in facts["milestones"].items()
        if facts["corpus"]["sha256"].get("validation") == VALIDATION_SHA256  # published ones, of this text
    ]
    lines += [
        f"- resumed at step {at['step']:,} with {at['to']:,} steps to make instead of {at['from']:,}, and the learning "
        "rates\n  of that: a run that makes them from the first ends with other weights"
        for at in facts.get("extended", [])
    ]
    if config.num_experts > 1:
        load = facts["max_load"]
        lines.append(f"- the busiest expert of the worst balanced layer takes {load:.2f} times the mean load")
    return (
        "## Training\n\n"
        + "\n".join(lines)
        + """

`training.json` has the whole record: settings, loss curve, digests of the corpus, and each expert's share of the work
on the validation text."""
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
