"""The command that writes a checkpoint's evidence."""

from __future__ import annotations

import argparse
from pathlib import Path

from training import config as configs
from training.commands.common import add_checkpoint, corpus_of, device_of, require_one_text, trained_on_items
from training.process import import_torch

HELP = "write a checkpoint's evidence: model card, pictures, report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--corpus", help="what it was trained on (default: what its record names)")
    parser.add_argument("--data", type=Path, help="the text file that it was trained on, if it was a file")
    parser.add_argument("--run", type=Path, help="runs/NAME, for the animation of experts specialising")
    parser.add_argument("--control", type=Path, metavar="FOLDER", help="a dense checkpoint to stand beside it")
    parser.add_argument("--output", type=Path, help="where to write (default: into the checkpoint's folder)")
    parser.add_argument("--windows", type=int, default=24, help="of the validation text, for the experts' maps")


def command(arguments: argparse.Namespace) -> None:
    if arguments.windows < 1:
        raise configs.BadConfig(f"--windows is {arguments.windows}; it must be at least 1")
    require_one_text(arguments.corpus, arguments.data)
    import_torch()
    from model import checkpoint
    from training.report.write import write

    loaded = checkpoint.load(arguments.checkpoint, device_of(arguments.device))
    corpus = corpus_of(arguments.data, arguments.corpus or loaded.training["corpus"]["name"], trained_on_items(loaded))
    output = arguments.output or arguments.checkpoint
    write(loaded, corpus, output, windows=arguments.windows, run=arguments.run, control=arguments.control)
    print(f"read it:  {output / 'README.md'}")
