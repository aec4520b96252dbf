"""A checkpoint folder is there whole or not at all, and a wrong one is refused by name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from model import checkpoint
from model.checkpoint import CheckpointError
from model.config import ModelConfig, UnsupportedConfig
from model.tokenizer import Tokenizer
from tests.checkpoints import plain_files, tiny_checkpoint, tiny_model
from tests.evidence import At, Evidence
from training import runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


def test_what_is_loaded_is_what_was_saved_rounded_to_bfloat16(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.bfloat16().float()), name
    assert loaded.config == tiny_model().config
    assert len(loaded.manifest.fingerprint) == 64


def test_a_size_that_is_only_claimed_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    files = plain_files()
    config = json.loads(files["config.json"])
    for claim in ({"num_hidden_layers": 2**21}, {"moe_intermediate_size": 2**24}):
        folder = tmp_path / next(iter(claim))
        checkpoint.save(folder, {**files, "config.json": json.dumps({**config, **claim}).encode()})
        with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit config\.json: it has .* bytes"):
            checkpoint.load(folder)


def test_saving_over_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="always a new folder"):
        checkpoint.save(folder, {})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_file_is_refused_by_name(folder: Path, name: str, damage: str) -> None:
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        (folder / name).write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(folder)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": [[1, "2"]]}',
        b'{"format": 9, "files": {}}',
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, content: bytes | None) -> None:
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.verify(folder)


def test_a_manifest_cannot_name_files_elsewhere(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        checkpoint.verify(folder)


def test_a_vocabulary_on_which_the_library_panics_is_refused(tmp_path: Path) -> None:
    rule = json.loads(Tokenizer.of_bpe("ab ab c " * 20, 262).files()["tokenizer.json"])
    rule["model"]["vocab"] = {"a": 0, "b": 0}
    checkpoint.save(tmp_path / "twice", {**plain_files(), "tokenizer.json": json.dumps(rule).encode()})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        checkpoint.load(tmp_path / "twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "has no lm_head"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7, dtype=torch.bfloat16)}), "shape"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "float32"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_whatever_their_digests(
    tmp_path: Path, change: object, message: str
) -> None:
    files = plain_files()
    tensors = from_bytes(files["model.safetensors"])
    assert callable(change)
    change(tensors)
    checkpoint.save(tmp_path / "wrong", {**files, "model.safetensors": to_bytes(tensors)})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        checkpoint.load(tmp_path / "wrong")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", False),
        ("hidden_act", "gelu"),
        ("model_type", "moescope"),
        ("num_experts", "4"),
        ("num_experts", 4.0),
        ("num_experts", True),
        ("num_attention_heads", 0),
        ("vocab_size", 10**15),
        ("rope_theta", float("nan")),
        ("rope_theta", -1.0),
        ("rms_norm_eps", float("inf")),
        ("layer_types", ["full_attention"]),
        ("quantization_config", {}),
        ("num_experts", None),
        ("rope_scaling", {}),
    ],
)
def test_a_configuration_that_we_do_not_compute_is_refused(key: str, value: object) -> None:
    raw = {**tiny_model().config.to_hf(), key: value}
    with pytest.raises(UnsupportedConfig):
        ModelConfig.from_hf(raw)


def test_what_a_configuration_lacks_or_has_too_much_is_told_in_words() -> None:
    raw = tiny_model().config.to_hf()
    few = {key: value for key, value in raw.items() if key not in ("vocab_size", "head_dim")}
    with pytest.raises(UnsupportedConfig, match=r"^it lacks vocab_size, head_dim$"):
        ModelConfig.from_hf(few)
    with pytest.raises(UnsupportedConfig, match=r"^it has layer_types, num_groups, which"):
        ModelConfig.from_hf({**raw, "layer_types": [], "num_groups": 2})


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 30},
        {"head_dim": 16},
        {"num_heads": 3, "num_kv_heads": 2},
        {"experts_per_token": 9},
        {"num_layers": 0},
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedConfig, match=next(iter(wrong))):
        ModelConfig(**{"vocab_size": 65, **wrong})


def test_counted_parameters_are_the_models() -> None:
    model = tiny_model()
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    idle = (model.config.num_experts - model.config.experts_per_token) * 3 * 32 * 32 * model.config.num_layers
    assert model.config.num_active_parameters == model.config.num_parameters - idle


# For every line that it reads, forks a process that saves step after step, as a training run does; it says which one
# when its second save begins. Forking spares each of them the import of torch.
SAVER = """
import itertools, os, sys, torch
from pathlib import Path
from typing import Any
from training import runs
from tests.checkpoints import plain_files
files, state = plain_files(), {"x": torch.zeros(200_000)}
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        for step in itertools.count(int(line)):
            if step == int(line) + 1:
                print(os.getpid(), flush=True)
            runs.save_step(Path(sys.argv[1]), step, files, "card", state, step)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def test_a_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path: Path, at: At, evidence: Evidence) -> None:
    moments, kills, inside, step = random.Random(0), at(20, 200), 0, 1
    run = tmp_path / "run"
    command = [sys.executable, "-c", SAVER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for _ in range(kills):
            print(step, file=saver.stdin, flush=True)
            child = int(saver.stdout.readline())
            time.sleep(moments.random() * 0.03)  # the moment of the kill is what this test varies
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "killed\n"
            folder = runs.newest(run)
            assert runs.step_of(folder) >= step
            checkpoint.load(folder)
            inside += any(path.name.startswith(".step-") for path in run.iterdir())
            step = runs.step_of(folder) + 1
    assert inside, "no kill came while a folder was half written, so this proved nothing"
    evidence("kill -9 while saving, checkpoints lost", f"0 of {kills} ({inside} left a folder half written)")


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    """Which takes a second of every start."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    program = (
        "import sys; from pathlib import Path; from model import checkpoint;"
        "checkpoint.load(Path(sys.argv[1])); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert "torch" in loaded.stdout.split()
    assert not {"sympy", "torch._dynamo", "torch._inductor"} & set(loaded.stdout.split())
