"""Who runs in the race: our server and others', each started, asked in its own words, and ended. Knows no figures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import llama_server
from benchmarks.client import Dialect, openai
from benchmarks.environments import PEERS, QUIET, interpreter_of, versions_of
from benchmarks.over_http import NoServer, server_process, started
from model.checkpoint import Checkpoint
from training import gguf_export

OURS, EMPTY, ROUNDED = "Moescope", "empty server", "llama.cpp Q8_0"
NO_PEERS = {EMPTY: "no model", ROUNDED: "other weights"}
"""Who runs beside the race, and why: our rate is over none of theirs."""

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
    with log.open("w") as file, started(command, env=environment, stdout=file, stderr=subprocess.STDOUT) as process:
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
        except OSError:
            time.sleep(0.5)  # it has no other way to say that it is ready
        else:
            return True
    return False


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


def is_peer(name: str) -> bool:
    return not name.startswith(OURS) and name not in NO_PEERS


def label(name: str) -> str:
    """The contestant, and why it is no peer if it is none."""
    return f"{name} ({NO_PEERS[name]})" if name in NO_PEERS else name
