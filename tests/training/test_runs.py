"""A run's folder: one trainer at a time, what is kept of it, and who may go on with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.tokenizer import Tokenizer
from tests.checkpoints import as_trained, plain_files
from tests.training.processes import assert_refused_here, start, train, train_here, training
from training import config as configs
from training import corpora, runs
from training.commands.train import summary
from training.config import BadConfig
from training.history import History
from training.resume import require_resumable
from training.trainer import Trainer

TINY_RUN = ("train", "--preset", "tiny", "--data")


def test_a_run_that_cannot_be_written_is_refused_before_its_text_is_read(text: Path) -> None:
    (text.parent / "runs").write_text("no folder")
    process = training("train", "--preset", "tiny", "--data", "none.txt", cwd=text.parent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith("runs/tiny cannot be written")
    assert len(output.splitlines()) == 1


def test_the_best_step_outlives_the_newest_two(tmp_path: Path) -> None:
    history, files = History(), plain_files()
    for step, loss in enumerate([3.0, 1.5, 2.0, 1.6, 1.9], start=1):
        history.step = step
        history.remember(loss, loss, tokens=10 * step, flops=100 * step)
        assert history.best
        runs.save_step(tmp_path, step, files, "card", {"w": torch.ones(2)}, int(history.best["step"]))
    assert history.best == {"step": 2, "validation_loss": 1.5}
    assert sorted(runs.step_of(folder) for folder in tmp_path.glob("step-*")) == [2, 4, 5]
    assert history.milestones == {"1.7439": {"step": 2, "tokens": 20, "seconds": 0.0, "flops": 200}}


def test_a_run_removes_what_is_its_own_and_of_a_link_the_link_alone(text: Path) -> None:
    run = train_here(text, "mine", "--steps", 2).parent
    (run / "step-2").rename(text.parent / "moved")
    (run / "step-2").symlink_to(text.parent / "moved")
    (run / ".step-3.half").mkdir()
    for name in (".step-notes", ".step-4.txt"):
        (run / name).touch()
    (run / ".step-copies").mkdir()
    train_here(text, "mine", "--steps", 8, "--evaluate-every", 2, resume=True)
    assert {path.name for path in run.iterdir() if "step-" in path.name} == {
        *("step-6", "step-8"), *(".step-notes", ".step-4.txt", ".step-copies"),
    }  # fmt: skip
    assert runs.is_whole(text.parent / "moved")


def test_what_stands_in_a_run_s_way_is_refused_before_its_text_is_read(text: Path) -> None:
    run = text.parent / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "step-4").touch()
    assert_refused_here("runs/mine/step-4 is no folder", *TINY_RUN, "none.txt", "--run", "mine", cwd=text.parent)
    run.with_name("gone").symlink_to(text.parent / "nowhere")
    assert_refused_here("runs/gone is no folder", *TINY_RUN, "none.txt", "--run", "gone", cwd=text.parent)


def test_a_run_without_a_step_to_go_on_from_says_what_to_do(text: Path) -> None:
    folder = train_here(text, "mine", "--steps", 2)
    again = ("verse.txt", "--run", "mine", "--resume", "--steps", "4")
    (folder / runs.RESUME).rename(text.parent / "resume")
    (folder / checkpoint.MANIFEST).rename(text.parent / "manifest")
    assert_refused_here("delete its step folders, or name", *TINY_RUN, *again, cwd=text.parent)
    listed = json.loads((text.parent / "manifest").read_text())
    del listed["files"][runs.RESUME]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(listed))
    assert_refused_here("step-2 has no resume.safetensors: it is a copy", *TINY_RUN, *again, cwd=text.parent)


def test_a_step_that_no_run_has_left_here_is_refused(tmp_path: Path) -> None:
    config = configs.from_preset("tiny", {})
    checkpoint.save(tmp_path / "others" / "step-2", {**plain_files(), runs.RESUME: b""})
    with pytest.raises(
        checkpoint.CheckpointError, match=r"training\.json has no sound validation_loss, .* loss_curve, so"
    ):
        require_resumable(config, tmp_path / "others")
    checkpoint.save(tmp_path / "renamed" / "step-1", {**as_trained(plain_files()), runs.RESUME: b""})
    with pytest.raises(BadConfig, match=r"step-1 holds step 2; give it back its name"):
        require_resumable(config, tmp_path / "renamed")


def test_lines_that_tell_of_no_step_are_passed_over(text: Path) -> None:
    folder = train_here(text, "mine", "--steps", 2)
    metrics = folder.parent / "metrics.jsonl"
    first, *_ = whole = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([first[:20], b"\0" * 99, b"\n\xff}\n{a}\n[1]\n{}\n", *whole, first.strip(b"\n")[:-9]]))
    train_here(text, "mine", "--steps", 3, resume=True)
    steps = [line["step"] for line in runs.read_metrics(folder.parent)]
    assert steps == [1, 2, 2, 3, 3]


def test_a_run_ends_by_telling_its_final_and_its_best_step(text: Path) -> None:
    run = text.parent / "run"
    trainer = Trainer(configs.from_preset("tiny", {}), corpora.from_file(text), run, torch.device("cpu"))
    for step, loss in ((10, 1.5), (20, 2.0)):
        trainer.history.step = step
        trainer.history.remember(loss, loss, tokens=0, flops=0)
    final, best, serve = summary(trainer, run / "step-20").splitlines()
    assert final == f"final  validation loss 2.0000 at step 20: {run}/step-20"
    assert best == f"best   validation loss 1.5000 at step 10: {run}/step-10"
    assert serve.endswith(f"CHECKPOINT={run}/step-10")


def test_a_run_has_one_trainer_at_a_time(text: Path) -> None:
    run = text.parent / "runs" / "mine"
    with runs.claim(run, seen=[]):
        process = start(text, "mine")
        output, _ = process.communicate(timeout=60)
        assert output == "runs/mine is being trained by another process; name another run with --run\n"
        assert process.returncode == 1
    train_here(text, "mine")
    with pytest.raises(runs.NotWritable, match="trained by another process meanwhile"):
        runs.claim(run, seen=[])  # who looked before that run must not go on with what was seen
    runs.claim(run, seen=[run / "step-20", run / "step-10"]).close()


def test_a_resumed_run_reads_its_text_as_it_began_to(text: Path) -> None:
    corpus, run = corpora.from_file(text), text.parent / "run"
    config = configs.from_preset("tiny", {"tokenizer": "bpe", "bpe_vocab_size": 260, "steps": 2, "evaluate_every": 1})
    folder = Trainer(config, corpus, run, torch.device("cpu")).train()
    kept = {name: (folder / name).read_bytes() for name in checkpoint.verify(folder).files}
    others = Tokenizer.of_bpe("zyx wvu " * 50, 260)  # as if another version had learnt other pairs
    shutil.rmtree(folder)
    checkpoint.save(folder, kept | others.files())
    resumed = Trainer.resume(replace(config, steps=3), corpus, run, torch.device("cpu"))
    assert resumed.tokenizer.token_bytes == others.token_bytes
    assert resumed.train_ids.tolist() == others.encode(corpus.train)


def test_a_run_that_was_lengthened_says_where_it_was_resumed(text: Path) -> None:
    train_here(text, "longer", "--steps", 4)
    folder = train_here(text, "longer", "--steps", 6, resume=True)
    assert json.loads((folder / checkpoint.RECORD).read_text())["extended"] == [{"step": 4, "from": 4, "to": 6}]
    assert "resumed at step 4 with 6 steps to make instead of 4" in (folder / "README.md").read_text()
    assert "resumed at" not in (folder.with_name("step-4") / "README.md").read_text()


def test_a_run_of_another_version_of_the_program_is_refused_in_a_line(text: Path) -> None:
    corpus, run = corpora.from_file(text), text.parent / "run"
    config = configs.from_preset("tiny", {"steps": 2, "evaluate_every": 2})
    folder = Trainer(config, corpus, run, torch.device("cpu")).train()
    kept = {name: (folder / name).read_bytes() for name in checkpoint.verify(folder).files}
    facts = json.loads(kept[checkpoint.RECORD])
    facts["config"]["not_yet_known"] = 1
    shutil.rmtree(folder)
    checkpoint.save(folder, kept | {checkpoint.RECORD: json.dumps(facts).encode()})
    with pytest.raises(BadConfig, match=r"another version of this program, begin another run: .* no not_yet_known; "):
        Trainer.resume(replace(config, steps=3), corpus, run, torch.device("cpu"))


def test_a_resume_is_refused_for_another_run_and_a_damaged_step_is_passed_over(text: Path) -> None:
    train_here(text, "mine")
    run = text.parent / "runs" / "mine"
    for other, named in ({"seed": 9}, r"another seed;"), ({"weight_decay": 0.3}, r"another weight_decay;"):
        with pytest.raises(BadConfig, match=named):
            require_resumable(configs.from_preset("tiny", other), run)
    process = start(text, "mine", "--resume")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, len(output.splitlines())) == (1, 1)
    assert "20 steps already" in output
    assert runs.newest(run) == run / "step-20"
    (run / "step-20" / runs.RESUME).write_bytes(b"torn")
    assert runs.newest(run) == run / "step-10"
    train(text, "mine", "--resume", "--steps", 21)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 22)), "a step is on record once, however often it was taken"
