"""Finds stop strings in a text as it grows, and holds back what may yet turn out to begin one. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from service.engine.sequence import DrawnToken


def release(held: list[DrawnToken], stop: Sequence[str]) -> tuple[list[DrawnToken], bool]:
    """Take out of ``held`` the tokens that may be told, and say whether a stop string has appeared.

    A stop string and what follows are dropped, the earliest one counts, and a token it cuts in two keeps its beginning.
    """
    text = "".join(token.text for token in held)
    places = [place for each in stop if (place := text.find(each)) >= 0]
    if places:
        return _cut(held, min(places)), True
    certain = len(text) - max((_overlap(text, each) for each in stop), default=0)
    lengths, count = 0, 0
    for token in held:
        lengths += len(token.text)
        if lengths > certain:
            break
        count += 1
    if count == len(held):
        while count and not held[count - 1].text:  # part of a character, which may be the stop string's first
            count -= 1
    return _take(held, count), False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are a beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def _take(held: list[DrawnToken], count: int) -> list[DrawnToken]:
    taken, held[:] = held[:count], held[count:]
    return taken


def _cut(held: list[DrawnToken], length: int) -> list[DrawnToken]:
    """The tokens of the first ``length`` characters."""
    kept = []
    for token in _take(held, len(held)):
        if not length:  # before the token is looked at: one without text may be the stop string's first byte
            break
        text = token.text[:length]
        length -= len(text)
        kept.append(replace(token, text=text))
    return kept
