"""Text to token ids and back, in Hugging Face ``tokenizers`` format: characters, bytes or learnt byte pairs."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

FILE = "tokenizer.json"

LONGEST_PIECE = 1024
"""Bytes of a word that learning pairs takes as one: each merge moves the rest of its piece."""

PROBE = "a  b\n c"
"""Has what a rule for words may take away or put in."""

PIECE = 2**18
"""Characters of a text that are spelled at once, and some more to the next place where it can be cut."""

_WORD_END = re.compile(r"(?<=\S)[ \r\n]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

# The likeliest comes first, for a vocabulary that has it and not the plain one.
_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2019\u2018\u201a\u201b\u2032\u00b4\u02bc`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2013\u2012\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\r\u0085\u2028\u2029\u000b\u000c", "\n"),
        "\t": " ",
        "\u2026": "...",
    }
)


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabulary, which ``ByteLevel`` uses."""
    # 188 bytes stand for themselves; the others, in order, for the characters from U+0100 on.
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte if byte in plain else 0x100 + others.index(byte)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
_BYTE_OF = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


class UnknownCharacters(ValueError):
    """A text has characters that the vocabulary lacks. ``found`` holds (position, character), in order."""

    def __init__(self, found: Sequence[tuple[int, str]]) -> None:
        self.found = tuple(found)
        shown = ", ".join(f"U+{ord(character):04X} at {position}" for position, character in self.found[:10])
        super().__init__(f"the vocabulary has no {shown}")


class Speller:
    """The text of one sequence's ids as they come: a character is told with the token that brings its last byte."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token_id: int) -> str:
        """What this id adds to the text; nothing while its character lacks bytes."""
        return self._decoder.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """U+FFFD if the sequence ends inside a character, else nothing. The next id begins another text."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail


