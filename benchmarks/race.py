"""``python -m benchmarks.race``: our server and others with the same weights, the same client and the same requests.

One server is alive at a time, and they take turns in rounds, so that a machine that slows down slows all. Every answer
fits into the context with its prompt: llama.cpp has no window. Prints a table, and keeps all of it in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.client import BrokenAnswer, Dialect, openai
from benchmarks.interop import HERE, PEERS, PeerFailed, interpreter_of
from benchmarks.over_http import HttpTrial, NoServer, measure, peak_mib, server_process
from benchmarks.record import RESULTS, clocks, cores_of_others, keep, machine
from benchmarks.workload import Workload
from model import checkpoint
from model.checkpoint import Checkpoint
from model.machine import usable_cpus
from training import gguf_export

STARTING_S = 600.0


@dataclass(frozen=True)
class Running:
    """A server that answers: where, as which process, and how it wants to be asked."""

    url: str
    pid: int
    dialect: Dialect


@dataclass(frozen=True)
class Setting:
    """What all contestants are told."""

    loaded: Checkpoint
    slots: int
    threads: int
    environments: Path
    files: Path

    @property
    def context(self) -> int:
        return self.loaded.config.context_length

    def gguf(self, dtype: gguf_export.DType) -> Path:
        """Our weights for llama.cpp, written once."""
        file = self.files / f"{dtype}.gguf"
        if not file.exists():
            gguf_export.export(self.loaded, file, dtype)
        return file


@contextmanager
def moescope(runner: str, setting: Setting) -> Iterator[Running]:
    with server_process(setting.loaded.manifest.folder, setting.slots, setting.threads, runner) as target:
        assert target.pid
        yield Running(target.url, target.pid, openai(target.info["model"]["name"], seed=1))


@contextmanager
def nobody(_: Setting) -> Iterator[Running]:
    """What the client and the sockets would do if a server took no time."""
    with _announced("the empty server", [sys.executable, "-m", "benchmarks.empty_server"], "nothing") as running:
        yield running


@contextmanager
def llama(dtype: gguf_export.DType, setting: Setting) -> Iterator[Running]:
    python = interpreter_of(PEERS["llama.cpp"], setting.environments)
    arguments = (setting.gguf(dtype), setting.slots, setting.context, setting.threads)
    with _announced("llama.cpp", [python, HERE / "peers" / "serve_llama.py", *arguments], "model") as running:
        yield running


@contextmanager
def _announced(name: str, command: Sequence[object], model: str) -> Iterator[Running]:
    """A server that says on a line of its own where it is ready."""
    with _process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            _, is_ready, url = line.partition("ready: ")
            if is_ready:
                yield Running(url.strip(), process.pid, openai(model, seed=1))
                return
        raise NoServer(f"{name} did not start")


@contextmanager
def vllm(setting: Setting) -> Iterator[Running]:
    python = interpreter_of(PEERS["vllm"], setting.environments)
    port = _free_port()
    arguments = (setting.loaded.manifest.folder, setting.slots, setting.context, port)
    command = [python, HERE / "peers" / "serve_vllm.py", *arguments]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}"}
    with _process(command, env={**os.environ, **own, **cores}) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health", process)
        # Seeded requests end its engine on a CPU: its generator has no offset there.
        yield Running(url, process.pid, openai("model", ignore_eos=True))


@contextmanager
def transformers(setting: Setting) -> Iterator[Running]:
    python = interpreter_of(PEERS["transformers"], setting.environments)
    folder, port = setting.loaded.manifest.folder.resolve(), _free_port()
    command = [python, HERE / "peers" / "serve_transformers.py", folder, setting.slots, port]
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(setting.threads)}
    with _process(command, env={**os.environ, **own}, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health", process)
        # A seed would be everybody's. Its last chunk, with the usage, is followed by no [DONE].
        yield Running(url, process.pid, replace(openai(str(folder)), done=b'"usage":'))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _process(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(list(map(str, command)), text=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + STARTING_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)  # it has no other way to say that it is ready
        else:
            return
    raise NoServer(f"{url} does not answer")


OURS, EMPTY, ROUNDED = "Moescope", "empty server", "llama.cpp Q8_0"
NO_PEERS = {EMPTY: "no model", ROUNDED: "other weights"}
"""Who runs beside the race, and why: our rate is over none of theirs."""

CONTESTANTS: dict[str, Callable[[Setting], Any]] = {
    "Moescope native": partial(moescope, "native"),
    "Moescope torch": partial(moescope, "torch"),
    "llama.cpp F32": partial(llama, "f32"),
    "llama.cpp BF16": partial(llama, "bf16"),
    ROUNDED: partial(llama, "q8_0"),
    "vLLM": vllm,
    "transformers": transformers,
    EMPTY: nobody,
}


@dataclass
class Standing:
    """What one contestant has shown so far, by the number of streams."""

    trials: dict[int, list[HttpTrial]]
    peak_mib: float = 0.0
    trouble: str | None = None


def compete(setting: Setting, arguments: argparse.Namespace, workload: Workload) -> dict[str, Standing]:
    """Rounds in which every contestant that has not failed starts, is measured and ends."""
    standings = {name: Standing({streams: [] for streams in arguments.streams}) for name in arguments.contestants}
    for number in range(arguments.rounds):
        for name, standing in standings.items():
            if standing.trouble:
                continue
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                with CONTESTANTS[name](setting) as server:
                    for streams, kept in standing.trials.items():
                        vocabulary = setting.loaded.tokenizer.tokens
                        kept.append(measure(server.url, workload, streams, vocabulary, server.dialect, server.pid))
                    standing.peak_mib = max(standing.peak_mib, peak_mib(server.pid))
            except (BrokenAnswer, NoServer, PeerFailed, OSError) as error:
                standing.trouble = " ".join(str(error).split())[:300] or type(error).__name__
    return standings


def figures(standings: dict[str, Standing]) -> dict[str, Any]:
    return {
        name: {
            "peak_mib": round(standing.peak_mib),
            "trouble": standing.trouble,
            "streams": {streams: report.over_http(trials) for streams, trials in standing.trials.items() if trials},
        }
        for name, standing in standings.items()
    }


def ratios(found: dict[str, Any]) -> dict[int, float]:
    """Our tokens per second over those of the quickest other with our weights, by the streams that both have served."""
    best: tuple[dict[int, float], dict[int, float]] = {}, {}
    for name, each in found.items():
        if name in NO_PEERS:
            continue
        rates = best[not name.startswith(OURS)]
        for streams, row in each["streams"].items():
            rates[streams] = max(rates.get(streams, 0.0), row["tokens_per_second"])
    ours, theirs = best
    return {streams: round(ours[streams] / theirs[streams], 2) for streams in ours if streams in theirs}


def label(name: str) -> str:
    """The contestant, and why it is no peer if it is none."""
    return f"{name} ({NO_PEERS[name]})" if name in NO_PEERS else name


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each number of streams of each contestant."""
    lines = [
        "| streams | server | tokens/s | first token p50, p95, ms | next token p50, p95, p99 | CPU us/token, client |",
        "|---|---|---|---|---|---|",
    ]
    counts = sorted({streams for each in found.values() for streams in each["streams"]})
    for streams in counts:
        for name, each in found.items():
            if (row := each["streams"].get(streams)) is None:
                continue
            first, gap = row["first_token_ms"], row["inter_token_ms"]
            lines.append(
                f"| {streams} | {label(name)} | {row['tokens_per_second']:,.0f} | "
                f"{first['p50']:.1f}, {first['p95']:.1f} | "
                f"{gap['p50']:.2f}, {gap['p95']:.2f}, {gap['p99']:.2f} | {row['cpu_us_per_token']:,.0f}, "
                f"{row['client_cpu_us_per_token']:.0f} |"
            )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"), metavar="FOLDER")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--requests", type=int, default=2, metavar="N", help="of each stream in a round")
    parser.add_argument("--threads", type=int, default=usable_cpus(), metavar="N")
    parser.add_argument("--environments", type=Path, default=HERE / ".peers", metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    workload, start = Workload(arguments.requests), clocks()
    with tempfile.TemporaryDirectory() as files:
        loaded = checkpoint.load(arguments.checkpoint)
        setting = Setting(loaded, max(arguments.streams), arguments.threads, arguments.environments, Path(files))
        found = figures(compete(setting, arguments, workload))
    result = {
        "machine": {**machine(), "cores_of_others": cores_of_others(start)},
        "checkpoint": str(arguments.checkpoint),
        **{name: getattr(arguments, name) for name in ("rounds", "requests", "threads")},
        "prompt_characters": workload.prompt_characters,
        "new_tokens": workload.new_tokens,
        "contestants": found,
        "ratios": ratios(found),
    }
    print(table(found))
    print(f"ours over the quickest other, by streams: {result['ratios']}")
    for name, each in found.items():
        if each["trouble"]:
            print(f"{name}: {each['trouble']}")
    keep(arguments.results, "race", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
