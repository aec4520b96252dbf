"""The texts to train on: where they come from, the rule that builds them, and the SHA-256 that the result must have.

Sources are looked for in the folder that MOESCOPE_DATA names, then in ``data/``, and else downloaded. ``data/`` keeps
them once the text that is made of them has proved to be the expected one.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import re
import secrets
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from training import Refused

DATA = Path("data")
TRAIN_SHARE = 0.9
ITEMS_SEED = 1

TINY_FILE = "tinyshakespeare.txt"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VALIDATION_SHA256 = "c54f3753a4e6e3c3d1759212815a7caf826e68a33021b25312984400bed40a1f"
"""Of the last tenth of tiny Shakespeare, with which both corpora validate."""

PLAYS_URL = (
    "https://raw.githubusercontent.com/martin-gorner/tensorflow-rnn-shakespeare/"
    "25946cd6486e8a8f96d84edb200a8b8b6e961c27/shakespeare"
)
# The plays that tiny Shakespeare does not hold; its own nine, and five files that are no plays, are left out.
PLAYS = [
    "1kinghenryiv",
    "1kinghenryvi",
    "2kinghenryiv",
    "2kinghenryvi",
    "allswellthatendswell",
    "antonyandcleopatra",
    "asyoulikeit",
    "comedyoferrors",
    "cymbeline",
    "hamlet",
    "juliuscaesar",
    "kinghenryv",
    "kinghenryviii",
    "kingjohn",
    "kinglear",
    "loveslabourslost",
    "macbeth",
    "merchantofvenice",
    "merrywivesofwindsor",
    "midsummersnightsdream",
    "muchadoaboutnothing",
    "othello",
    "periclesprinceoftyre",
    "timonofathens",
    "titusandronicus",
    "troilusandcressida",
    "twelfthnight",
    "twogentlemenofverona",
]
EXTENDED_SHA256 = "396d0c6ceeee96da2b67f2c43c3df11f67444077048f0caf2eb06425c075ccd1"

NAMES = ("shakespeare", "tinyshakespeare")


class CorpusUnavailable(Refused):
    """A corpus cannot be had. One sentence that says what to do."""


@dataclass(frozen=True)
class Corpus:
    """A training text, a validation text that no training text holds, and the SHA-256 of both."""

    name: str
    train: str
    validation: str

    @property
    def digests(self) -> dict[str, str]:
        return {"train": _sha256(self.train.encode()), "validation": _sha256(self.validation.encode())}


def load(name: str) -> Corpus:
    """``tinyshakespeare``: nanoGPT's split. ``shakespeare``: 28 more plays to train on, the same validation text.

    Raises CorpusUnavailable.
    """
    if name not in NAMES:
        raise CorpusUnavailable(f"there is no corpus {name!r}; choose one of {', '.join(NAMES)} or give --data FILE")
    content = _source(TINY_FILE, TINY_URL)
    _require(content, TINY_SHA256, TINY_FILE)
    _keep({TINY_FILE: content})
    tiny = content.decode()
    cut = int(TRAIN_SHARE * len(tiny))
    train = tiny[:cut] if name == "tinyshakespeare" else extended(tiny)
    return Corpus(name, train, tiny[cut:])


def from_file(path: Path) -> Corpus:
    """Any text file: the first 90 % to train on, the rest to validate. Raises CorpusUnavailable."""
    text = _read(path)
    cut = int(TRAIN_SHARE * len(text))
    return Corpus(_name_of(path), text[:cut], text[cut:])


def items_from_file(path: Path) -> Corpus:
    """A text file of one item a line, such as names: 90 % of the items to train on, the rest to validate.

    The rule: lines are stripped, empty ones dropped, the others shuffled by ``random.Random(ITEMS_SEED)``, since lists
    are often sorted. Of the different items, in the order in which the shuffled lines name them, the last 10 % are held
    out; a repeated line goes with its item, so that no item is in both parts. Each part is its items joined by
    newlines, with a newline at both ends: every item begins after one and ends before one. Raises CorpusUnavailable.
    """
    lines = [line.strip() for line in _read(path).split("\n") if line.strip()]
    random.Random(ITEMS_SEED).shuffle(lines)
    items = list(dict.fromkeys(lines))
    held_out = set(items[int(TRAIN_SHARE * len(items)) :])
    train, validation = (
        "\n".join(["", *(line for line in lines if (line in held_out) is held), ""]) for held in (False, True)
    )
    return Corpus(_name_of(path), train, validation)


def extended(tiny: str) -> str:
    """The 28 plays that tiny Shakespeare lacks, in its form and its characters, then its own training part.

    Raises CorpusUnavailable.
    """
    known = set(tiny)
    sources = {f"plays/{play}.txt": _source(f"plays/{play}.txt", f"{PLAYS_URL}/{play}.txt") for play in PLAYS}
    plays = (as_dialogue(content.decode("latin-1")) for content in sources.values())
    blocks = ["".join(character for character in play if character in known) for play in plays]
    text = "\n".join([*blocks, tiny[: int(TRAIN_SHARE * len(tiny))]])
    _require(text.encode(), EXTENDED_SHA256, "the corpus of 28 plays")
    _keep(sources)
    return text


_DIRECTION = re.compile(r"\[[^\]]*\]?")
_FIRST_ACT = re.compile(r"\s*ACT\s+[IVX]+")
_HEADING = re.compile(r"\s*(ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION|CHORUS)\b")
_SPEECH = re.compile(r"(?P<speaker>[A-Za-z][^\t]{0,40})\t+(?P<line>.*\S)")


def as_dialogue(play: str) -> str:
    """A play in tiny Shakespeare's form, ``NAME:`` above the lines, without headings and stage directions.

    A source line is ``NAME<tab>line`` where a speech begins and ``<tab>line`` where it goes on.
    """
    without_directions = _DIRECTION.sub(lambda found: "\n" * found[0].count("\n"), play).replace("]", "")
    lines = [line for line in without_directions.split("\n") if line.strip()]
    acts = [index for index, line in enumerate(lines) if _FIRST_ACT.match(line)]
    written: list[str] = []
    in_speech = False
    for line in lines[acts[0] :] if acts else []:
        speech = None if _HEADING.match(line) else _SPEECH.match(line)
        if speech:
            written.append(f"\n{speech['speaker'].strip().rstrip(':')}:\n{speech['line'].strip()}\n")
        elif in_speech and line.startswith("\t") and not _HEADING.match(line):
            written.append(line.strip() + "\n")
            continue
        in_speech = speech is not None
    return "".join(written).lstrip("\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no letter
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusUnavailable(f"{path} cannot be read as UTF-8 text: {error}") from None


def _name_of(path: Path) -> str:
    """A name that a record and a line of text can hold: file names may be other than UTF-8, and have line breaks."""
    return "".join(character if character.isprintable() else "?" for character in path.stem)


def at_hand(name: str) -> Path | None:
    """Where a source is on this machine."""
    return next((folder / name for folder in _folders() if (folder / name).is_file()), None)


def _folders() -> list[Path]:
    return [*([Path(named)] if (named := os.environ.get("MOESCOPE_DATA")) else []), DATA]


def _source(name: str, url: str) -> bytes:
    path = at_hand(name)
    return path.read_bytes() if path else _download(url, DATA / name)


def _download(url: str, target: Path) -> bytes:
    print(f"downloading {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        # What was no HTTP is quoted by its error, line breaks and all; its repr stays on one line.
        reason = getattr(error, "reason", error) if isinstance(error, OSError) else repr(error)
        raise CorpusUnavailable(
            f"{url} cannot be downloaded ({reason}); give --data FILE, or put the file at {target}"
        ) from None
    return content


def _require(content: bytes, digest: str, name: str) -> None:
    if _sha256(content) != digest:
        raise CorpusUnavailable(
            f"{name} is not the expected text (SHA-256 {digest[:12]}...); "
            f"delete what {' or '.join(map(str, _folders()))} has of it and try again, or give --data FILE"
        )


def _keep(sources: dict[str, bytes]) -> None:
    """Write what is not at hand to ``data/``."""
    for name, content in sources.items():
        if at_hand(name):
            continue
        target = DATA / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: on a machine without the first rank, all ranks download at once.
        partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
        try:
            partial.write_bytes(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
