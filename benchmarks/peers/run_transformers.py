"""Greedy text by transformers: run by the interpreter that has it. ``run_transformers.py REQUEST.json ANSWER.json``"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    texts = []
    for prompt, length in zip(request["prompts"], request["lengths"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        drawn = model.generate(ids, max_new_tokens=length, do_sample=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(drawn))
    Path(sys.argv[2]).write_text(json.dumps(texts))


if __name__ == "__main__":
    main()
