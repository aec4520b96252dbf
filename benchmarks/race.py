"""``python -m benchmarks.race``: our server and others with the same weights, the same client and the same requests.

One server is alive at a time, and they take turns in rounds, so that a machine that slows down slows all. Every answer
fits into the context with its prompt: llama.cpp has no window. Prints a table, and keeps all of it in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

from benchmarks import llama_server, report
from benchmarks.client import Dialect, openai
from benchmarks.interop import HERE, PEERS, QUIET, interpreter_of, versions_of
from benchmarks.over_http import HttpTrial, NoServer, measure, peak_mib, server_process, started
from benchmarks.record import TROUBLES, Result, Trouble, command_line, in_one_line, take
from benchmarks.workload import REQUESTS, Workload
from model import checkpoint
from model.checkpoint import Checkpoint
from training import gguf_export

STARTING_S = 600.0
UNFILTERED: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Every server draws from the whole distribution: left alone, some cut its tail and others do not."""


@dataclass(frozen=True)
class Running:
    """A server that answers: where, as which process, how it wants to be asked, and what it says of itself."""

    url: str
    pid: int
    dialect: Dialect
    about: dict[str, Any] = field(default_factory=dict)


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
        about = {each: target.info[each] for each in ("runner", "threads", "versions")}
        yield Running(target.url, target.pid, openai(target.info["model"]["name"], seed=1, **UNFILTERED), about)


@contextmanager
def nobody(setting: Setting) -> Iterator[Running]:
    """What the client and the sockets would do if a server took no time."""
    with started([sys.executable, "-m", "benchmarks.empty_server"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        _, is_ready, url = process.stdout.readline().partition("ready: ")
        if not is_ready:
            raise NoServer("the empty server did not start")
        yield Running(url.strip(), process.pid, openai("nothing", seed=1, **UNFILTERED))


@contextmanager
def llama(dtype: gguf_export.DType, setting: Setting) -> Iterator[Running]:
    model, program = setting.gguf(dtype), llama_server.program(setting.environments)
    about, port = llama_server.about(program), _free_port()
    command = [program, *llama_server.flags(model, setting.slots, setting.context, setting.threads, port)]
    with _answering(command, port, setting) as process:
        # Its file has an end of text, which ours has not: see training.gguf_export.
        dialect = openai("model", seed=1, samplers=["temperature"], ignore_eos=True, **UNFILTERED)
        yield Running(f"http://127.0.0.1:{port}", process.pid, dialect, about)


@contextmanager
def vllm(setting: Setting) -> Iterator[Running]:
    python = interpreter_of(PEERS["vllm"], setting.environments)
    about, port = versions_of(PEERS["vllm"], python), _free_port()
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port),
        *("--model", setting.loaded.manifest.folder, "--served-model-name", "model", "--dtype", "float32"),
        *("--max-model-len", setting.context, "--max-num-seqs", setting.slots, "--no-enable-prefix-caching"),
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}"}
    with _answering(command, port, setting, cores) as process:
        # Seeded requests end its engine on a CPU: its generator has no offset there.
        dialect = openai("model", ignore_eos=True, **UNFILTERED)
        yield Running(f"http://127.0.0.1:{port}", process.pid, dialect, about)


