"""The closed loop that engine and server both get: each stream asks again when it has been answered. Knows neither."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

WARM_UP = 1 << 40
"""No request of a trial has so high a number."""
REQUESTS = "of a stream that is alone; of many each has fewer, so that all take about as long"


@dataclass(frozen=True)
class Request:
    """One continuation."""

    prompt: str
    seed: int
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """What each stream asks for, again and again. ``requests`` are those of a stream that is alone."""

    requests: int
    new_tokens: int = 150
    prompt_characters: int = 64
    first: int = 0

    def queues(self, vocabulary: Sequence[str], streams: int) -> list[list[Request]]:
        """The requests of each stream: the same on every call, and no two alike at any two numbers of streams."""
        characters = [token for token in vocabulary if len(token) == 1]
        each, first = self.each(streams), self.first + (streams << 20)
        numbers = [range(first + stream * each, first + (stream + 1) * each) for stream in range(streams)]
        return [[self._request(characters, number) for number in own] for own in numbers]

    def each(self, streams: int) -> int:
        """Requests of each of so many streams: a quarter for each of eight, so that all take about as long; 2 at least.

        A server makes more of many streams, but not as many times more.
        """
        return max(min(self.requests, 2), round(self.requests * math.pow(streams, -2 / 3)))

    def warm_up(self) -> Workload:
        return replace(self, requests=1, new_tokens=min(8, self.new_tokens), first=WARM_UP)

    def _request(self, characters: Sequence[str], number: int) -> Request:
        prompt = random.Random(number).choices(characters, k=self.prompt_characters)
        return Request("".join(prompt), number, self.new_tokens)
