"""``python -m training train | evaluate | sample | report | export``"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from model.checkpoint import CheckpointError
from model.machine import usable_cpus, visible_cpus
from model.tokenizer import UnknownCharacters
from training import Refused
from training import config as configs
from training.process import give_up_output, import_torch, speaks_of, told, with_patient_malloc

if TYPE_CHECKING:
    import torch

    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer
    from training.corpora import Corpus
    from training.parallel import Ranks
    from training.trainer import Trainer

RUNS = Path("runs")


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

    train = commands.add_parser("train", help="a preset and flags in, checkpoint folders out")
    train.set_defaults(command=_train)
    train.add_argument("--preset", default="quick", help=f"one of {', '.join(configs.preset_names())}")
    train.add_argument("--run", help="name of the folder below runs/ (default: the preset's name)")
    train.add_argument("--resume", action="store_true", help="go on from the run's newest whole checkpoint")
    train.add_argument("--data", type=Path, help="a text file to train on instead of the corpus")
    train.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    configs.add_flags(train)

    evaluate = commands.add_parser(
        "evaluate", help="loss over exact windows, loss while streaming, load of the experts"
    )
    evaluate.set_defaults(command=_evaluate)
    _add_checkpoint(evaluate)
    evaluate.add_argument("--corpus", help="whose validation text is scored (default: that of its own corpus)")
    evaluate.add_argument("--data", type=Path, help="a text file whose last tenth is scored instead")

    sample = commands.add_parser("sample", help="print text")
    sample.set_defaults(command=_sample)
    _add_checkpoint(sample)
    sample.add_argument(
        "--items", type=int, metavar="N", help="write N new items of a model that was trained on --items"
    )
    sample.add_argument("--data", type=Path, help="the file that it was trained on, for --items to mark known ones")
    sample.add_argument("prompt", nargs="?", default="")
    sample.add_argument("--length", type=int, default=500, metavar="TOKENS")
    sample.add_argument("--temperature", type=float, default=0.8)
    sample.add_argument("--top-k", type=int, default=0)
    sample.add_argument("--top-p", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=None)

    report = commands.add_parser("report", help="write a checkpoint's evidence: model card, pictures, report.json")
    report.set_defaults(command=_report)
    _add_checkpoint(report)
    report.add_argument("--corpus", help="what it was trained on (default: what its record names)")
    report.add_argument("--data", type=Path, help="the text file that it was trained on, if it was a file")
    report.add_argument("--run", type=Path, help="runs/NAME, for the animation of experts specialising")
    report.add_argument("--control", type=Path, metavar="FOLDER", help="a dense checkpoint to stand beside it")
    report.add_argument("--output", type=Path, help="where to write (default: into the checkpoint's folder)")
    report.add_argument("--windows", type=int, default=24, help="of the validation text, for the experts' maps")

    export = commands.add_parser("export", help="copy what serving needs of a run's checkpoint into a new folder")
    export.set_defaults(command=_export)
    export.add_argument("source", type=Path)
    export.add_argument("target", type=Path)
    export.add_argument("--gguf", type=Path, metavar="FILE", help="write the model for llama.cpp as well")
    export.add_argument("--dtype", choices=["f32", "bf16", "q8_0"], help="of the GGUF's matrices (default: f32)")
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def _train(arguments: argparse.Namespace) -> None:
    flags = configs.flag_values(arguments)
    config = configs.from_preset(arguments.preset, flags)
    _require_one_text(flags.get("corpus"), arguments.data)
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
    from training.trainer import Trainer, require_resumable

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
        corpus = _corpus(arguments.data, config.corpus, config.items)
    start = Trainer.resume if arguments.resume else Trainer
    trainer = start(config, corpus, run, device, ranks)
    with ExitStack() as claimed:
        with ranks.first_goes_ahead(device):
            if ranks.is_first:
                claimed.enter_context(runs.claim(run, steps))
                print(_beginning(trainer), flush=True)
        final = trainer.train()
    if ranks.is_first:
        print(_summary(trainer, final))
    ranks.leave()


def _require_one_text(corpus: str | None, data: Path | None) -> None:
    if corpus is not None and data is not None:
        raise configs.BadConfig("--corpus names one text and --data another; leave one of them out")


def _beginning(trainer: Trainer) -> str:
    shape, size = trainer.model.config, trainer.ranks.size
    return (
        f"{shape.num_parameters:,} parameters, {shape.num_active_parameters:,} at work per token; "
        f"{trainer.config.steps} steps of {trainer.tokens_per_step:,} tokens on {trainer.model.device}"
        f"{f' and {size - 1} more' if size > 1 else ''}; saving to {trainer.run}/"
    )


def _summary(trainer: Trainer, final: Path) -> str:
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


def _evaluate(arguments: argparse.Namespace) -> None:
    _require_one_text(arguments.corpus, arguments.data)
    import_torch()
    import torch

    from model import checkpoint
    from training.baselines import bits_per_character
    from training.evaluate import evaluate, stream_loss
    from training.record import require_text_of

    loaded = checkpoint.load(arguments.checkpoint, _device(arguments.device))
    corpus = _corpus(arguments.data, arguments.corpus or loaded.training["corpus"]["name"], _of_items(loaded))
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


def _sample(arguments: argparse.Namespace) -> None:
    _require_sampling(arguments)
    import_torch()
    from model import checkpoint
    from training.sample import stream

    loaded = checkpoint.load(arguments.checkpoint, _device(arguments.device))
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

    if not _of_items(loaded):
        raise configs.BadConfig(f"{arguments.checkpoint} was not trained on items; leave --items out")
    corpus = _corpus(arguments.data, "", of_items=True)
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


def _report(arguments: argparse.Namespace) -> None:
    if arguments.windows < 1:
        raise configs.BadConfig(f"--windows is {arguments.windows}; it must be at least 1")
    _require_one_text(arguments.corpus, arguments.data)
    import_torch()
    from model import checkpoint
    from training.report.write import write

    loaded = checkpoint.load(arguments.checkpoint, _device(arguments.device))
    corpus = _corpus(arguments.data, arguments.corpus or loaded.training["corpus"]["name"], _of_items(loaded))
    output = arguments.output or arguments.checkpoint
    write(loaded, corpus, output, windows=arguments.windows, run=arguments.run, control=arguments.control)
    print(f"read it:  {output / 'README.md'}")


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


def _export(arguments: argparse.Namespace) -> None:
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


def _corpus(data: Path | None, name: str, of_items: bool) -> Corpus:
    from training import corpora

    if not data:
        return corpora.load(name)
    return corpora.items_from_file(data) if of_items else corpora.from_file(data)


def _of_items(loaded: Checkpoint) -> bool:
    """Whether a file was split by items for it; split otherwise, what it trained on would be scored."""
    config = loaded.training.get("config")
    return isinstance(config, dict) and bool(config.get("items"))


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise configs.BadConfig("--device is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _rank_device(name: str, ranks: Ranks) -> torch.device:
    """Each rank of a machine has a GPU to itself."""
    import torch

    device = _device(name)
    if device.type == "cpu" or ranks.size == 1:
        return device
    if ranks.local_size > torch.cuda.device_count():
        raise configs.BadConfig(
            f"{ranks.local_size} ranks share {torch.cuda.device_count()} GPUs here; start one rank for each GPU"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


if __name__ == "__main__":
    sys.exit(main())
