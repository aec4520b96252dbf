"""The command that copies a run's checkpoint out of it, for us and for llama.cpp."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from training import config as configs
from training.process import import_torch

HELP = "copy what serving needs of a run's checkpoint into a new folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write the model for llama.cpp as well")
    parser.add_argument("--dtype", choices=["f32", "bf16", "q8_0"], help="of the GGUF's matrices (default: f32)")


def command(arguments: argparse.Namespace) -> None:
    if arguments.dtype and not arguments.gguf:
        raise configs.BadConfig("--dtype is of the GGUF's matrices; add --gguf FILE, or leave --dtype out")
    import_torch()
    from training import runs

    if arguments.gguf:  # first, so that a refusal leaves nothing behind
        from model import checkpoint
        from training import gguf_export

        _require_apart(arguments.gguf, arguments.target)
        if arguments.target.exists():
            raise FileExistsError(f"{arguments.target} exists; a checkpoint is always a new folder")
        gguf_export.export(checkpoint.load(arguments.source), arguments.gguf, arguments.dtype or "f32")
    try:
        runs.export(arguments.source, arguments.target)
    except BaseException:
        if arguments.gguf:
            arguments.gguf.unlink()
        raise
    print(f"serve it:  make serve CHECKPOINT={shlex.quote(str(arguments.target))}")


def _require_apart(file: Path, folder: Path) -> None:
    """Of two new paths: neither may need the other's place."""
    written, made = file.resolve(), folder.resolve()
    if written.is_relative_to(made) or made.is_relative_to(written):
        raise configs.BadConfig(
            f"--gguf {file} and the new folder {folder} are in each other's way; name a file beside it"
        )
