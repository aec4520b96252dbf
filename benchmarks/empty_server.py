"""``python -m benchmarks.empty_server``: answers completions with our own bytes and no model, a token a write.

What a client measures here is itself and the machine's sockets: no server can look quicker to it.
"""

from __future__ import annotations

import asyncio
import json
import re

from model.config import ModelConfig
from service.engine.sequence import DrawnToken, Ended, FinishReason
from service.openai import Completion, parse_completion
from service.schemas import Limits
from service.streaming import Generation

MODEL = "nothing"
HEAD = (
    b"HTTP/1.1 200 OK\r\ncache-control: no-cache\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
LIMITS = Limits(max_new_tokens=1 << 20, timeout_s=1.0, model=ModelConfig(vocab_size=65))


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, its requests one after the other."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            content = await reader.readexactly(int(length[1]) if length else 0)
            body = parse_completion(MODEL, json.loads(content), LIMITS)
            completion = Completion(Generation("0" * 16, MODEL, 0, {}, 64, None, ["a"], "0" * 12), body)
            writer.write(HEAD)
            for index in range(body.max_new_tokens):
                writer.write(_chunk(completion.event(DrawnToken(index, 0, "a"))))
                await asyncio.sleep(0)  # in which everybody else gets a token
            ended = Ended(FinishReason.LENGTH, 64, body.max_new_tokens, 0, (), 0.0, 0.0, 0.0)
            writer.write(_chunk(completion.event(ended)) + _chunk(b""))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"ready: http://{host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
