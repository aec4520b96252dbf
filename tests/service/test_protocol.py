"""The head of an answer leaves with what is written directly after it; nothing is lost, late or out of order."""

import asyncio
from collections.abc import Callable
from typing import Any

from service.protocol import CountingTransport

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Wire(asyncio.Transport):
    """Keeps what each write had, and None for the end."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes | None] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.written.append(None)

    def get_write_buffer_size(self) -> int:
        return 0


def told(*acts: Callable[[CountingTransport], object], turns: int = 0) -> list[bytes | None]:
    """What is on the wire after some acts in one turn of the loop, and so many turns more."""

    async def act() -> list[bytes | None]:
        wire = Wire()
        transport = CountingTransport(wire, asyncio.get_running_loop())
        for each in acts:
            each(transport)
        for _ in range(turns):
            await asyncio.sleep(0)
        assert transport.sent == sum(len(data) for data in wire.written if data) or not turns
        return list(wire.written)  # before the loop ends, in whose last turn all leaves

    return asyncio.run(act())


def write(data: bytes) -> Callable[[CountingTransport], object]:
    return lambda transport: transport.write(data)


def test_a_head_leaves_with_the_body_in_one_write_and_what_comes_later_by_itself() -> None:
    assert told(write(HEAD), write(b"a"), write(b"b"), turns=2) == [HEAD + b"a", b"b"]


def test_a_head_without_a_body_leaves_in_the_loop_s_next_turn() -> None:
    assert told(write(HEAD)) == []
    assert told(write(HEAD), turns=1) == [HEAD]


def test_a_head_leaves_before_its_connection_is_closed() -> None:
    assert told(write(HEAD), CountingTransport.close, turns=2) == [HEAD, None]


def test_an_answer_that_follows_a_100_keeps_its_place() -> None:
    assert told(write(CONTINUE), write(HEAD), write(b"a"), turns=2) == [CONTINUE + HEAD, b"a"]


def test_a_body_that_looks_like_a_head_is_delivered_whole_and_in_order() -> None:
    assert told(write(HEAD), write(b"a"), write(b"HTTP/ is old"), write(b"b"), turns=2) == [
        HEAD + b"a",
        b"HTTP/ is oldb",
    ]