class Tokenizer:
    """A vocabulary with its rule.

    ``token_bytes`` are the UTF-8 bytes of the id at each index. ``tokens`` are for people, and no two are alike: the
    text of each id, or ``bytes:\\xc3`` and the like for one whose bytes alone are no text.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        ids = inner.get_vocab()
        spellings = sorted(ids, key=lambda token: ids[token])
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("the ids of its tokens are not 0, 1, 2, ...")
        self.is_of_bytes = isinstance(inner.decoder, decoders.ByteLevel)
        if inner.truncation or inner.padding or inner.normalizer:
            raise ValueError("it cuts, fills or rewrites the text before it spells it")
        if self.is_of_bytes and not ids.keys() >= set(BYTE_LETTERS):
            raise ValueError("it does not have all 256 bytes")
        self.token_bytes = [_bytes_of(each) if self.is_of_bytes else each.encode() for each in spellings]
        self.tokens = [_shown(each) for each in self.token_bytes]
        self._id_of_byte = {each[0]: index for index, each in enumerate(self.token_bytes) if len(each) == 1}
        words = inner.pre_tokenizer
        self._may_be_cut = (
            isinstance(words, pre_tokenizers.ByteLevel)
            and words.use_regex  # GPT-2's words
            and not words.add_prefix_space
            and not inner.get_added_tokens_decoder()  # which go before all words
        )
        self._id_of = {token: index for index, token in enumerate(self.tokens)}
        if len(self._id_of) != len(self.tokens):
            raise ValueError("two of its tokens are shown alike")
        if getattr(inner.model, "dropout", None):
            raise ValueError("it joins its pairs by chance")
        self._characters = frozenset(each for each in spellings if len(each) == 1)
        if self.is_of_bytes and self.decode(inner.encode(PROBE, add_special_tokens=False).ids) != PROBE:
            raise ValueError("it adds to the text or drops of it before it spells it")

    @classmethod
    def of_characters(cls, text: str) -> Tokenizer:
        """One token for every character that the text holds, in code point order."""
        vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        inner.decoder = decoders.Fuse()
        return cls(inner)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """One token for every byte, its id the byte's value: every text can be spelled."""
        vocabulary = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        return cls(_byte_level(models.BPE(vocabulary, [])))

    @classmethod
    def of_bpe(cls, text: str, vocab_size: int) -> Tokenizer:
        """All 256 bytes, and the byte pairs that joining the most frequent ones of a text gives (Sennrich et al. 2016).

        A text without so many pairs gives a smaller vocabulary.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}; the bytes alone are 256")
        inner = _byte_level(models.BPE())
        words = inner.pre_tokenizer
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_PIECE)])
        inner.train_from_iterator(
            _pieces(text),
            trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=BYTE_LETTERS, show_progress=False),
        )
        inner.pre_tokenizer = words  # the merges are for whole words
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        return cls(tokenizers.Tokenizer.from_file(str(folder / FILE)))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Raises UnknownCharacters when the text cannot be spelled; bytes spell every text but lone surrogates."""
        if self.is_of_bytes:
            if surrogates := [(found.start(), found[0]) for found in _SURROGATE.finditer(text)]:
                raise UnknownCharacters(surrogates)
            return self._encode_bytes(text)
        unknown = [
            (position, character) for position, character in enumerate(text) if character not in self._characters
        ]
        if unknown:
            raise UnknownCharacters(unknown)
        if len(self._characters) == len(self.tokens):  # one character a token: a table is ten times faster
            return [self._id_of[character] for character in text]
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def _encode_bytes(self, text: str) -> list[int]:
        """The library keeps some 280 bytes of notes for each of a text, so it never sees much of one at once."""
        if len(self.tokens) == 256:  # no pairs, so a table does
            return [self._id_of_byte[byte] for byte in text.encode()]
        pieces = _pieces(text) if self._may_be_cut else [text]
        return [each for piece in pieces for each in self._inner.encode(piece, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Their text; U+FFFD where bytes make no character."""
        return b"".join(self.token_bytes[token_id] for token_id in ids).decode(errors="replace")

    def speller(self) -> Speller:
        """For one sequence: it remembers the bytes that have no text yet."""
        return Speller(self.token_bytes)

    def fold(self, text: str) -> str:
        """The nearest text that the vocabulary can spell.

        What it has stays. Of the others accents go, quotes, dashes and line ends become plain ones, or likely
        ones where it has no plain ones, and the rest goes.

        Bytes spell every text, so it stays as it is but for lone surrogates.
        """
        if self.is_of_bytes:
            return _SURROGATE.sub("", text)
        if "\r" not in self._characters:
            text = text.replace("\r\n", "\n")  # one line end, not two
        return "".join(map(self._fold_character, text))

    def _fold_character(self, character: str) -> str:
        if character in self._characters:
            return character
        # In this order: the acute accent that stands for a quote would decompose to a space.
        for nearest in (character.translate(_PLAIN), unicodedata.normalize("NFKD", character)):
            if nearest != character and (folded := "".join(map(self._fold_character, nearest))):
                return folded
        likewise = (chr(fancy) for fancy, plain in _PLAIN.items() if plain == character)
        return next((each for each in likewise if each in self._characters), "")

    def files(self) -> dict[str, bytes]:
        """The files with which our own loader and ``AutoTokenizer`` read this tokenizer back."""
        # Without these settings transformers picks Qwen2's tokenizer and silently drops every space and newline.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return {
            FILE: self._inner.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        }


def _pieces(text: str) -> Iterator[str]:
    """A text cut where a space or line end follows what is none: GPT-2's words end there whatever is around them."""
    start = 0
    while len(text) - start > PIECE and (found := _WORD_END.search(text, start + PIECE)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _bytes_of(spelling: str) -> bytes:
    """The bytes of a token as ``ByteLevel`` spells it. Raises ValueError for another spelling."""
    try:
        return bytes(_BYTE_OF[letter] for letter in spelling)
    except KeyError as error:
        raise ValueError(f"its token {spelling!r} has {error}, which stands for no byte") from None


def _shown(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
