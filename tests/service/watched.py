"""`python -m service` with a window in it: at SIGUSR1 it tells which asyncio tasks there are. For tests of leaks."""

import asyncio
import json
import os
import signal
import sys

from service.__main__ import main


def tell(*_: object) -> None:
    names = sorted(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    os.write(sys.stderr.fileno(), json.dumps({"tasks": names}).encode() + b"\n")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main(sys.argv[1:]))
