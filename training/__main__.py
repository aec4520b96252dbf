"""``python -m training train | evaluate | sample | report | export``"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from model.checkpoint import CheckpointError
from model.machine import usable_cpus, visible_cpus
from model.tokenizer import UnknownCharacters
from training import Refused
from training.commands import evaluate, export, report, sample, train
from training.process import give_up_output, speaks_of, told


class Parser(argparse.ArgumentParser):
    """Refuses in one line; argparse's own usage has forty for ``train``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help tells what there is)\n")


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    if usable_cpus() < visible_cpus():  # torch knows nothing of quotas
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sample has any character, a terminal perhaps not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments.command(arguments)
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, Refused, CheckpointError, UnknownCharacters, MemoryError, RuntimeError) as error:
        line = told(error)
        if line is None:
            raise
        if speaks_of(error):
            print(line, file=sys.stderr)
        give_up_output()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training", description="Train and examine Moescope's models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, evaluate, sample, report, export):
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(command=module.command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
