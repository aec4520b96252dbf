"""`python -m service` with a window in it, for tests of leaks: at SIGUSR1 it tells which asyncio tasks there are.

For tests that have no time for the real ones there are in the environment STALLED_AFTER_S, its patience with who does
not read, and PING_S, the silence after which it pings.
"""

import asyncio
import json
import os
import signal
import sys
from functools import partial

from service import server, streaming
from service.__main__ import main
from service.engine import engine
from service.protocol import Bounds


def tell(*_: object) -> None:
    names = sorted(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    os.write(sys.stderr.fileno(), json.dumps({"tasks": names}).encode() + b"\n")


if __name__ == "__main__":
    if patience_s := float(os.environ.get("STALLED_AFTER_S", "0")):
        vars(engine)["STALLED_AFTER_S"] = patience_s
        vars(server)["Bounds"] = partial(Bounds, stalled_s=patience_s)
    vars(streaming)["PING_S"] = float(os.environ.get("PING_S", streaming.PING_S))
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main(sys.argv[1:]))
