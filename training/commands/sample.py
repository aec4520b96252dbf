"""The command that prints text, or new items of a model that was trained on a list of them."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from training import config as configs
from training.commands.common import add_checkpoint, corpus_of, device_of, trained_on_items
from training.process import import_torch

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint

HELP = "print text, or new items"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--items", type=int, metavar="N", help="write N new items of a model that was trained on --items"
    )
    parser.add_argument("--data", type=Path, help="the file that it was trained on, for --items to mark known ones")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--length", type=int, default=500, metavar="TOKENS")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)


def command(arguments: argparse.Namespace) -> None:
    _require_sampling(arguments)
    import_torch()
    from model import checkpoint
    from training.sample import stream

    loaded = checkpoint.load(arguments.checkpoint, device_of(arguments.device))
    if arguments.items is not None:
        _sample_items(arguments, loaded)
        return
    start = arguments.prompt or loaded.tokenizer.fold("\n") or loaded.tokenizer.tokens[0]
    prompt_ids = loaded.tokenizer.encode(start)
    seed = _seed(arguments)
    spell = loaded.tokenizer.speller()
    print(arguments.prompt, end="", flush=True)
    for token_id in stream(
        loaded.model,
        prompt_ids,
        arguments.length,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=seed,
    ):
        print(spell(token_id), end="", flush=True)
    print(spell.finish())


def _sample_items(arguments: argparse.Namespace, loaded: Checkpoint) -> None:
    """New items, one a line; what the training text holds as well is marked."""
    from training.record import require_text_of
    from training.sample import items

    if not trained_on_items(loaded):
        raise configs.BadConfig(f"{arguments.checkpoint} was not trained on items; leave --items out")
    corpus = corpus_of(arguments.data, "", of_items=True)
    require_text_of(loaded, corpus)
    known = set(corpus.train.split("\n"))
    options = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    written = []
    for item in items(
        loaded.model, loaded.tokenizer, arguments.items, arguments.length, **options, seed=_seed(arguments)
    ):
        is_known = item.strip() in known  # as the lines of the text were stripped
        print(f"{item} (known)" if is_known else item, flush=True)
        written.append(is_known)
    print(f"{len(written)} items, {sum(written)} of them known from the training text")


def _seed(arguments: argparse.Namespace) -> int:
    return secrets.randbelow(2**32) if arguments.seed is None else int(arguments.seed)


def _require_sampling(arguments: argparse.Namespace) -> None:
    """The bounds of the service's options of the same names."""
    bounds = {
        "length": (1, 10**9),
        "items": (1, 10**9),
        "temperature": (0, 2),
        "top_k": (0, 10**9),
        "top_p": (1e-9, 1),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in bounds.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise configs.BadConfig(f"--{name.replace('_', '-')} is {value}; it must be between {low} and {high}")
    if 0 < arguments.temperature < 0.01:
        raise configs.BadConfig(
            f"--temperature is {arguments.temperature}; it must be 0, which is greedy, or from 0.01 up"
        )
    if arguments.items is None and arguments.data:
        raise configs.BadConfig("--data is for --items N, to mark the known ones; add it, or leave --data out")
    if arguments.items is not None and (arguments.prompt or not arguments.data):
        raise configs.BadConfig("--items takes no prompt, and --data FILE with the items that the model was trained on")
