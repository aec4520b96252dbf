"""What the wire says for each way a sequence can go, also for those that a healthy server cannot be made to take."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from model.tokenizer import Tokenizer
from service import streaming
from service.engine.sequence import DrawnToken, Ended, Event, FinishReason, SamplingParams, Sequence
from service.errors import ApiError
from service.exchange import TokenStream
from service.streaming import EventStream, Generation, Transcript, raise_if_refused, sse, write_events

ENDED = Ended(
    FinishReason.LENGTH,
    prompt_tokens=3,
    generated_tokens=2,
    routed_tokens=4,
    expert_counts=((3, 5), (8, 0)),
    queue_s=0.5,
    ttft_s=0.75,
    total_s=1.25,
)


SHIPPED = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "shakespeare")
HOSTILE = [
    "",
    '"',
    "\\",
    '\\"',
    "\0",
    "\x1f\x7f",
    "\u2028\u2029",
    "\ufffd",
    "\U0001f600",
    "{}",
    "%b%s",
    '","text":"',
    "\n\ndata: ",
]


@pytest.fixture
def transcript() -> Transcript:
    return Transcript(Generation("an-id", "tiny", 7, {}, 3, None, ["\n", "a", "\u00e9"], "0123456789ab"))


def parsed(written: bytes) -> tuple[str, dict[str, Any]]:
    event_id, event, data, *rest = written.decode().split("\n")
    assert event_id.startswith("id: 0123456789ab:")
    assert rest == ["", ""]
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_an_event_is_one_data_line_whatever_is_in_it(transcript: Transcript) -> None:
    assert sse("token", {"text": "\n\r\u2028\u00e9"}, "an-id").count(b"\n") == 4
    assert parsed(transcript.event(DrawnToken(0, 0, "\n")))[1]["text"] == "\n"


@pytest.mark.parametrize("text", [*SHIPPED.tokens, *HOSTILE])
def test_a_plain_token_is_what_the_json_encoder_writes(transcript: Transcript, text: str) -> None:
    written = transcript.event(DrawnToken(12, 34, text))
    assert written == sse("token", {"index": 12, "text": text, "token_id": 34}, "0123456789ab:12")


def test_the_end_has_the_text_the_usage_and_the_rates(transcript: Transcript) -> None:
    for index, token_id, text in ((0, 1, "a"), (1, 0, "\n")):
        transcript.event(DrawnToken(index, token_id, text))
    name, done = parsed(transcript.event(ENDED))
    assert (name, done["finish_reason"], done["text"]) == ("done", "length", "a\n")
    assert done["usage"] == {"prompt_tokens": 3, "generated_tokens": 2, "total_tokens": 5}
    assert done["timings"] == {"queue_s": 0.5, "ttft_s": 0.75, "total_s": 1.25, "tokens_per_s": 2.0}
    assert done["routing"] == {"tokens": 4, "counts": [[3, 5], [8, 0]]}


def test_a_resumed_stream_never_ends_with_less_than_the_client_has() -> None:
    resumed = Transcript(Generation("an-id", "tiny", 7, {}, 3, None, ["\n", "a"], "0123456789ab", last_index=5))
    assert resumed.event(DrawnToken(0, 1, "a")) == b""
    name, data = parsed(resumed.event(replace(ENDED, reason=FinishReason.TIMEOUT, generated_tokens=1)))
    assert (name, data["code"]) == ("error", "timeout")


def test_a_token_counts_as_taken_when_it_has_left_and_not_when_it_was_fetched(transcript: Transcript) -> None:
    async def read() -> list[int]:
        sequence = Sequence((1,), SamplingParams())
        stream = TokenStream(sequence, "an-id", streams=True)
        taken = []
        tokens: list[Event] = [DrawnToken(index, 1, "a" * 40_000) for index in range(4)]

        async def write(_: bytes, is_more: bool) -> None:
            taken.append(sequence.num_taken)  # whoever is written to again has taken what came before

        await write_events(transcript, stream, [*tokens, ENDED], write)
        return [*taken, sequence.num_taken]

    assert asyncio.run(read()) == [0, 2, 4, 4, 4]  # two of tokens, the end with its text, nothing more, and after them


def test_whoever_hears_nothing_for_long_hears_a_ping(transcript: Transcript, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream is woken now and then; it says nothing unless it is time, and what comes then is told as ever."""

    async def read() -> list[bytes]:
        stream = TokenStream(Sequence((1,), SamplingParams()), "an-id", streams=True)
        monkeypatch.setattr(streaming, "PING_S", 1000.0)
        chunks = asyncio.Queue[bytes](1)

        async def write(content: bytes, is_more: bool) -> None:
            await chunks.put(content)

        writing = asyncio.create_task(write_events(transcript, stream, [DrawnToken(0, 1, "a")], write))
        said = [await chunks.get()]
        for _ in range(5):
            await asyncio.sleep(0)
            stream.nudge()
        assert chunks.empty()
        monkeypatch.setattr(streaming, "PING_S", 0.0)
        stream.deliver([DrawnToken(1, 1, "a")])
        said += [await chunks.get(), await chunks.get()]
        writing.cancel()
        return said

    start, token, ping = asyncio.run(read())
    assert (start.count(b"event: token"), token.count(b"event: token"), ping) == (1, 1, b": ping\n\n")


