"""``python -m benchmarks.interop``: do other engines write our greedy text from our files?

llama.cpp gets the GGUF that ``training export`` writes, vLLM and transformers the folder as it is. Two orders of
summation differ by about 1e-6, so where our two likeliest characters are that close a text may part; the report tells
how close they were. No text is longer than the context: llama.cpp has no window.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environments
from benchmarks.environments import PEERS, Peer, interpreter_of, run_quietly
from benchmarks.record import refusing
from model import checkpoint
from model.checkpoint import Checkpoint
from training import gguf_export
from training.sample import stream

SCRIPTS = Path(__file__).parent / "peers"
PROMPTS = ("ROMEO:\n", "JULIET:\nO ", "First Citizen:\n", "To be, or not to be")


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


def texts_of(peer: Peer, python: Path, request: dict[str, Any], folder: Path) -> list[str]:
    """Raises PeerFailed."""
    asked, answered = folder / "request.json", folder / f"{peer.package}.json"
    asked.write_text(json.dumps(request))
    run_quietly([python, SCRIPTS / peer.script, asked, answered], f"asking {peer.package}")
    texts: list[str] = json.loads(answered.read_text())
    return texts


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
    parser.add_argument("--environments", type=Path, default=environments.FOLDER, metavar="FOLDER")
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
