"""A few people who use the service in different ways, so that its dashboards have something to show: ``make traffic``.

Needs Python alone, so that it runs in the service's own image. Knows the HTTP interface, nothing of the code behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import Any, Final

PATIENCE_S: Final = 60.0
GAVE_UP: Final = 1
OPENINGS: Final = (
    *(
        "",
        "ROMEO:\n",
        "JULIET:\nO ",
        "KING HENRY:\nOnce more ",
        "First Citizen:\nBefore we proceed",
        "HAMLET:\nTo be, or",
    ),
    *("Enter two murderers.\n", "What light through ", "ACT I.\n\nSCENE I. ", "All:\nSpeak, speak!\n\n"),
)
WORDS: Final = ("the", "sun", "that", "lights", "our", "house", "shall", "never", "see", "so", "sweet", "a", "night")

Body = dict[str, Any]


class Person:
    """Sends one request after the other and reads the answers, until the bell rings. Its seed decides what it asks."""

    def __init__(self, url: str, model: Body, seed: int, tally: Counter[str], bell: threading.Event) -> None:
        self._url = url
        self._model = model
        self._random = random.Random(seed)
        self._tally = tally
        self._bell = bell

    def live(self) -> None:
        while not self._bell.is_set():
            pause = self._random.expovariate(2.0)  # half a second on average
            try:
                self._tally[self._ask()] += 1
            except urllib.error.HTTPError as refusal:
                refusal.close()
                self._tally["refused"] += 1
                pause = max(pause, float(refusal.headers.get("Retry-After") or 0))
            except (OSError, HTTPException):  # it restarts, or is being upgraded: come back
                self._tally["unanswered"] += 1
                pause = 1.0
            self._bell.wait(pause)

    def _ask(self) -> str:
        """One request; how it went. Raises HTTPError, OSError and HTTPException."""
        body = wish(self._random, self._model)
        leaves_after = self._random.randint(1, 40) if body["stream"] and self._random.random() < 0.1 else None
        with post(self._url, body) as answer:
            for events, line in enumerate(answer):
                if self._bell.is_set() or (
                    leaves_after is not None and line.startswith(b"data:") and events > leaves_after
                ):
                    return "left early"
        return "answered"


def wish(chance: random.Random, model: Body) -> Body:
    """A body for /generate: every field takes its turn. One in fifty is refused, as what people send sometimes is."""
    body: Body = {
        "prompt": opening(chance),
        "max_new_tokens": round(2 ** chance.uniform(3, 9)),  # 8 to 512, most of them short
        "temperature": chance.choice((0, 0.6, 0.8, 0.8, 1.0, 1.3)),
        "seed": chance.randrange(2**32),
        "stream": chance.random() < 0.75,
        "unknown_characters": "fold",  # other models may not know all of the letters above
    }
    if chance.random() < 0.3:
        body["stop"] = ["\n\n"]
    if chance.random() < 0.2:
        body["top_p"] = 0.9
    if chance.random() < 0.15:
        body["disabled_experts"] = silenced(chance, model)
    if chance.random() < 0.02:
        body["temperature"] = -1
    return body


def opening(chance: random.Random) -> str:
    """A name, a first line, or now and then a page that takes a while to read."""
    words = chance.choices(WORDS, k=chance.choice((0, 0, 5, 20, 200)))
    return chance.choice(OPENINGS) + " ".join(words)


def silenced(chance: random.Random, model: Body) -> list[list[int]]:
    """One expert of one layer, or one in every layer, to do without; none where all of them are needed."""
    if model["num_experts"] <= model["experts_per_token"]:
        return []
    every = range(model["num_layers"])
    layers = [chance.choice(every)] if chance.random() < 0.7 else every
    return [[layer, chance.randrange(model["num_experts"])] for layer in layers]


def post(url: str, body: Body) -> HTTPResponse:
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode(), headers())
    answer: HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE_S)
    return answer


def headers() -> dict[str, str]:
    key = os.environ.get("MOESCOPE_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def ask_for_the_model(url: str) -> Body:
    """What /info says about it. Raises OSError and HTTPException."""
    with urllib.request.urlopen(urllib.request.Request(url + "/info", headers=headers()), timeout=PATIENCE_S) as answer:
        model: Body = json.load(answer)["model"]
        return model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Keep a running Moescope busy in varied ways. Ctrl-C ends it.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service (%(default)s)")
    parser.add_argument("--seconds", type=float, help="how long; otherwise until Ctrl-C")
    parser.add_argument("--people", type=int, default=4, help="how many ask at the same time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another series of requests (%(default)s)")
    return parser.parse_args()


def main() -> int:
    wanted = arguments()
    url = wanted.url.rstrip("/")
    try:
        model = ask_for_the_model(url)
    except (OSError, HTTPException, ValueError) as why:
        print(f"{url} does not answer as Moescope does ({why}): start it with make serve", file=sys.stderr)
        return GAVE_UP
    until = f"for {wanted.seconds:g} s" if wanted.seconds else "until Ctrl-C"
    habits = "prompts, lengths and seeds vary, most stream, some leave early or silence an expert, few are refused"
    print(f"{wanted.people} people ask {url} {until}: {habits}", flush=True)
    tally: Counter[str] = Counter()
    bell = threading.Event()
    people = [Person(url, model, wanted.seed + number, tally, bell) for number in range(wanted.people)]
    began = time.monotonic()
    keep_busy(people, bell, wanted.seconds)
    told = ", ".join(f"{count} {how}" for how, count in sorted(tally.items())) or "nobody had an answer yet"
    print(f"{time.monotonic() - began:.0f} s: {told}")
    return GAVE_UP if tally["unanswered"] and not tally["answered"] else 0


def keep_busy(people: list[Person], bell: threading.Event, seconds: float | None) -> None:
    """Until the time is over, on Ctrl-C, or when the container is stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threads = [threading.Thread(target=person.live, daemon=True) for person in people]
    for thread in threads:
        thread.start()
    with suppress(KeyboardInterrupt):
        bell.wait(seconds)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience would only hide the last line
    bell.set()
    for thread in threads:
        thread.join(1)  # who still waits for a first token is not waited for


if __name__ == "__main__":
    sys.exit(main())
