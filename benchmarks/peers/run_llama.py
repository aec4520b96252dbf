"""Greedy text by llama.cpp: run by the interpreter that has xllamacpp. ``run_llama.py REQUEST.json ANSWER.json``"""

import json
import sys
from pathlib import Path

import xllamacpp  # type: ignore[import-not-found, unused-ignore]  # it lives in an environment of its own


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.n_parallel = 1
    params.n_ctx = request["context_length"]
    params.cpuparams.n_threads = request["threads"]
    params.verbosity = 0
    server = xllamacpp.Server(params)
    texts = []
    for prompt, length in zip(request["prompts"], request["lengths"], strict=True):
        body = {"prompt": prompt, "max_tokens": length, "temperature": 0}
        texts.append(server.handle_completions(body)["choices"][0]["text"])
    Path(sys.argv[2]).write_text(json.dumps(texts))


if __name__ == "__main__":
    main()
