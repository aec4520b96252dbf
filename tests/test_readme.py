"""What the README tells a newcomer to type works as it stands, but for the port, which is a free one here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evidence import Evidence
from tests.examples import examples_of
from tests.service.serving import Server
from training.corpora import Corpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="no curl on this machine")


def block(language: str, index: int = 0) -> str:
    return [example.code for example in examples_of(ROOT / "README.md") if example.language == language][index]


@pytest.fixture(scope="module")
def server(shipped: Server) -> Server:
    return shipped


def streamed(curl_output: str) -> str:
    events = [json.loads(line.removeprefix("data:")) for line in curl_output.splitlines() if line.startswith("data:")]
    return "".join(event["text"] for event in events if "index" in event)


def share_of_known_words(text: str, corpus: Corpus) -> float:
    """Of the words of four or more letters, those that occur in the corpus; the last may be cut off and is left out."""
    known = set(re.findall(r"[a-z]+", (corpus.train + corpus.validation).lower()))
    words = [word for word in re.findall(r"[a-z]+", text.lower())[:-1] if len(word) >= 4]
    assert len(words) >= 20
    return sum(word in known for word in words) / len(words)


@needs_curl
def test_the_curl_line_streams_text_in_the_words_of_the_corpus(
    server: Server, corpus: Corpus, evidence: Evidence
) -> None:
    line = block("sh").replace(":8000", f":{server.port}")
    run = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    text = streamed(run.stdout)
    share = share_of_known_words(text, corpus)
    evidence("characters streamed by the README's curl line", len(text))
    evidence("share of its longer words that occur in the corpus", share)
    assert len(text) >= 200
    assert share >= 0.85


@needs_curl
@pytest.mark.parametrize("index", [0, 1], ids=["standard library", "openai"])
def test_the_python_lines_print_the_same_text(server: Server, index: int) -> None:
    program = block("python", index).replace(":8000", f":{server.port}")
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert printed.returncode == 0, printed.stderr
    line = block("sh").replace(":8000", f":{server.port}")
    assert printed.stdout == streamed(subprocess.run(shlex.split(line), capture_output=True, text=True).stdout)


def test_the_readme_gives_the_loss_on_record() -> None:
    record = json.loads((ROOT / "checkpoints" / "shakespeare" / "training.json").read_text())
    assert f"**{record['validation_loss']:.4f}**" in README


def test_every_link_and_path_of_the_readme_exists() -> None:
    paths = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`([a-z]+/[a-z/]*)`", README)
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]
