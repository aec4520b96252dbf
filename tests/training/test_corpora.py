"""The corpora are rebuilt from their sources, byte for byte, over a real connection or from a folder."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from training import corpora
from training.corpora import Corpus, CorpusUnavailable


def test_the_split_is_nanogpts(corpus: Corpus) -> None:
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert len(set(corpus.train + corpus.validation)) == 65


def test_the_extended_corpus_is_rebuilt_from_the_plays(corpus: Corpus) -> None:
    try:
        extended = corpora.load("shakespeare")
    except CorpusUnavailable as missing:
        pytest.skip(str(missing))
    assert extended.digests["train"] == corpora.EXTENDED_SHA256
    assert len(extended.train) == 4_467_182
    assert extended.validation == corpus.validation
    assert extended.train.endswith(corpus.train)


def test_no_long_validation_line_occurs_in_the_training_text(corpus: Corpus) -> None:
    try:
        extended = corpora.load("shakespeare")
    except CorpusUnavailable as missing:
        pytest.skip(str(missing))
    lines = {line for line in extended.train.splitlines() if sum(map(str.isalpha, line)) > 25}
    assert not lines & {line for line in corpus.validation.splitlines() if sum(map(str.isalpha, line)) > 25}


@pytest.mark.parametrize(
    ("play", "dialogue"),
    [
        ("ACT I\nSCENE I\tA hall\nA\tGood day.\n\tAnd night.\n", "A:\nGood day.\nAnd night.\n"),
        ("THE CAST\nA\tnobody yet\nACT I\nA\tHi [aside]\nB\tHo\n", "A:\nHi\n\nB:\nHo\n"),
        ("ACT I\nA\tHi\n\t[Exit\n\tall]\n\tgone\nSCENE II\n\tnobody speaks here\n", "A:\nHi\ngone\n"),
    ],
)
def test_the_rule_makes_dialogue(play: str, dialogue: str) -> None:
    assert corpora.as_dialogue(play) == dialogue


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder on a loopback web server."""
    (tmp_path / "web").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "web"
    server.shutdown()
    server.server_close()


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without any corpus."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MOESCOPE_DATA", raising=False)
    return tmp_path / "work"


def test_a_download_is_checked_and_needed_once(
    web: tuple[str, Path], bare: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = web
    monkeypatch.setattr(corpora, "TINY_URL", f"{address}/input.txt")
    (folder / "input.txt").write_text(corpus.train + corpus.validation)
    assert corpora.load("tinyshakespeare") == corpus
    (folder / "input.txt").unlink()
    assert corpora.load("tinyshakespeare") == corpus
    assert [path.name for path in (bare / "data").iterdir()] == ["tinyshakespeare.txt"]


def test_a_wrong_download_is_refused(web: tuple[str, Path], bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = web
    monkeypatch.setattr(corpora, "TINY_URL", f"{address}/input.txt")
    (folder / "input.txt").write_text("something else")
    with pytest.raises(CorpusUnavailable, match="not the expected text"):
        corpora.load("tinyshakespeare")


def test_without_a_network_one_sentence_says_what_to_do(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "TINY_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(CorpusUnavailable, match="--data FILE"):
        corpora.load("tinyshakespeare")


def test_any_file_is_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text("abcdefghij")
    assert corpora.from_file(tmp_path / "verse.txt") == Corpus("verse", "abcdefghi", "j")
    with pytest.raises(CorpusUnavailable, match="cannot be read"):
        corpora.from_file(tmp_path / "none.txt")
    assert hashlib.sha256(b"j").hexdigest() == corpora.from_file(tmp_path / "verse.txt").digests["validation"]
