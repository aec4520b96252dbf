"""Whether a text was copied: the longest passage that it shares, character for character, with another."""

from __future__ import annotations


def longest_overlap(sample: str, text: str) -> str:
    """The longest passage of sample that text holds verbatim; the first one of several.

    One pass: a passage that starts later counts only if it is longer than the best so far, so every question is whether
    text holds one string, and that is a search in C: an automaton over 5 MB in Python would take longer to build.
    """
    best, start = "", 0
    while start + len(best) < len(sample):
        longer = sample[start : start + len(best) + 1]
        if longer in text:
            best = longer
        else:
            start += 1
    return best
