"""The command that trains: whether it may, then the trainer, then how it ended."""

from __future__ import annotations

import argparse
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from training import config as configs
from training.commands.common import corpus_of, device_of, require_one_text
from training.process import import_torch, with_patient_malloc

if TYPE_CHECKING:
    import torch

    from training.parallel import Ranks
    from training.trainer import Trainer

RUNS = Path("runs")

HELP = "a preset and flags in, checkpoint folders out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="quick", help=f"one of {', '.join(configs.preset_names())}")
    parser.add_argument("--run", help="name of the folder below runs/ (default: the preset's name)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest whole checkpoint")
    parser.add_argument("--data", type=Path, help="a text file to train on instead of the corpus")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    configs.add_flags(parser)


def command(arguments: argparse.Namespace) -> None:
    flags = configs.flag_values(arguments)
    config = configs.from_preset(arguments.preset, flags)
    require_one_text(flags.get("corpus"), arguments.data)
    configs.require_used(config, flags)
    name = arguments.preset if arguments.run is None else arguments.run
    run = RUNS / name
    if run.parent != RUNS or run.name in ("", ".", "..") or not name.isprintable():
        raise configs.BadConfig(f"--run is {name!r}; it is the plain name of a folder below {RUNS}/")
    if config.items and not arguments.data:
        raise configs.BadConfig("items are the lines of a file; add --data FILE, or leave --items out")
    with_patient_malloc("training")
    import_torch()
    from training import memory, runs
    from training.parallel import Ranks
    from training.resume import require_resumable
    from training.trainer import Trainer

    ranks = Ranks.from_environment()
    if config.batch_size % ranks.size:
        raise configs.BadConfig(f"batch_size is {config.batch_size}; {ranks.size} ranks must share it evenly")
    device = _rank_device(arguments.device, ranks)
    memory.require_room(config, memory.room_for_a_rank(device, ranks), ranks.size)
    runs.require_writable(run)
    steps = runs.steps(run)
    if arguments.resume:
        require_resumable(config, run)
    elif steps:
        raise configs.BadConfig(f"{run} has checkpoints already; add --resume to go on, or name another with --run")
    ranks.join(device)
    with ranks.first_goes_ahead(device):
        corpus = corpus_of(arguments.data, config.corpus, config.items)
    start = Trainer.resume if arguments.resume else Trainer
    trainer = start(config, corpus, run, device, ranks)
    with ExitStack() as claimed:
        with ranks.first_goes_ahead(device):
            if ranks.is_first:
                claimed.enter_context(runs.claim(run, steps))
                print(_beginning(trainer), flush=True)
        final = trainer.train()
    if ranks.is_first:
        print(summary(trainer, final))
    ranks.leave()


def _beginning(trainer: Trainer) -> str:
    shape, size = trainer.model.config, trainer.ranks.size
    return (
        f"{shape.num_parameters:,} parameters, {shape.num_active_parameters:,} at work per token; "
        f"{trainer.config.steps} steps of {trainer.tokens_per_step:,} tokens on {trainer.model.device}"
        f"{f' and {size - 1} more' if size > 1 else ''}; saving to {trainer.run}/"
    )


def summary(trainer: Trainer, final: Path) -> str:
    history = trainer.history
    assert history.best
    stopped = f"stopped at step {history.step}; go on with the same line and --resume\n"
    return (
        f"{stopped if history.step < trainer.config.steps else ''}"
        f"final  validation loss {history.loss_curve[-1]['validation_loss']:.4f} at step {history.step}: {final}\n"
        f"best   validation loss {history.best['validation_loss']:.4f} at step {history.best['step']}: "
        f"{trainer.best_folder}\n"
        f"serve it:  make serve CHECKPOINT={shlex.quote(str(trainer.best_folder))}"
    )


def _rank_device(name: str, ranks: Ranks) -> torch.device:
    """Each rank of a machine has a GPU to itself."""
    import torch

    device = device_of(name)
    if device.type == "cpu" or ranks.size == 1:
        return device
    if ranks.local_size > torch.cuda.device_count():
        raise configs.BadConfig(
            f"{ranks.local_size} ranks share {torch.cuda.device_count()} GPUs here; start one rank for each GPU"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)