@pytest.mark.parametrize("how", ["whole", "abandoned", "cancelled", "a send that raises", "words that raise"])
def test_a_stream_gives_back_once_however_it_ends(transcript: Transcript, how: str) -> None:
    sent: list[Message] = []
    given_back: list[bool] = []

    async def send(message: Message) -> None:
        if how == "a send that raises":
            raise ConnectionError
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("whoever made it watches for the client")

    async def stream() -> None:
        tokens = TokenStream(Sequence((1,), SamplingParams()), "an-id", streams=True)
        first: list[Event] = [DrawnToken(0, 1, "a"), *([ENDED] if how == "whole" else [])]
        if how == "words that raise":
            first = [DrawnToken(0, 99, "a", top_logprobs=((99, -1.0),))]  # an id that has no text
        answer = EventStream(transcript, tokens, first, lambda: given_back.append(True))
        task = asyncio.create_task(answer({"type": "http"}, receive, send))
        await asyncio.sleep(0)
        if how == "abandoned":
            tokens.abandon()
        if how == "cancelled":
            task.cancel()
        await task

    expected = {
        "cancelled": asyncio.CancelledError,
        "a send that raises": ConnectionError,
        "words that raise": IndexError,
    }
    if how in expected:
        with pytest.raises(expected[how]):
            asyncio.run(stream())
    else:
        asyncio.run(stream())
    assert given_back == [True]
    assert [message.get("more_body") for message in sent][1:] == {
        "whole": [False],
        "abandoned": [True],
        "cancelled": [True],
    }.get(how, [])


def test_a_single_token_has_no_speed(transcript: Transcript) -> None:
    _, done = parsed(transcript.event(replace(ENDED, generated_tokens=1)))
    assert done["timings"]["tokens_per_s"] is None


@pytest.mark.parametrize("reason", [FinishReason.SHUTDOWN, FinishReason.INTERNAL, FinishReason.NON_FINITE])
def test_a_stream_that_fails_ends_with_an_error_event(transcript: Transcript, reason: FinishReason) -> None:
    name, data = parsed(transcript.event(replace(ENDED, reason=reason)))
    assert (name, data["code"], data["error"]["code"]) == ("error", reason, reason)
    assert data["error"]["request_id"] == "an-id"


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (replace(ENDED, reason=FinishReason.SHUTDOWN), 503),
        (replace(ENDED, reason=FinishReason.INTERNAL), 500),
        (replace(ENDED, reason=FinishReason.NON_FINITE), 500),
        (replace(ENDED, reason=FinishReason.TIMEOUT), 504),
    ],
)
def test_what_ends_before_its_first_token_gets_a_status_of_its_own(first: Event, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        raise_if_refused(first)
    assert refused.value.kind.status == status
