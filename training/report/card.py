"""The model card of a report: its figures in words, tables and pictures, as Markdown. Measures nothing."""

from __future__ import annotations

import statistics
from typing import Any

from model.config import ModelConfig
from training.record import code_block, code_fence, introduction, training_section
from training.report.experts import MOST_EXPERTS


def card(name: str, config: ModelConfig, facts: dict[str, Any], report: dict[str, Any]) -> str:
    """facts: training.json. report: report.json."""
    sections = [
        introduction(name, config, facts),
        training_section(config, facts) + "\n\n![loss over training](loss.png)",
        _results(report),
        _control(report),
        _load(facts, report),
        _likes(config, report),
        _causal(report),
        _samples(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def reading(causal: dict[str, Any]) -> str:
    """The causal map in one sentence, from its numbers."""
    cells = [
        (cost, error, f"expert {expert} of layer {layer}")
        for layer, row in enumerate(zip(causal["cost"], causal["standard_error"], strict=True))
        for expert, (cost, error) in enumerate(zip(*row, strict=True))
    ]
    most, _, dearest = max(cells, key=lambda cell: cell[0])
    least, _, cheapest = min(cells, key=lambda cell: cell[0])
    median = statistics.median(cost for cost, _, _ in cells)
    said = (
        f"Silencing {dearest} costs most, {most:+.4f} nats per token where the median expert costs {median:+.4f}; "
        f"{cheapest} costs least, {least:+.4f}"
    )
    known = [(cost, error) for cost, error, _ in cells if error is not None]
    if not known:
        return f"{said}; one window gives no standard error."
    clear = sum(cost > 2 * error for cost, error in known)
    return f"{said}; for {clear} of {len(known)} the cost is above twice its standard error."


def _results(report: dict[str, Any]) -> str:
    rows = [
        ("as in this folder", report["final"]),
        (f"best of training, step {report['best']['step']:,}", report["best"]),
        ("bigram counts", report["bigram"]),
    ]
    lines = [f"| {what} | {_loss(row)} |" for what, row in rows]
    return "\n".join(
        ["## Results", "", "| on the validation text | nats per token | bits per character |", "|---|---|---|", *lines]
    )


def _loss(row: dict[str, Any]) -> str:
    return f"{row['loss']:.4f} | {row['bits_per_character']:.4f}"


def _control(report: dict[str, Any]) -> str:
    if not report["control"]:
        return ""
    mixture, dense = report["result"], report["control"]
    rows = {
        "validation loss": "validation_loss:.4f",
        "parameters": "parameters:,",
        "at work per token": "active_parameters:,",
        "steps": "steps:,",
        "tokens": "tokens:,",
    }
    lines = []
    for what, named in rows.items():
        key, form = named.split(":")
        lines.append(f"| {what} | {mixture[key]:{form}} | {dense[key]:{form}} |")
    gain = dense["validation_loss"] - mixture["validation_loss"]
    than = f"{'better' if gain > 0 else 'worse'} than its control, of one run each"
    verdict = f"This model is {abs(gain):.4f} nats per token {than}."
    head = ["## The control", "", "The same data and steps with other experts.", "", "| | this model | control |"]
    return "\n".join([*head, "|---|---|---|", *lines, "", verdict])


def _load(facts: dict[str, Any], report: dict[str, Any]) -> str:
    lines = [
        f"| {layer} | {row['max_load_ratio']:.2f} | {row['entropy_ratio']:.4f} | {row['idle']} |"
        for layer, row in enumerate(report["load"])
    ]
    return "\n".join(
        [
            "## The experts' load",
            "",
            f"Over the {facts['validation_windows']:,} windows of the validation loss.",
            "",
            "| layer | busiest expert, times the mean | entropy, 1 at balance | idle |",
            "|---|---|---|---|",
            *lines,
            "",
            "![load of every expert](load.png)",
        ]
    )


def _likes(config: ModelConfig, report: dict[str, Any]) -> str:
    if config.num_layers * config.num_experts > MOST_EXPERTS:
        return f"What each expert likes and costs is told of at most {MOST_EXPERTS} experts in all layers together."
    if not report["favourites"]:
        return ""
    return "\n".join(
        [
            "## What each expert likes",
            "",
            f"From {report['tokens_counted']:,} tokens of the validation text: how often an expert is chosen for a",
            "class of characters, over what its load alone would give.",
            "",
            "![experts and classes of characters](classes.png)",
            "",
            _animation(report),
            "",
            "What each took most of beyond its share, with the share of all occurrences that it had a part in:",
            "",
            *_favourites(report["favourites"]),
        ]
    )


def _animation(report: dict[str, Any]) -> str:
    if report["specialisation"]:
        return "![experts specialising over training](specialisation.gif)"
    return "This run kept no record of its routing during training, so there is no animation of experts specialising."


def _favourites(layers: list[list[list[dict[str, Any]]]]) -> list[str]:
    experts = range(len(layers[0]))
    head = "| layer | " + " | ".join(f"expert {expert}" for expert in experts) + " |"
    lines = [f"| {layer} | " + " | ".join(map(_spelled, row)) + " |" for layer, row in enumerate(layers)]
    return [head, "|---" * (len(experts) + 1) + "|", *lines]


def _spelled(likes: list[dict[str, Any]]) -> str:
    names = {"\n": "line end", " ": "space"}
    return ", ".join(f"{names.get(like['token']) or _in_cell(like['token'])} {like['taken']:.0%}" for like in likes[:3])


def _in_cell(token: str) -> str:
    """A token as code on one line of one cell: what cannot be printed is escaped, and the bar, which ends cells."""
    printed = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in token)
    return _code(printed.replace(" ", "\u2423").replace("|", "\\|"))


def _code(text: str) -> str:
    fence = code_fence(text)
    space = " " if "`" in text else ""  # between the text's own backticks and the fence; Markdown takes it away again
    return f"{fence}{space}{text}{space}{fence}"


def _causal(report: dict[str, Any]) -> str:
    causal = report["causal_map"]
    if not causal:
        return ""
    windows = f"{causal['windows']} windows of the validation text (loss {causal['baseline']:.4f} with all experts)"
    return (
        f"## The causal map\n\nThe loss with one expert silenced, minus without, on {windows}.\nIts tokens go to their "
        f"next choice.\n\n![cost of silencing each expert](causal-map.png)\n\n{reading(causal)}"
    )


def _samples(report: dict[str, Any]) -> str:
    overlap = report["overlap"]
    texts = "\n\n".join(map(code_block, report["samples"][:2]))
    return (
        f"## Samples, temperature 0.8\n\n{texts}\n\nThe longest passage of {overlap['characters']:,} generated "
        f"characters that the training text holds word for word has {overlap['length']} characters:\n"
        f"{_code(repr(overlap['passage']))}. In as much of the validation text, which nobody generated, it has "
        f"{overlap['length_in_validation_text']}."
    )
