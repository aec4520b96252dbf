"""transformers' own HTTP server: run by the interpreter that has it. ``serve_transformers.py FOLDER SLOTS PORT``

With continuous batching, as otherwise a request waits until the one before it has ended.
"""

import os
import sys


def main() -> None:
    folder, slots, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    flags = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32", "--continuous-batching"]
    # A block holds 256 positions, more than a text has here; left to itself it takes most of the machine's memory.
    flags += ["--cb-num-blocks", str(2 * slots), "--log-level", "error"]
    os.execv(sys.executable, [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, *flags])


if __name__ == "__main__":
    main()
