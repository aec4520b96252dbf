"""The closed loop that engine and server both get: each stream asks again when it has been answered. Knows neither."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Request:
    """One continuation."""

    prompt: str
    seed: int
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """What each stream asks for, again and again."""

    requests: int
    new_tokens: int = 150
    prompt_characters: int = 64

    def queues(self, vocabulary: Sequence[str], streams: int) -> list[list[Request]]:
        """The requests of each stream: every one has a prompt and a seed of its own, the same on every call."""
        characters = [token for token in vocabulary if len(token) == 1]
        numbers = [range(stream * self.requests, (stream + 1) * self.requests) for stream in range(streams)]
        return [[self._request(characters, number) for number in each] for each in numbers]

    def warm_up(self) -> Workload:
        return replace(self, requests=1, new_tokens=min(8, self.new_tokens))

    def _request(self, characters: Sequence[str], number: int) -> Request:
        prompt = random.Random(number).choices(characters, k=self.prompt_characters)
        return Request("".join(prompt), number, self.new_tokens)
