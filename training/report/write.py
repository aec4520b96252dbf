"""Measures a checkpoint and writes what was found beside it: report.json, pictures and the model card.

None of these is in the manifest, so the checkpoint that serving reads stays what it was.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from training import runs
from training.baselines import bits_per_character
from training.config import BadConfig, TrainingConfig
from training.corpora import Corpus
from training.evaluate import spread_windows
from training.history import lowest
from training.record import require_text_of, require_trained
from training.report import experts, pictures
from training.report.card import card
from training.report.overlap import longest_overlap
from training.sample import from_a_new_line

CARD = "README.md"
PICTURES = ("loss.png", "load.png", "classes.png", "causal-map.png", "specialisation.gif")
SAMPLES, SAMPLE_LENGTH = 4, 500

# What a control need not share with its mixture: what is compared in another form, and what makes up experts, their
# choice and its balance.
TOLD_OTHERWISE = {
    *("corpus", "items", "tokenizer", "bpe_vocab_size", "shape", "evaluate_every"),
    *("balance_weight", "z_weight", "importance_weight", "load_weight", "router_noise", "jitter", "capacity_factor"),
}
OF_EXPERTS = {
    *("num_experts", "experts_per_token", "expert_size", "activation"),
    *("num_groups", "groups_per_token", "gates_over"),
}


def write(
    loaded: Checkpoint, corpus: Corpus, output: Path, *, windows: int, run: Path | None, control: Path | None
) -> dict[str, Any]:
    """Measure and write.

    Raises BadConfig when the text, the run or the control belongs to another training, or an earlier report is damaged;
    CheckpointError when no training wrote the record.
    """
    facts = loaded.training
    require_trained(loaded.manifest.folder, facts)
    require_text_of(loaded, corpus)
    is_its_own = output.resolve() == loaded.manifest.folder.resolve()
    if not is_its_own and (output / CARD).exists() and not (output / runs.REPORT).exists():
        raise BadConfig(f"{output / CARD} is no report's, and would be lost; name another --output")
    runs.require_writable(output)
    earlier = _earlier(output, loaded)
    # What may refuse goes before what takes minutes.
    figures = control_figures(control, loaded) if control else earlier.get("control")
    specialisation = _specialisation(run, facts) if run else earlier.get("specialisation", [])
    num_tokens = len(loaded.tokenizer.encode(corpus.validation))
    report = {
        "fingerprint": loaded.manifest.fingerprint,
        **_results(facts, loaded.config, num_tokens, len(corpus.validation)),
        "control": figures,
        **_of_experts(loaded, corpus, windows),
        "specialisation": specialisation,
        **_of_text(loaded, corpus),
    }
    output.mkdir(parents=True, exist_ok=True)
    drawn = _pictures(facts, report)
    for name in PICTURES:
        if name in drawn:
            _replace(output / name, drawn[name])
        else:  # of an earlier report
            (output / name).unlink(missing_ok=True)
    _replace(output / CARD, card(loaded.manifest.name, loaded.config, facts, report).encode())
    _replace(output / runs.REPORT, (json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return report


def _replace(path: Path, content: bytes) -> None:
    """Whoever reads the file finds the old one or the new one, whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _earlier(output: Path, loaded: Checkpoint) -> dict[str, Any]:
    """An earlier report of the same weights: a control and a run are not at hand for ever, their figures are."""
    path = output / runs.REPORT
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise BadConfig(_DAMAGED.format(path=path, what=error)) from None
    if not isinstance(found, dict):
        raise BadConfig(_DAMAGED.format(path=path, what="no object"))
    return found if found.get("fingerprint") == loaded.manifest.fingerprint else {}


_DAMAGED = "{path} is damaged ({what}); delete it, and what it has of a run and a control, or name another --output"


def _results(facts: dict[str, Any], shape: ModelConfig, num_tokens: int, num_characters: int) -> dict[str, Any]:
    def in_bits(loss: float) -> dict[str, float]:
        return {"loss": loss, "bits_per_character": round(bits_per_character(loss, num_tokens, num_characters), 5)}

    best = lowest(facts["loss_curve"])
    return {
        "result": {"validation_loss": facts["validation_loss"], **_cost(facts), **_sizes(shape)},
        "final": in_bits(facts["validation_loss"]),
        "best": {"step": best["step"], **in_bits(best["validation_loss"])},
        "bigram": in_bits(facts["bigram_loss"]),
    }


def _cost(facts: dict[str, Any]) -> dict[str, Any]:
    return {"steps": facts["steps"], "tokens": facts["tokens"], "minutes": round(facts["seconds"] / 60, 1)}


def control_figures(folder: Path, mixture: Checkpoint) -> dict[str, Any]:
    """What a control of a mixture reached and cost. Raises BadConfig if what it was trained on was another."""
    control = checkpoint.load(folder)
    require_trained(folder, control.training)
    wanted = _trained_on(mixture)
    for what, value in _trained_on(control).items():
        if value != wanted[what]:
            raise BadConfig(f"{folder} had another {what} than this checkpoint, so it is no control of it")
    facts = control.training
    return {"validation_loss": facts["validation_loss"], **_cost(facts), **_sizes(control.config)}


