"""Training learns, stops cleanly, and what it made is exported, sampled and measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.transformer import Transformer
from tests.checkpoints import TINY, tiny_model
from tests.training.processes import ROOT, VERSE, said, train, train_here, training
from training import balance, corpora, runs
from training import config as configs
from training.chance import chance_in, noise_weights
from training.config import BadConfig, TrainingConfig
from training.corpora import Corpus
from training.evaluate import evaluate
from training.history import flops_per_token
from training.initialise import initialise
from training.objective import objective
from training.sample import stream
from training.trainer import Trainer


def test_a_run_learns_and_its_checkpoint_is_served_by_the_line_it_prints(text: Path) -> None:
    output = train(text, "learn", "--steps", 30)
    folder = text.parent / "runs" / "learn" / "step-30"
    assert output.splitlines()[-1] == "serve it:  make serve CHECKPOINT=runs/learn/step-30"
    loaded = checkpoint.load(folder)
    assert loaded.training["validation_loss"] < 2.6  # a uniform guess among its 30 characters costs 3.4
    ids = torch.tensor(loaded.tokenizer.encode(VERSE[int(0.9 * len(VERSE)) :]))
    assert evaluate(loaded.model, ids).loss == pytest.approx(loaded.training["validation_loss"], abs=1e-4)
    assert [point["step"] for point in loaded.training["loss_curve"]] == [10, 20, 30]
    assert sorted(path.name for path in folder.parent.glob("step-*")) == ["step-20", "step-30"]
    for layer in loaded.training["routing_baseline"]:
        assert sum(layer) == pytest.approx(1, abs=1e-5)


def test_an_interrupt_ends_the_step_saves_and_says_how_to_go_on(text: Path) -> None:
    process = training(
        *("train", "--preset", "tiny", "--data", text, "--run", "stop"),
        *("--steps", 100_000, "--evaluate-every", 100_000),
        cwd=text.parent,
    )
    metrics = text.parent / "runs" / "stop" / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.01)  # until the first step is done
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume" in output
    assert "Traceback" not in output
    checkpoint.verify(runs.newest(text.parent / "runs" / "stop"))


def test_who_asks_for_a_stop_during_a_look_gets_it_after_that_one(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []

    def look(*arguments: Any) -> Any:
        if not looks:
            os.kill(os.getpid(), signal.SIGTERM)
        looks.append(evaluate(*arguments))
        return looks[-1]

    monkeypatch.setattr("training.trainer.evaluate", look)
    monkeypatch.setattr("training.trainer.LOOKED_AT", 64)
    folder = train_here(text, "asked", "--steps", 20, "--evaluate-every", 2)
    assert len(looks) == 1
    assert folder.name == "step-2"
    assert checkpoint.read_record(folder)["validation_windows"] == 2


def test_a_text_whose_file_name_is_no_utf8_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.txt"
    path.write_text(VERSE)
    train(path, "mine", "--steps", 2)
    assert checkpoint.read_record(tmp_path / "runs" / "mine" / "step-2")["corpus"]["name"] == "caf?"


def test_whatever_a_text_and_a_run_are_called_what_is_said_of_them_is_a_line_to_paste(tmp_path: Path) -> None:
    path = tmp_path / "my\nverse.txt"
    path.write_text(VERSE[:200])
    asked = ("train", "--preset", "tiny", "--data", path, "--run", "my run", "--steps", 1)
    code, output = said(*asked, cwd=tmp_path)
    assert (code, output) == (1, "my?verse has a part of 20 tokens; context_length 32 needs more in both\n")
    path.write_bytes(b"\xff")
    assert len(said(*asked, cwd=tmp_path)[1].splitlines()) == 1
    path.write_text(VERSE)
    assert said(*asked, cwd=tmp_path)[1].splitlines()[-1] == "serve it:  make serve CHECKPOINT='runs/my run/step-1'"


def test_flops_are_six_for_each_active_weight_and_twelve_for_each_position_attended() -> None:
    config = tiny_model().config
    weights = 65 * 32 + 32  # the head and its norm
    for _ in range(3):
        weights += 32 * 32 * (2 * 2 + 2 * 1) + 2 * 32  # attention and the norms of its heads
        weights += 4 * 32 + 2 * 3 * 32 * 32 + 2 * 32  # router, two experts, two norms
    assert flops_per_token(config) == 6 * weights + 12 * 3 * 2 * 32 * 32


def test_a_run_that_diverges_says_so_and_keeps_what_it_had(text: Path) -> None:
    arguments = ("train", "--preset", "tiny", "--data", text, "--run", "wild", "--evaluate-every", 1)
    process = training(*arguments, "--embedding-learning-rate", 1e18, cwd=text.parent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "lower the learning rates" in output.splitlines()[-1]
    kept = list((text.parent / "runs" / "wild").glob("step-*"))
    assert kept
    for folder in kept:
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("balance_weight", balance.switch_loss),
        ("z_weight", balance.z_loss),
        ("importance_weight", balance.importance_loss),
        ("load_weight", balance.load_loss),
    ],
)
def test_each_term_of_the_loss_is_added_for_every_layer_times_its_weight(name: str, term: Any, text: Path) -> None:
    none = dict.fromkeys(("balance_weight", "z_weight", "importance_weight", "load_weight"), 0.0)
    config = configs.from_preset("tiny", {**none, name: 0.3, "router_noise": "gaussian"})
    model = tiny_model()
    ids = torch.arange(60).view(2, 30)
    chance = chance_in(config, noise_weights(config, model.config, torch.device("cpu")), 0, ids)
    logits, routings = model(ids, chance=chance)
    loss, cross_entropy = objective(logits, ids.roll(-1, 1), routings, config)
    expected = sum(term(routing) for routing in routings)
    assert expected > 0
    torch.testing.assert_close(loss - cross_entropy, 0.3 * expected)


def test_a_run_begins_with_the_weights_and_the_rates_that_it_was_told(text: Path) -> None:
    """AdamW's first step is as long as its rate, a quarter of the peak here, whatever the gradient."""
    config = configs.from_preset("tiny", {"init": "xavier", "warmup_steps": 4})
    trainer = Trainer(config, corpora.from_file(text), text.parent / "run", torch.device("cpu"))
    expected = Transformer(trainer.model.config)
    initialise(expected, config.seed, "xavier")
    torch.testing.assert_close(trainer.model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    trainer.train_step(0)
    moved = (trainer.model.norm.weight - 1).abs().mean().item()
    assert moved == pytest.approx(config.embedding_learning_rate / 4, rel=1e-2)


def test_a_step_descends_that_loss_and_not_the_cross_entropy_alone(text: Path) -> None:
    """The head is zero at first, so cross entropy alone moves no router at all."""
    corpus = corpora.from_file(text)
    gradients = []
    for weight in (0.0, 1.0):
        config = configs.from_preset("tiny", {"balance_weight": weight, "z_weight": 0.0, "warmup_steps": 10**6})
        trainer = Trainer(config, corpus, text.parent / "run", torch.device("cpu"))
        router = trainer.model.layers[0].moe.router.weight
        with torch.no_grad():
            router.normal_(generator=torch.Generator().manual_seed(0))
        seen: list[torch.Tensor] = []
        router.register_hook(seen.append)
        trainer.train_step(0)
        gradients.append(seen[0].abs().sum().item())
    assert gradients[0] == 0
    assert gradients[1] > 0


def test_export_keeps_what_serving_reads(text: Path) -> None:
    train_here(text, "export")
    assert said("export", "runs/export/step-20", "shipped", cwd=text.parent)[0] == 0
    shipped = text.parent / "shipped"
    assert not (shipped / runs.RESUME).exists()
    assert (shipped / "README.md").exists()
    checkpoint.load(shipped)


def test_a_sample_continues_its_prompt_and_repeats_with_its_seed(text: Path) -> None:
    train_here(text, "sample")
    arguments = ("sample", "--checkpoint", "runs/sample/step-20", "The", "--length", 60, "--seed", 3)
    first, _ = training(*arguments, cwd=text.parent).communicate(timeout=60)
    assert said(*arguments, cwd=text.parent) == (0, first)
    assert first.startswith("The")
    assert len(first) == len("The") + 60 + 1


def test_the_largest_dropout_keeps_its_share_and_a_fraction_may_be_left_out() -> None:
    config = configs.from_dict({"dropout": configs.MOST_DROPOUT, "weight_decay": 0})
    chance = chance_in(config, {}, 0, torch.ones(8, 1000))
    assert chance is not None
    kept = chance.layer(0).drop_update(torch.ones(8, 1000, 64), "moe") > 0
    assert 0 < kept.float().mean() < 1e-4  # 2^-16 is the share


@pytest.mark.parametrize(("kind", "unit"), [("byte", "one byte"), ("bpe", "a few letters")])
def test_a_run_on_bytes_is_sampled_resumed_and_says_what_it_writes(text: Path, kind: str, unit: str) -> None:
    text.write_text(("na\u00efve \u20ac and caf\u00e9 \u2014 " * 9 + "\n") * 60)
    flags = ("--tokenizer", kind, "--bpe-vocab-size", 270, "--evaluate-every", 10)
    train_here(text, kind, *flags, "--steps", 10)
    folder = train_here(text, kind, *flags, "--steps", 12, resume=True)
    loaded = checkpoint.load(folder)
    assert loaded.tokenizer.vocab_size == (256 if kind == "byte" else 270)
    assert f"writes {unit} at a time" in (folder / "README.md").read_text()
    asked = ("sample", "--checkpoint", folder, "caf\u00e9", "--length", 50, "--seed", 3)
    code, output = said(*asked, cwd=text.parent)
    prompt_ids = loaded.tokenizer.encode("caf\u00e9")
    drawn = list(stream(loaded.model, prompt_ids, 50, temperature=0.8, top_k=0, top_p=1.0, seed=3))
    assert (code, output) == (0, "caf\u00e9" + loaded.tokenizer.decode(drawn) + "\n")


def test_a_text_is_measured_in_tokens_before_it_is_trained_on(text: Path) -> None:
    short = Corpus("short", "a" * 100, "a" * 30 + "\u20ac\u20ac")
    with pytest.raises(BadConfig, match="part of 32 tokens"):
        Trainer(TrainingConfig(shape=TINY), short, text.parent / "runs", torch.device("cpu"))
    Trainer(TrainingConfig(tokenizer="byte", shape=TINY), short, text.parent / "runs", torch.device("cpu"))


def test_a_run_that_nobody_reads_any_more_ends_with_a_step_saved_and_a_line(text: Path) -> None:
    """As behind `| head -1`, with Python's own buffer in between."""
    arguments = ("--preset", "tiny", "--data", text, "--run", "unread", "--evaluate-every", 2)
    command = [sys.executable, "-m", "training", "train", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=text.parent, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert "saving to runs/unread/" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == "nobody reads the output any more, so this ended\n"
    assert runs.newest(text.parent / "runs" / "unread").name == "step-2"


def test_what_is_printed_at_the_end_and_read_by_nobody_is_told_in_one_line(text: Path) -> None:
    folder = train_here(text, "end", "--steps", 2)
    command = [sys.executable, "-m", "training", "evaluate", "--checkpoint", str(folder), "--data", str(text)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, env=environment, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "nobody reads the output any more, so this ended\n")


def test_a_sample_that_the_output_cannot_spell_is_escaped_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "smiles.txt"
    path.write_text("\N{GRINNING FACE}\N{PILE OF POO}" * 1000)
    output = train(path, "smiles", "--steps", 2, PYTHONIOENCODING="ascii")
    assert "\\U0001f" in output
    assert runs.newest(tmp_path / "runs" / "smiles").name == "step-2"