@contextmanager
def transformers(setting: Setting) -> Iterator[Running]:
    python = interpreter_of(PEERS["transformers"], setting.environments)
    about, port = versions_of(PEERS["transformers"], python), _free_port()
    folder = setting.loaded.manifest.folder
    command = [
        *(python, "-m", "transformers.cli.transformers", "serve", folder, "--host", "127.0.0.1", "--port", port),
        # Without continuous batching a request waits until the one before it has ended. A block holds 256 positions,
        # more than a text has here; left to itself it takes most of the machine's memory.
        *("--continuous-batching", "--cb-num-blocks", 2 * setting.slots),
        *("--device", "cpu", "--dtype", "float32", "--log-level", "error"),
    ]
    with _answering(command, port, setting, {"OMP_NUM_THREADS": str(setting.threads)}) as process:
        # A seed would be everybody's. Its last chunk, with the usage, is followed by no [DONE].
        options = json.dumps({"do_sample": True, "top_k": 0, "top_p": 1.0})  # of other words it knows none
        dialect = replace(openai(str(folder), generation_config=options), done=b'"usage":')
        yield Running(f"http://127.0.0.1:{port}", process.pid, dialect, about)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _answering(
    command: Sequence[object], port: int, setting: Setting, own: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A server once it says that it is well; own is what it alone reads of its environment.

    Raises NoServer with the last that it said.
    """
    environment = {**os.environ, **QUIET, **(own or {})}
    log = setting.files / f"{port}.log"
    with (
        log.open("w") as file,
        started(command, env=environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        if not _is_well(f"http://127.0.0.1:{port}/health", process):
            said = log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "it said nothing")
            raise NoServer(f"it did not start ({process.poll()}): {last}")
        yield process


def _is_well(url: str, process: subprocess.Popen[str]) -> bool:
    deadline = time.monotonic() + STARTING_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)  # it has no other way to say that it is ready
        else:
            return True
    return False


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
    about: dict[str, Any] = field(default_factory=dict)
    peak_mib: float = 0.0
    trouble: str | None = None


def compete(setting: Setting, arguments: argparse.Namespace, workload: Workload) -> dict[str, Standing]:
    """Rounds in which every contestant that has not failed starts, is measured and ends. Raises Trouble."""
    standings = {name: Standing({streams: [] for streams in arguments.streams}) for name in arguments.contestants}
    for number in range(arguments.rounds):
        for name, standing in standings.items():
            if standing.trouble:
                continue
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                with CONTESTANTS[name](setting) as server:
                    standing.about = server.about
                    for streams, kept in standing.trials.items():
                        vocabulary = setting.loaded.tokenizer.tokens
                        kept.append(measure(server.url, workload, streams, vocabulary, server.dialect, server.pid))
                    standing.peak_mib = max(standing.peak_mib, peak_mib(server.pid))
            except TROUBLES as error:
                standing.trouble = in_one_line(error)
                require_a_race(standings)
                print(f"{name} is out: {standing.trouble}", file=sys.stderr, flush=True)
    return standings


def figures(standings: dict[str, Standing]) -> dict[str, Any]:
    """Who was in trouble has none: some rounds of one are no medians beside all of the others'."""
    return {
        name: {
            "about": standing.about,
            "peak_mib": round(standing.peak_mib),
            "trouble": standing.trouble,
            "cores_of_others": report.cores_of_others([each for trials in standing.trials.values() for each in trials]),
            "streams": {}
            if standing.trouble
            else {streams: report.over_http(trials) for streams, trials in standing.trials.items()},
        }
        for name, standing in standings.items()
    }


def require_a_race(standings: Mapping[str, Standing]) -> None:
    """Raises Trouble as soon as one of ours has failed, or all peers have, or all that there are."""
    peers = [name for name in standings if is_peer(name)]
    needed = [name for name in standings if name.startswith(OURS)]
    for all_of in (peers, list(standings)):
        if all(standings[name].trouble for name in all_of):
            needed += all_of
    for name in needed:
        if trouble := standings[name].trouble:
            raise Trouble(f"this is no race, and nothing is kept: {name}: {trouble}")


def is_peer(name: str) -> bool:
    return not name.startswith(OURS) and name not in NO_PEERS


def ratios(found: dict[str, Any]) -> dict[int, float]:
    """Our tokens per second over those of the quickest other with our weights, by the streams that both have served.

    Medians over the rounds of each round's ratio: a machine that slows down slows all in a round. None at all where a
    peer is out: it may have been the quickest.
    """
    if any(each["trouble"] for name, each in found.items() if is_peer(name)):
        return {}
    ours, theirs = (defaultdict[int, list[list[float]]](list) for _ in range(2))
    for name, each in found.items():
        if name not in NO_PEERS:
            for streams, row in each["streams"].items():
                (theirs if is_peer(name) else ours)[streams].append(row["rounds"])
    return {
        streams: round(statistics.median(map(truediv, _quickest(ours[streams]), _quickest(theirs[streams]))), 2)
        for streams in ours
        if streams in theirs
    }


def _quickest(contestants: list[list[float]]) -> list[float]:
    """Of each round."""
    return [max(rates) for rates in zip(*contestants, strict=True)]


def label(name: str) -> str:
    """The contestant, and why it is no peer if it is none."""
    return f"{name} ({NO_PEERS[name]})" if name in NO_PEERS else name


def table(result: Result) -> str:
    """Markdown: a line for each number of streams of each contestant; then the ratios, and who was in trouble."""
    found = result["contestants"]
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
    lines.append(f"ours over the quickest other, by streams: {result['ratios'] or 'not all of them have served'}")
    lines += [f"{name} is out: {each['trouble']}" for name, each in found.items() if each["trouble"]]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("benchmarks.race", "Our server and others with the same weights, client and requests.")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=150, metavar="N")
    parser.add_argument("--environments", type=Path, default=HERE / ".peers", metavar="FOLDER")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> Result:
    """Raises Trouble."""
    workload = Workload(arguments.requests, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as files:
        loaded = checkpoint.load(arguments.checkpoint)
        if workload.prompt_characters + workload.new_tokens > loaded.config.context_length:
            raise Trouble(f"prompt and text have to fit into {loaded.config.context_length}: llama.cpp has no window")
        setting = Setting(loaded, max(arguments.streams), arguments.threads, arguments.environments, Path(files))
        found = figures(compete(setting, arguments, workload))
    known = [each["cores_of_others"] for each in found.values() if each["cores_of_others"] is not None]
    return {
        "prompt_characters": workload.prompt_characters,
        "contestants": found,
        "ratios": ratios(found),
        "cores_of_others": max(known, default=None),  # beside whom it was worst
    }


def main(given: Sequence[str] | None = None) -> int:
    return 0 if take("race", parse(given), run, table) else 1


if __name__ == "__main__":
    sys.exit(main())
