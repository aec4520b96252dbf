"""Characters, bytes and byte pairs, both ways, for us and for transformers; what has no spelling is named or folded."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.tokenizer import BYTE_LETTERS, FILE, Tokenizer, UnknownCharacters, _pieces
from tests.checkpoints import CHARACTERS

TOKENIZER = Tokenizer.of_characters(CHARACTERS)
TEXTS = ("ROMEO:\n  But soft,  what light?\n\n", " caf\u00e9 ", "a\r\n\tb", "\U0001f642\u20ac \u4f60\u597d, e\u0301")
OF_BYTES = [Tokenizer.of_bytes(), Tokenizer.of_bpe("".join(TEXTS) * 3, 290)]


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
        ("\u00b4Tis \ufe58 \u2033", "'Tis - ''"),
        ("\u4f60a1", "a"),
    ],
)
def test_folding_gives_the_nearest_text_that_can_be_spelled(foreign: str, folded: str) -> None:
    assert TOKENIZER.fold(foreign) == folded


@pytest.mark.parametrize(
    ("vocabulary", "foreign", "folded"),
    [
        ("its \u2018\u2019", "it's", "it\u2019s"),
        ("a\u2014", "a\ufe58-", "a\u2014\u2014"),
        ("a\u2032", "a\u2033a", "a\u2032\u2032a"),
        ("a\r\n", "a\u2028\u00a0", "a\n"),
        ("ab", "a'-\r\nb", "ab"),
    ],
)
def test_what_is_plain_is_what_the_vocabulary_has(vocabulary: str, foreign: str, folded: str) -> None:
    assert Tokenizer.of_characters(vocabulary).fold(foreign) == folded


def test_of_tokens_of_several_characters_only_single_ones_are_known_to_be_spelled() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"ab": 0, "bc": 1, "c": 2}, unk_token="c"))
    with pytest.raises(UnknownCharacters, match=r"U\+0061 at 1$"):
        Tokenizer(inner).encode("ca")


@example("\r\n")
@given(st.text("\u2019\u2014\t\u2026b\u201c\u00e9e\r\n \u00a0\ufb01"))
def test_what_the_vocabulary_has_is_not_folded(text: str) -> None:
    assert Tokenizer.of_characters(text + "a").fold(text) == text


@given(st.text())
def test_folded_text_can_always_be_spelled(text: str) -> None:
    folded = TOKENIZER.fold(text)
    assert TOKENIZER.decode(TOKENIZER.encode(folded)) == folded
    assert TOKENIZER.fold(folded) == folded


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return folder


def test_transformers_reads_the_same_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(written(TOKENIZER, tmp_path)))
    text = "ROMEO:\n  But soft,  what light?\n\n"
    assert theirs.encode(text) == TOKENIZER.encode(text)
    assert theirs.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("tokenizer", OF_BYTES)
def test_transformers_reads_bytes_as_we_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(written(tokenizer, tmp_path)))
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids == tokenizer.encode(text)
        assert theirs.decode(ids) == ours.decode(ids) == text
    broken = tokenizer.encode(TEXTS[-1])[1:-1] * 2
    assert theirs.decode(broken) == ours.decode(broken)


@pytest.mark.parametrize("tokenizer", OF_BYTES)
@given(text=st.text())
def test_bytes_spell_every_text_and_nothing_is_folded(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[token_id] for token_id in ids) == text.encode()
    assert tokenizer.fold(text) == text


@pytest.mark.parametrize("tokenizer", [TOKENIZER, *OF_BYTES])
@given(data=st.data())
def test_a_speller_tells_piece_by_piece_what_the_whole_decodes_to(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    spell = tokenizer.speller()
    told = "".join(map(spell, ids)) + spell.finish()
    assert told == b"".join(tokenizer.token_bytes[token_id] for token_id in ids).decode("utf-8", errors="replace")
    assert told == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, *OF_BYTES])
def test_a_lone_surrogate_is_no_character_of_any_vocabulary(tokenizer: Tokenizer) -> None:
    text = "caf\udce9s"  # what Python makes of an argument in Latin-1
    with pytest.raises(UnknownCharacters, match=r"U\+DCE9 at 3") as caught:
        tokenizer.encode(text)
    assert caught.value.found == ((3, "\udce9"),)
    assert tokenizer.fold(text) == "cafs"


def test_a_character_is_told_with_its_last_byte_and_half_a_one_at_the_end() -> None:
    spell = Tokenizer.of_bytes().speller()
    assert [spell(byte) for byte in "\u20aca".encode()] == ["", "", "\u20ac", "a"]
    assert [spell(byte) for byte in "\u20ac".encode()[:2]] == ["", ""]
    assert spell.finish() == "\ufffd"
    assert (spell(ord("a")), spell.finish()) == ("a", "")


def test_a_byte_is_its_own_id_and_shown_so_that_no_two_tokens_are_alike() -> None:
    tokenizer = Tokenizer.of_bytes()
    assert tokenizer.encode("a\u00e9\n") == [97, 0xC3, 0xA9, 10]
    assert tokenizer.token_bytes == [bytes([byte]) for byte in range(256)]
    assert (tokenizer.tokens[97], tokenizer.tokens[10], tokenizer.tokens[0xC3]) == ("a", "\n", "bytes:\\xc3")
    assert len(set(tokenizer.tokens)) == 256


def test_pairs_are_learnt_from_a_text_on_top_of_all_bytes() -> None:
    learnt = Tokenizer.of_bpe(" the theatre, the thesis" * 20, 260)
    assert learnt.vocab_size == 260
    assert {bytes([byte]) for byte in range(256)} < set(learnt.token_bytes)
    assert " the" in learnt.tokens
    assert [learnt.tokens[token_id] for token_id in learnt.encode(" the the")] == [" the", " the"]
    assert Tokenizer.of_bpe("ab", 1000).vocab_size == 257


def test_long_lines_without_spaces_are_learnt_in_pieces_and_ordinary_text_as_it_was() -> None:
    def learn(text: str) -> tuple[Tokenizer, float]:
        started = time.process_time()
        return Tokenizer.of_bpe(text, 600), time.process_time() - started

    letters = random.Random(1).choices("ACGT", k=120_000)
    lines = ["".join(letters[start : start + 1000]) for start in range(0, len(letters), 1000)]
    (_, seconds), (of_one_line, seconds_of_one_line) = learn("\n".join(lines)), learn("".join(lines))
    assert seconds_of_one_line < 4 * seconds
    assert of_one_line.vocab_size == 600

    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=BYTE_LETTERS, show_progress=False)
    plain.train_from_iterator([text], trainer)
    assert Tokenizer.of_bpe(text, 600).files()["tokenizer.json"] == plain.to_str(pretty=True).encode()


def test_a_long_text_is_spelled_in_pieces_and_as_the_library_does_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS) * 20 + (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    text += "So, he said, they'll.\r\n\r\n x_1\u2028!\x1c \u0301 9\n" * 9
    learnt = Tokenizer.of_bpe(text, 600)
    for tokenizer in (Tokenizer.of_bytes(), learnt):
        whole = tokenizers.Tokenizer.from_str(tokenizer.files()[FILE].decode()).encode(text).ids
        for piece in (1, 50, 1000):
            monkeypatch.setattr("model.tokenizer.PIECE", piece)
            assert tokenizer.encode(text) == whole
            assert tokenizer.encode("") == []
            assert Tokenizer.of_bpe(text, 600).files() == learnt.files()
    monkeypatch.setattr("model.tokenizer.PIECE", 1)
    assert max(map(len, _pieces("in a line. \n" * 100))) <= 8
    # Of other rules for words nobody knows where they may be cut: this one takes a line end to the word before it.
    other = tokenizers.Tokenizer.from_str(Tokenizer.of_bpe("end.\nend.\n" * 9, 300).files()[FILE].decode())
    words = pre_tokenizers.Split(tokenizers.Regex(r"\w+\n?|\W"), behavior="isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=BYTE_LETTERS, show_progress=False)
    other.train_from_iterator(["end\n" * 9], trainer)
    assert Tokenizer(other).encode("end\nend\nend") == other.encode("end\nend\nend").ids


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="256"):
        Tokenizer.of_bpe("ab", 255)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}, "cuts"),
        ({"normalizer": {"type": "Lowercase"}}, "rewrites"),
        ({"model": {"vocab": {"a": 0}, "merges": []}}, "all 256 bytes"),
    ],
)
def test_a_file_that_would_change_the_text_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    rule = json.loads(Tokenizer.of_bytes().files()["tokenizer.json"])
    for key, value in change.items():
        rule[key] = rule[key] | value if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(rule))
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"dropout": 0.1}}, "by chance"),
        ({"pre_tokenizer": {"add_prefix_space": True}}, "adds to the text"),
    ],
)
@pytest.mark.parametrize("vocab_size", [256, 260])
def test_a_rule_that_spells_another_text_or_by_chance_is_refused(
    tmp_path: Path, vocab_size: int, change: dict[str, dict[str, object]], message: str
) -> None:
    rule = json.loads(Tokenizer.of_bpe("ab ba " * 50, vocab_size).files()[FILE])
    for part, values in change.items():
        rule[part] |= values
    (tmp_path / FILE).write_text(json.dumps(rule))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_a_text_is_what_its_tokens_spell_whatever_the_file_says_of_decoding(tmp_path: Path) -> None:
    rule = json.loads(TOKENIZER.files()[FILE])
    (tmp_path / FILE).write_text(json.dumps({**rule, "decoder": None}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("To be")) == "To be"
