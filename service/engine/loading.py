"""From a checkpoint folder to a warm engine: device, threads, slots, and the proof that it computes what it should."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, cast

from service.engine.processor import cpu_model
from service.engine.sequence import FinishReason, SamplingParams, Sequence
from service.engine.thread import CannotServe, EngineInfo, EnginePhase

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.config import ModelConfig
    from model.transformer import Transformer
    from service.engine.counters import ExpertCounters
    from service.engine.engine import Engine
    from service.engine.native.runner import NativeRunner
    from service.engine.runner import Runner, TorchRunner

log = logging.getLogger(__name__)

DEFAULT_SLOTS = 64
MIB = 2**20


@dataclass(frozen=True)
class EngineOptions:
    """What the engine is told. fingerprint is that of the checkpoint that the rest of the process speaks of, None for
    any; slots None is as many as fit, at most 64; prefill_chunk is a multiple of 16; fault is for tests."""

    checkpoint: Path
    device: str
    threads: int
    slots: int | None
    kv_memory_mib: int
    prefill_chunk: int
    runner: str = "auto"
    fault: str | None = None
    fingerprint: str | None = None


def build_engine(options: EngineOptions, enter: Callable[[EnginePhase], None]) -> tuple[Engine, EngineInfo]:
    """Load a checkpoint and warm an engine on the calling thread, which must be the one that will run it.

    Raises CannotServe or CheckpointError.
    """
    import torch

    from model import checkpoint
    from service.engine.counters import ExpertCounters
    from service.engine.engine import Engine
    from service.engine.faults import FaultyRunner, is_fault
    from service.engine.probe import find_row_multiple
    from service.engine.scheduler import Scheduler

    if options.fault and not is_fault(options.fault):
        raise CannotServe(f"MOESCOPE_FAULT is {options.fault!r}; it breaks the engine on purpose, as raise:50 does")
    torch.set_num_threads(options.threads)  # of the thread that calls this
    device = _device(options.device)
    loaded = checkpoint.load(options.checkpoint, device)
    if options.fingerprint not in (None, loaded.manifest.fingerprint):
        raise CannotServe(
            f"{options.checkpoint} has become another checkpoint while this process started; start it again"
        )
    slots = _num_slots(options, loaded.config)
    counters = ExpertCounters(loaded.config, slots, loaded.model.device)
    runner = _runner(options, loaded.model, slots, counters)
    engine = Engine(runner, Scheduler(slots, options.prefill_chunk), counters)
    enter(EnginePhase.WARMING)
    row_multiple = find_row_multiple(runner, slots, loaded.config.vocab_size)
    if row_multiple is None:
        log.warning("on this machine the bits of a text depend on how many are written at the same time")
    _prove(engine, loaded)
    info = EngineInfo(
        device=str(device),
        threads=torch.get_num_threads(),
        runner=runner.name,
        num_slots=slots,
        torch_version=str(torch.__version__),
        row_multiple=row_multiple,
        fingerprint=_fingerprint(loaded, options, runner, slots, row_multiple),
    )
    place = f"{device}, run by {info.runner}"
    mib = (slots + 1) * _slot_mib(loaded.config)
    log.info("the model is on %s, %d threads, %d slots of %.0f MiB in all", place, info.threads, slots, mib)
    if options.fault:
        engine.runner = cast("Runner", FaultyRunner(runner, options.fault))
    return engine, info


def _runner(
    options: EngineOptions, model: Transformer, slots: int, counters: ExpertCounters
) -> TorchRunner | NativeRunner:
    """The native step where it can be had and computes this model, unless torch is asked for."""
    from service.engine.native.library import NoLibrary, load
    from service.engine.native.runner import NativeRunner, why_not
    from service.engine.runner import TorchRunner

    if options.runner == "torch" or model.device.type != "cpu":
        return TorchRunner(model, slots, counters)
    try:
        if reason := why_not(model.config):
            raise NoLibrary(reason)
        return NativeRunner(load(), model, slots, counters, options.threads)
    except NoLibrary as reason:
        if options.runner == "native":
            raise CannotServe(f"--runner is native, but {reason}; use --runner auto or torch") from None
        log.warning("torch reads and writes, many times slower than the native step would: %s", reason)
        return TorchRunner(model, slots, counters)


def _fingerprint(
    loaded: Checkpoint, options: EngineOptions, runner: TorchRunner | NativeRunner, slots: int, row_multiple: int | None
) -> str:
    """12 hex digits of all that decides a bit of a text: two processes with the same ones write the same."""
    import torch

    device = loaded.model.device
    facts = (
        loaded.manifest.fingerprint,
        runner.name,
        runner.build,
        row_multiple,
        device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        cpu_model(),
        os.environ.get("MKL_CBWR"),
        torch.__version__,
        torch.get_num_threads(),
        options.prefill_chunk,
        slots if device.type == "cuda" else None,
        [sha256(file.read_bytes()).hexdigest() for file in _sources()],
        secrets.token_hex(8) if row_multiple is None else None,  # then nobody can go on with anybody's text
    )
    return sha256(repr(facts).encode()).hexdigest()[:12]


def _sources() -> list[Path]:
    """The code that decides what a text is."""
    engine = Path(__file__).parent
    return sorted([*engine.glob("*.py"), *engine.glob("native/*.[pc]*"), *(engine.parents[1] / "model").glob("*.py")])


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CannotServe(f"--device is {name}, but torch sees no GPU here; use --device auto or cpu")
    return name


def _slot_mib(config: ModelConfig) -> float:
    """Whatever the runner: the native one takes at least as much as torch's."""
    from model.kv_cache import KVCache
    from service.engine.native.runner import with_whole_ring

    return KVCache.bytes_per_slot(with_whole_ring(config)) / MIB


def _num_slots(options: EngineOptions, config: ModelConfig) -> int:
    each = _slot_mib(config)
    fitting = int(options.kv_memory_mib / each) - 1  # one more is spare, for rows of padding
    if fitting < max(1, options.slots or 1):
        raise CannotServe(
            f"--slots is {options.slots or 1}; each slot takes up to {each:.1f} MiB with this checkpoint, so at most "
            f"{max(0, fitting)} fit in the {options.kv_memory_mib:,} MiB of --kv-memory-mib"
        )
    return options.slots or min(DEFAULT_SLOTS, fitting)


def _prove(engine: Engine, loaded: Checkpoint) -> None:
    """Warm the engine up on the checkpoint's known answer, so that a wrong kernel or bit never serves."""
    known = loaded.training["known_answer"]
    prompt_ids = tuple(loaded.tokenizer.encode(known["prompt"]))
    sequence = Sequence(prompt_ids, SamplingParams(max_new_tokens=len(known["ids"]), temperature=0.0))
    engine.add(sequence)
    while not sequence.is_finished:
        engine.step()
    if sequence.finish_reason is not FinishReason.LENGTH or sequence.token_ids != known["ids"]:
        raise CannotServe(
            f"{loaded.manifest.folder / 'training.json'} holds a known answer that the model does not give on this "
            "machine, so it computes something else here; try --device cpu, or report it"
        )