def _trained_on(loaded: Checkpoint) -> dict[str, Any]:
    """The text and how it is spelled, the steps and how they were made, and the shape: all but the experts."""
    facts = loaded.training
    defaults = TrainingConfig().as_dict().items()  # an older run had those of what came later
    made = {what: facts["config"].get(what, default) for what, default in defaults if what not in TOLD_OTHERWISE}
    return {
        "text": facts["corpus"]["sha256"],
        "tokenizer": loaded.tokenizer.token_bytes,
        "number of steps": facts["steps"],  # of those that it planned, with which its rates fell
        "tokens": facts["tokens"],
        "number of validation windows": facts["validation_windows"],
        "history of being lengthened": facts.get("extended", []),
        **made,
        **{what: value for what, value in asdict(loaded.config).items() if what not in OF_EXPERTS},
    }


def _sizes(shape: ModelConfig) -> dict[str, int]:
    return {"parameters": shape.num_parameters, "active_parameters": shape.num_active_parameters}


def _of_experts(loaded: Checkpoint, corpus: Corpus, windows: int) -> dict[str, Any]:
    config, tokenizer = loaded.config, loaded.tokenizer
    ids = torch.tensor(tokenizer.encode(corpus.validation), device=loaded.model.device)
    inputs, targets = spread_windows(ids, config.context_length, windows)
    few = config.num_layers * config.num_experts <= experts.MOST_EXPERTS
    found: dict[str, Any] = {
        "tokens_counted": inputs.numel(),
        "load": experts.load(torch.tensor(checkpoint.read_baseline(loaded.manifest.folder, config))),
    }
    found["favourites"] = found["classes"] = found["causal_map"] = None
    if few and config.num_experts > 1:
        counts = experts.count_choices(loaded.model, inputs)
        found["classes"] = rounded(experts.lift(experts.by_class(counts, tokenizer.token_bytes)))
        found["favourites"] = experts.favourites(counts, tokenizer.tokens, config.experts_per_token)
    if few and config.num_experts > config.experts_per_token:
        found["causal_map"] = _as_figures(experts.causal_map(loaded.model, inputs, targets))
    return found


def _as_figures(found: experts.CausalMap) -> dict[str, Any]:
    return {
        "windows": found.num_windows,
        "baseline": round(found.baseline, 5),
        "cost": rounded(found.cost, 5),
        "standard_error": rounded(found.error, 5),
    }


def rounded(values: Tensor, digits: int = 3) -> Any:
    """Nested lists of a tensor's numbers; None for NaN, which JSON does not know."""
    if values.ndim:
        return [rounded(part, digits) for part in values.cpu()]
    return None if math.isnan(float(values)) else round(float(values), digits)


def _specialisation(run: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The lift of every class over training, from what the run noted at its evaluations up to this checkpoint."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise BadConfig(f"{run} has no metrics.jsonl; --run names the folder in which the checkpoint was trained")
    looks = [line for line in runs.read_metrics(run) if "validation_loss" in line and line["step"] <= facts["steps"]]
    found = [(look["step"], look["validation_loss"]) for look in looks[-1:]]
    if found != [(facts["steps"], facts["validation_loss"])]:
        raise BadConfig(f"{run} trained another checkpoint; --run names the folder in which this one was trained")
    notes = [look for look in looks if "chosen_by_class" in look]
    return [
        {"step": note["step"], "lift": rounded(experts.lift(torch.tensor(note["chosen_by_class"])))} for note in notes
    ]


def _of_text(loaded: Checkpoint, corpus: Corpus) -> dict[str, Any]:
    seeds = range(1, SAMPLES + 1)
    samples = [from_a_new_line(loaded.model, loaded.tokenizer, SAMPLE_LENGTH, seed) for seed in seeds]
    length = sum(map(len, samples))
    passage = max((longest_overlap(text, corpus.train) for text in samples), key=len)
    starts = range(0, min(length, len(corpus.validation)), SAMPLE_LENGTH)
    held_out = (longest_overlap(corpus.validation[at : at + SAMPLE_LENGTH], corpus.train) for at in starts)
    overlap = {"characters": length, "length": len(passage), "passage": passage}
    return {"samples": samples, "overlap": {**overlap, "length_in_validation_text": max(map(len, held_out))}}


def _pictures(facts: dict[str, Any], report: dict[str, Any]) -> dict[str, bytes]:
    drawn = {
        "loss.png": pictures.loss_curve(facts["loss_curve"], facts["bigram_loss"]),
        "load.png": pictures.load([row["shares"] for row in report["load"]]),
    }
    if report["classes"]:
        drawn["classes.png"] = pictures.classes(report["classes"])
        if report["specialisation"]:
            drawn["specialisation.gif"] = pictures.specialisation(report["specialisation"])
    if report["causal_map"]:
        drawn["causal-map.png"] = pictures.causal_map(report["causal_map"]["cost"])
    return drawn
