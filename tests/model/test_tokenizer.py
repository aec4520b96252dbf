"""One token per character, both ways, for us and for transformers; what cannot be spelled is named or folded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer, UnknownCharacters
from tests.checkpoints import CHARACTERS

TOKENIZER = Tokenizer.of_characters(CHARACTERS)


@given(st.text(alphabet=CHARACTERS))
def test_decoding_gives_the_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_ids_are_in_code_point_order() -> None:
    assert TOKENIZER.tokens == sorted(CHARACTERS)
    assert TOKENIZER.vocab_size == 65


def test_unknown_characters_are_named_with_their_positions() -> None:
    with pytest.raises(UnknownCharacters) as caught:
        TOKENIZER.encode("a5\u00e9b")
    assert caught.value.found == ((1, "5"), (2, "\u00e9"))
    assert "U+0035 at 1" in str(caught.value)


@pytest.mark.parametrize(
    ("foreign", "folded"),
    [
        ("caf\u00e9", "cafe"),
        ("\u201cHi\u201d \u2014 it\u2019s", "Hi - it's"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufb01nd\u2026", "find..."),
        ("\u4f60a1", "a"),
    ],
)
def test_folding_gives_the_nearest_text_that_can_be_spelled(foreign: str, folded: str) -> None:
    assert TOKENIZER.fold(foreign) == folded


@given(st.text())
def test_folded_text_can_always_be_spelled(text: str) -> None:
    folded = TOKENIZER.fold(text)
    assert TOKENIZER.decode(TOKENIZER.encode(folded)) == folded
    assert TOKENIZER.fold(folded) == folded


def test_transformers_reads_the_same_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in TOKENIZER.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "ROMEO:\n  But soft,  what light?\n\n"
    assert theirs.encode(text) == TOKENIZER.encode(text)
    assert theirs.decode(TOKENIZER.encode(text)) == text
