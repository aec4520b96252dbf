"""Text to token ids and back, in Hugging Face ``tokenizers`` format; one token per character by default."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

FILE = "tokenizer.json"

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u02bc`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u0085\u2028\u2029\u000b\u000c", "\n"),
        "\t": " ",
        "\u2026": "...",
    }
)


class UnknownCharacters(ValueError):
    """A text has characters that the vocabulary lacks. ``found`` holds (position, character), in order."""

    def __init__(self, found: Sequence[tuple[int, str]]) -> None:
        self.found = tuple(found)
        shown = ", ".join(f"U+{ord(character):04X} at {position}" for position, character in self.found[:10])
        super().__init__(f"the vocabulary has no {shown}")


class Tokenizer:
    """A vocabulary with its rule. Every string of ``tokens`` is the text of the id at its index."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        ids = inner.get_vocab()
        self.tokens = sorted(ids, key=lambda token: ids[token])
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("the ids of its tokens are not 0, 1, 2, ...")
        self._characters = frozenset("".join(self.tokens))
        self._id_of = {token: ids[token] for token in self.tokens}

    @classmethod
    def of_characters(cls, text: str) -> Tokenizer:
        """One token for every character that the text holds, in code point order."""
        vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        inner.decoder = decoders.Fuse()
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        return cls(tokenizers.Tokenizer.from_file(str(folder / FILE)))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Raises UnknownCharacters when the text cannot be spelled."""
        unknown = [
            (position, character) for position, character in enumerate(text) if character not in self._characters
        ]
        if unknown:
            raise UnknownCharacters(unknown)
        if len(self._characters) == len(self.tokens):  # one character a token: a table is ten times faster
            return [self._id_of[character] for character in text]
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def fold(self, text: str) -> str:
        """The nearest text that the vocabulary can spell: no accents, plain quotes, dashes and line ends, no others."""
        plain = text.replace("\r\n", "\n").replace("\r", "\n").translate(_PLAIN)
        return "".join(self._fold_character(character) for character in plain)

    def _fold_character(self, character: str) -> str:
        if character in self._characters:
            return character
        decomposed = unicodedata.normalize("NFKD", character).translate(_PLAIN)
        return "".join(part for part in decomposed if part in self._characters)

    def files(self) -> dict[str, bytes]:
        """The files with which our own loader and ``AutoTokenizer`` read this tokenizer back."""
        # Without these settings transformers picks Qwen2's tokenizer and silently drops every space and newline.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return {
            FILE: self._inner.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        }
