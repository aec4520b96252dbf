"""``python -m benchmarks.capacity``: how many requests a second replicas take, simulated on measured step times.

Requests come by chance (Poisson) and want texts of a mean length (exponential). A replica decodes all its rows in one
step; how long that takes is interpolated from what ``python -m benchmarks`` has measured of the engine, whose rates
include the reading of prompts. Who finds no slot waits, who finds no place in any queue is refused. Each goes to the
emptier of two replicas, as with Ray. HTTP, proxy and network cost nothing here. Prints the table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

from benchmarks.record import RESULTS, Result, Trouble, kept, refusing

StepTime = Callable[[int], float]
"""Seconds of a step with so many rows."""

MOST_REFUSED = 0.001
TRIES = 9
A_DAY_S = 86_400
PEAK = 3  # times the mean of the day


def step_times(tokens_per_second: dict[int, float]) -> StepTime:
    """From the rates at some numbers of rows; straight lines between them, and onwards from the last two."""
    rows = sorted(tokens_per_second)
    seconds = [each / tokens_per_second[each] for each in rows]

    def step_s(count: int) -> float:
        at = next((place for place, each in enumerate(rows[1:-1], start=1) if each >= count), len(rows) - 1)
        slope = (seconds[at] - seconds[at - 1]) / (rows[at] - rows[at - 1])
        return seconds[at - 1] + slope * (count - rows[at - 1])

    return step_s


@dataclass(frozen=True)
class Service:
    replicas: int
    slots: int
    queue: int
    step_s: StepTime


@dataclass(frozen=True)
class Outcome:
    """What clients saw. first_token_s are seconds from asking, in order; token_s is the mean from one to the next."""

    first_token_s: list[float]
    token_s: float
    refused: float

    def p95(self) -> float:
        return quantiles(self.first_token_s, n=20)[-1]


@dataclass
class Replica:
    """Rows leave at a step that is known when they come, so a step costs no work for each of them."""

    step: int = 0
    ends: list[int] = field(default_factory=list)  # heap of the steps with which rows end
    waiting: deque[tuple[float, int]] = field(default_factory=deque)
    fresh: list[float] = field(default_factory=list)  # when those asked who get their first token with this step
    is_busy: bool = False

    @property
    def load(self) -> int:
        return len(self.ends) + len(self.waiting)

    def admit(self, slots: int) -> None:
        while self.waiting and len(self.ends) < slots:
            asked_at, tokens = self.waiting.popleft()
            heapq.heappush(self.ends, self.step + tokens)
            self.fresh.append(asked_at)


def simulate(service: Service, per_second: float, *, requests: int, tokens: float, seed: int = 0) -> Outcome:
    chance = random.Random(seed)
    replicas = [Replica() for _ in range(service.replicas)]
    events: list[tuple[float, int, Replica | None]] = [(chance.expovariate(per_second), 0, None)]
    first_token_s: list[float] = []
    number, arrived, refused, row_seconds, row_steps = 0, 0, 0, 0.0, 0
    while events:
        now, _, stepped = heapq.heappop(events)
        replica = stepped
        if stepped:
            first_token_s += [now - asked_at for asked_at in stepped.fresh]
            stepped.fresh.clear()
            stepped.step += 1
            while stepped.ends and stepped.ends[0] <= stepped.step:
                heapq.heappop(stepped.ends)
            stepped.is_busy = False
        else:
            arrived += 1
            replica = _choose(replicas, service, chance)
            if replica:
                replica.waiting.append((now, max(1, round(chance.expovariate(1 / tokens)))))
            else:
                refused += 1
            if arrived < requests:
                number += 1
                heapq.heappush(events, (now + chance.expovariate(per_second), number, None))
        if replica and not replica.is_busy:
            replica.admit(service.slots)
            if rows := len(replica.ends):
                seconds = service.step_s(rows)
                row_seconds, row_steps = row_seconds + rows * seconds, row_steps + rows
                number, replica.is_busy = number + 1, True
                heapq.heappush(events, (now + seconds, number, replica))
    return Outcome(first_token_s, row_seconds / row_steps, refused / arrived)


def _choose(replicas: Sequence[Replica], service: Service, chance: random.Random) -> Replica | None:
    """The emptier of two; where both are full the emptiest of all, or none."""
    two = chance.sample(replicas, min(2, len(replicas)))
    best = min(two, key=lambda each: each.load)
    if best.load >= service.slots + service.queue:
        best = min(replicas, key=lambda each: each.load)
    return best if best.load < service.slots + service.queue else None


def most_per_second(service: Service, *, within_s: float, requests: int, tokens: float) -> tuple[float, Outcome]:
    """The highest rate at which 95 of 100 have their first token within the time, and hardly anybody is refused."""
    low, high = 0.0, 1.2 * service.replicas * service.slots / (tokens * service.step_s(service.slots))
    found = simulate(service, high / 1000, requests=requests, tokens=tokens)
    for _ in range(TRIES):
        rate = (low + high) / 2
        outcome = simulate(service, rate, requests=requests, tokens=tokens)
        if outcome.p95() <= within_s and outcome.refused <= MOST_REFUSED:
            low, found = rate, outcome
        else:
            high = rate
    return low, found


def measured_rates(file: Path | None, results: Path = RESULTS) -> tuple[Path, Result]:
    """A record of the engine's rates, the newest there is unless one is named. Raises Trouble, OSError."""
    for path in [file] if file else kept("http", results):
        try:
            record: Result = json.loads(path.read_text())
            if len([each["engine"]["tokens_per_second"] for each in record["figures"]]) > 1:
                return path, record
        except (ValueError, KeyError, TypeError):  # the record of something else
            continue
    raise Trouble(
        f"{file or results} has no rates of the engine at several numbers of streams: run python -m benchmarks"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity", description="How many requests a second replicas can take."
    )
    parser.add_argument(
        "--engine", type=Path, metavar="FILE", help="a record of python -m benchmarks; or else the newest"
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--queue", type=int, default=256)
    parser.add_argument("--tokens", type=float, default=150, help="mean length of a text")
    parser.add_argument("--within-s", type=float, default=0.5, help="95 of 100 first tokens come in this time")
    parser.add_argument("--texts-a-day", type=float, default=5, help="of one user; at the peak three times as dense")
    parser.add_argument("--requests", type=int, default=4000, help="simulated for each replica, 4,000 at least in all")
    asked = parser.parse_args(arguments)
    found = refusing("capacity", lambda: measured_rates(asked.engine))
    if found is None:
        return 1
    path, measured = found
    step_s = step_times({each["streams"]: each["engine"]["tokens_per_second"] for each in measured["figures"]})
    print(f"{measured['runner']}, {measured['threads']} threads a replica, {path.name}\n")
    print("| replicas | slots each | requests/s | first token, p95 | between tokens | users |")
    print("|---|---|---|---|---|---|")
    for slots in asked.slots:
        for replicas in asked.replicas:
            service = Service(replicas, slots, asked.queue, step_s)
            requests = max(4000, asked.requests * replicas)
            rate, outcome = most_per_second(service, within_s=asked.within_s, requests=requests, tokens=asked.tokens)
            users = rate * A_DAY_S / PEAK / asked.texts_a_day
            first, following = 1000 * outcome.p95(), 1000 * outcome.token_s
            print(f"| {replicas} | {slots} | {rate:.1f} | {first:.0f} ms | {following:.1f} ms | {users:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
