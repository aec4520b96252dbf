"""The corpora are rebuilt from their sources, byte for byte, over a real connection or from a folder."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest

from training import corpora
from training.corpora import Corpus, CorpusUnavailable


def test_the_split_is_nanogpts(corpus: Corpus) -> None:
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert len(set(corpus.train + corpus.validation)) == 65


@pytest.fixture(scope="module")
def extended() -> Corpus:
    try:
        return corpora.load("shakespeare")
    except CorpusUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def plays(extended: Corpus) -> dict[str, bytes]:
    """What each play's file on the web holds."""
    found = {f"{play}.txt": corpora.at_hand(f"plays/{play}.txt") for play in corpora.PLAYS}
    return {name: path.read_bytes() for name, path in found.items() if path}


def test_the_extended_corpus_is_rebuilt_from_the_plays(corpus: Corpus, extended: Corpus) -> None:
    assert extended.digests["train"] == corpora.EXTENDED_SHA256
    assert len(extended.train) == 4_467_182
    assert extended.validation == corpus.validation
    assert extended.train.endswith(corpus.train)


def test_no_long_validation_line_occurs_in_the_training_text(corpus: Corpus, extended: Corpus) -> None:
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
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as address:
        yield address, tmp_path / "web"


@contextmanager
def serving(server: ThreadingTCPServer | ThreadingHTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without any corpus."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MOESCOPE_DATA", raising=False)
    return tmp_path / "work"


def serve_tiny(web: tuple[str, Path], corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny Shakespeare whole, where it is looked for; the folder that is served."""
    address, folder = web
    monkeypatch.setattr(corpora, "TINY_URL", f"{address}/input.txt")
    (folder / "input.txt").write_text(corpus.train + corpus.validation)
    return folder


def test_a_download_is_checked_and_needed_once(
    web: tuple[str, Path], bare: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = serve_tiny(web, corpus, monkeypatch)
    assert corpora.load("tinyshakespeare") == corpus
    (folder / "input.txt").unlink()
    assert corpora.load("tinyshakespeare") == corpus
    assert [path.name for path in (bare / "data").iterdir()] == ["tinyshakespeare.txt"]


def test_the_default_corpus_is_downloaded_play_by_play_and_built(
    web: tuple[str, Path],
    bare: Path,
    corpus: Corpus,
    extended: Corpus,
    plays: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, folder = web
    monkeypatch.setattr(corpora, "TINY_URL", f"{address}/input.txt")
    monkeypatch.setattr(corpora, "PLAYS_URL", f"{address}/plays")
    (folder / "input.txt").write_text(corpus.train + corpus.validation)
    (folder / "plays").mkdir()
    for name, content in plays.items():
        (folder / "plays" / name).write_bytes(content)

    (folder / "plays" / "hamlet.txt").write_bytes("Ce serveur est ferm\u00e9.".encode("latin-1"))
    with pytest.raises(CorpusUnavailable, match="28 plays is not the expected text"):
        corpora.load("shakespeare")
    assert not (bare / "data" / "plays").exists()

    (folder / "plays" / "hamlet.txt").write_bytes(plays["hamlet.txt"])
    assert corpora.load("shakespeare") == extended
    assert extended.digests["train"] == corpora.EXTENDED_SHA256
    assert {path.name for path in (bare / "data" / "plays").iterdir()} == set(plays)

    monkeypatch.setattr(corpora, "PLAYS_URL", "http://127.0.0.1:9")
    assert corpora.load("shakespeare") == extended


@pytest.mark.parametrize("wrong", [b"something else", "caf\u00e9".encode("latin-1")])
def test_a_wrong_download_is_refused_and_not_kept(
    web: tuple[str, Path], bare: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, wrong: bytes
) -> None:
    address, folder = web
    monkeypatch.setattr(corpora, "TINY_URL", f"{address}/input.txt")
    (folder / "input.txt").write_bytes(wrong)
    with pytest.raises(CorpusUnavailable, match="not the expected text"):
        corpora.load("tinyshakespeare")
    (folder / "input.txt").write_text(corpus.train + corpus.validation)
    assert corpora.load("tinyshakespeare") == corpus


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nFirst Citizen:\n", "IncompleteRead"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "SSH-2.0"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "Not Found"),
        (b"", "closed"),
    ],
)
def test_a_broken_download_is_one_line_that_says_what_to_do(
    bare: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, reason: str
) -> None:
    class Broken(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with serving(ThreadingTCPServer(("127.0.0.1", 0), Broken)) as address:
        monkeypatch.setattr(corpora, "TINY_URL", f"{address}/input.txt")
        with pytest.raises(CorpusUnavailable, match=reason) as caught:
            corpora.load("tinyshakespeare")
    assert "--data FILE" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(bare.iterdir())


def test_ranks_that_download_at_once_do_not_get_in_each_others_way(
    web: tuple[str, Path], bare: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_tiny(web, corpus, monkeypatch)
    all_wrote, write = threading.Barrier(3), Path.write_bytes

    def write_and_wait(path: Path, content: bytes) -> int:
        """A disk so slow that each rank has written when the first one goes on."""
        size = write(path, content)
        all_wrote.wait(60)
        return size

    monkeypatch.setattr(Path, "write_bytes", write_and_wait)
    with ThreadPoolExecutor(3) as ranks:
        assert list(ranks.map(corpora.load, ["tinyshakespeare"] * 3)) == [corpus] * 3
    assert [path.name for path in (bare / "data").iterdir()] == ["tinyshakespeare.txt"]


def test_without_a_network_one_sentence_says_what_to_do(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "TINY_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(CorpusUnavailable, match="--data FILE"):
        corpora.load("tinyshakespeare")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("emma1\nolivia", encoding="utf-8")
    plain = corpora.from_file(tmp_path / "plain.txt"), corpora.items_from_file(tmp_path / "plain.txt")
    (tmp_path / "plain.txt").write_text("emma1\nolivia", encoding="utf-8-sig")
    assert (corpora.from_file(tmp_path / "plain.txt"), corpora.items_from_file(tmp_path / "plain.txt")) == plain


def test_any_file_is_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text("abcdefghij")
    assert corpora.from_file(tmp_path / "verse.txt") == Corpus("verse", "abcdefghi", "j")
    with pytest.raises(CorpusUnavailable, match="cannot be read"):
        corpora.from_file(tmp_path / "none.txt")
    assert hashlib.sha256(b"j").hexdigest() == corpora.from_file(tmp_path / "verse.txt").digests["validation"]
