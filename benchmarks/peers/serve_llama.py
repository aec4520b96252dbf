"""llama.cpp's HTTP server: run by the interpreter that has xllamacpp. ``serve_llama.py GGUF SLOTS CONTEXT THREADS``

Prints its address when it is ready, and ends when its standard input does.
"""

import sys

import xllamacpp  # type: ignore[import-not-found, unused-ignore]  # it lives in an environment of its own


def main() -> None:
    model, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.kv_unified = False  # a slot's attention then looks at its own cache alone
    params.cont_batching = True
    params.cache_prompt = False  # every prompt is read, as elsewhere
    params.cache_ram_mib = 0
    params.warmup = True
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(f"ready: {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
