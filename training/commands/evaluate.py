"""The command that scores a checkpoint and prints it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from model.tokenizer import UnknownCharacters
from training.commands.common import add_checkpoint, corpus_of, device_of, require_one_text, trained_on_items
from training.process import import_torch

if TYPE_CHECKING:
    import torch

    from model.tokenizer import Tokenizer
    from training.corpora import Corpus

HELP = "loss over exact windows, loss while streaming, load of the experts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--corpus", help="whose validation text is scored (default: that of its own corpus)")
    parser.add_argument("--data", type=Path, help="a text file whose last tenth is scored instead")


def command(arguments: argparse.Namespace) -> None:
    require_one_text(arguments.corpus, arguments.data)
    import_torch()
    import torch

    from model import checkpoint
    from training.baselines import bits_per_character
    from training.evaluate import evaluate, stream_loss
    from training.record import require_text_of

    loaded = checkpoint.load(arguments.checkpoint, device_of(arguments.device))
    corpus = corpus_of(arguments.data, arguments.corpus or loaded.training["corpus"]["name"], trained_on_items(loaded))
    if not (arguments.data or arguments.corpus):  # a file may be called as a corpus is
        require_text_of(loaded, corpus)
    ids = torch.tensor(loaded.tokenizer.encode(corpus.validation), device=loaded.model.device)
    result = evaluate(loaded.model, ids)
    print(f"validation loss  {result.loss:.4f} nats per token over {result.num_windows} windows")
    bits = bits_per_character(result.loss, len(ids), len(corpus.validation))
    print(f"                 {bits:.4f} bits per character")
    print(f"bigram counts    {_bigram(loaded.tokenizer, corpus, ids)}")
    print(f"while streaming  {stream_loss(loaded.model, ids):.4f} nats per token over {len(ids) - 1:,} tokens")
    balance = f"busiest {result.max_load:.2f} x the mean, entropy {result.min_entropy:.4f}, {result.num_idle} idle"
    print(f"experts          {balance}")
    for layer, shares in enumerate(result.shares):
        print(f"  layer {layer}  " + "  ".join(f"{share:6.1%}" for share in shares))


def _bigram(tokenizer: Tokenizer, corpus: Corpus, validation_ids: torch.Tensor) -> str:
    """What pairs counted in the training text reach, if the tokenizer spells it: only its other part is scored."""
    import torch

    from training.baselines import bigram_loss

    try:
        train_ids = torch.tensor(tokenizer.encode(corpus.train), device=validation_ids.device)
    except UnknownCharacters as error:
        return f"none: of the training text, {error}"
    return f"{bigram_loss(train_ids, validation_ids, tokenizer.vocab_size):.4f} nats per token"
