"""Whose report may be written and what it is held against, and the whole command on a run of seconds."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointError
from model.tokenizer import Tokenizer
from tests.checkpoints import CHARACTERS, as_trained, plain_files, tiny_files, tiny_model
from tests.training.processes import ROOT, VERSE, assert_refused_here, said, train_here, training
from training import config as configs
from training import corpora, runs
from training.config import BadConfig
from training.corpora import Corpus
from training.report import pictures
from training.report.write import control_figures, write
from training.trainer import Trainer


def trained_on(
    folder: Path,
    *,
    text: str = "1",
    name: str = "verse",
    of_bytes: bool = False,
    layers: int = 3,
    windows: int = 4,
    **told: Any,
) -> Path:
    """A tiny checkpoint whose record says what it was trained on; text stands for a SHA-256."""
    tokenizer = Tokenizer.of_bytes() if of_bytes else Tokenizer.of_characters(CHARACTERS)
    files = tiny_files(tiny_model(vocab_size=tokenizer.vocab_size, num_layers=layers), tokenizer)
    config = {"steps": 2, "batch_size": 8, "seed": 1, "tokenizer": "byte" if of_bytes else "character", **told}
    corpus = {"name": name, "sha256": {"train": text, "validation": text}}
    checkpoint.save(folder, as_trained(files, config=config, corpus=corpus, validation_windows=windows))
    return folder


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"of_bytes": True}, "tokenizer"),
        ({"seed": 2}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"dropout": 0.5}, "dropout"),
        ({"steps": 200}, "steps"),
        ({"windows": 9}, "number of validation windows"),
        ({"matrix_learning_rate": 0.0}, "matrix_learning_rate"),
        ({"layers": 2}, "num_layers"),
        ({"text": "2"}, "text"),
    ],
)
def test_a_control_of_another_training_is_refused_by_what_differs(
    tmp_path: Path, other: dict[str, Any], what: str
) -> None:
    mixture = checkpoint.load(trained_on(tmp_path / "mixture"))
    with pytest.raises(BadConfig, match=f"had another {what} than"):
        control_figures(trained_on(tmp_path / "control", **other), mixture)


def test_a_control_may_have_read_the_same_text_under_another_name(tmp_path: Path) -> None:
    mixture = checkpoint.load(trained_on(tmp_path / "mixture"))
    figures = control_figures(trained_on(tmp_path / "control", name="copy", balance_weight=0.0), mixture)
    assert figures["parameters"] == mixture.config.num_parameters


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"validation_loss": None}, "validation_loss"),
        ({"validation_loss": math.nan, "steps": "2"}, "steps, validation_loss"),
        ({"corpus": {"name": "verse"}}, r"corpus\.sha256"),
        ({"config": "tiny"}, "config"),
        ({"loss_curve": []}, "loss_curve"),
        ({"loss_curve": [{"step": 2}]}, "loss_curve"),
        ({"routing_baseline": None}, "routing_baseline"),
    ],
)
def test_a_record_that_no_training_wrote_has_no_report(tmp_path: Path, told: dict[str, Any], named: str) -> None:
    checkpoint.save(tmp_path / "other", as_trained(plain_files(), **told))
    loaded = checkpoint.load(tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"training\.json has no sound {named},"):
        write(loaded, Corpus("verse", "", ""), tmp_path / "out", windows=1, run=None, control=None)
    checkpoint.save(tmp_path / "mixture", as_trained(plain_files()))
    with pytest.raises(CheckpointError, match=rf"training\.json has no sound {named},"):
        control_figures(tmp_path / "other", checkpoint.load(tmp_path / "mixture"))


def test_shares_that_are_none_are_not_reported_as_load(tmp_path: Path) -> None:
    corpus = Corpus("verse", CHARACTERS * 5, CHARACTERS)
    told = {"routing_baseline": [[1, 2]], "corpus": {"name": "verse", "sha256": corpus.digests}}
    checkpoint.save(tmp_path / "odd", as_trained(plain_files(), **told))
    with pytest.raises(CheckpointError, match="has a routing_baseline that does not fit"):
        write(checkpoint.load(tmp_path / "odd"), corpus, tmp_path / "out", windows=1, run=None, control=None)


def test_the_dense_control_meets_as_many_parameters_per_token_and_as_much_data() -> None:
    mixture, dense = (configs.from_preset(name, {}) for name in ("shakespeare", "dense"))
    ours, control = (config.model_config(vocab_size=65) for config in (mixture, dense))
    routers = ours.num_layers * ours.hidden_size * (ours.num_experts - 1)
    assert ours.num_active_parameters - control.num_active_parameters == routers
    differing = {name for name, value in dense.as_dict().items() if mixture.as_dict()[name] != value}
    assert differing == {"shape"}


def test_an_animation_has_a_frame_for_each_look_or_some_of_many_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image, ImageSequence

    monkeypatch.setattr(pictures, "MOST_FRAMES", 4)
    looks = [{"step": step, "lift": torch.rand(2, 4, 8).tolist()} for step in range(0, 18, 2)]
    for num_looks, num_frames in ((3, 3), (9, 4)):  # the first, the fourth, the seventh and the last
        film = Image.open(io.BytesIO(pictures.specialisation(looks[:num_looks])))
        assert len(list(ImageSequence.Iterator(film))) == num_frames
    shipped = ROOT / "checkpoints" / "shakespeare" / "specialisation.gif"
    assert shipped.stat().st_size < 500_000, "every clone takes it along"


def test_a_text_of_one_character_has_a_report_and_a_damaged_one_is_not_written_over(tmp_path: Path) -> None:
    corpus = Corpus("one", "a" * 400, "a" * 100)
    config = configs.from_preset("tiny", {"steps": 2, "evaluate_every": 2})
    loaded = checkpoint.load(Trainer(config, corpus, tmp_path / "run", torch.device("cpu")).train())

    def report() -> dict[str, Any]:
        return write(loaded, corpus, tmp_path / "out", windows=2, run=tmp_path / "run", control=None)

    nothing = {"loss": 0.0, "bits_per_character": 0.0}
    assert (report()["final"], report()["bigram"]) == (nothing, nothing)
    for damage in (b'{"fingerprint": ', b"\xff\xfe", b"[1]"):
        (tmp_path / "out" / "report.json").write_bytes(damage)
        with pytest.raises(BadConfig, match=r"report\.json is damaged") as caught:
            report()
        assert len(str(caught.value).splitlines()) == 1
        assert (tmp_path / "out" / "report.json").read_bytes() == damage


def test_a_report_leaves_no_picture_of_other_weights_and_whatever_is_not_its_own(tmp_path: Path) -> None:
    corpus = Corpus("verse", VERSE, VERSE[:2000])
    config = configs.from_preset("tiny", {"steps": 2, "evaluate_every": 2})
    loaded = checkpoint.load(Trainer(config, corpus, tmp_path / "run", torch.device("cpu")).train())
    output = tmp_path / "out"
    output.mkdir()
    for name in ("specialisation.gif", "loss.png", "mine.png"):
        (output / name).write_bytes(b"of other weights")
    write(loaded, corpus, output, windows=2, run=None, control=None)
    pictures = {path.name for path in output.iterdir()} - {"README.md", "report.json"}
    assert pictures == {"loss.png", "load.png", "classes.png", "causal-map.png", "mine.png"}
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "mine.png").read_bytes() == b"of other weights"


def test_a_report_writes_over_nobody_else_s_readme_and_takes_no_other_run_s_history(tmp_path: Path) -> None:
    corpus = Corpus("verse", VERSE, VERSE[:2000])
    folders = {}
    for name, steps in (("mine", 2), ("other", 4)):  # the same recipe: with another length its rates fall otherwise
        config = configs.from_preset("tiny", {"steps": steps, "evaluate_every": 2})
        folders[name] = Trainer(config, corpus, tmp_path / name, torch.device("cpu")).train()
    loaded = checkpoint.load(folders["mine"])
    with pytest.raises(BadConfig, match="trained another checkpoint"):
        write(loaded, corpus, tmp_path / "out", windows=2, run=tmp_path / "other", control=None)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(BadConfig, match="would be lost"):
        write(loaded, corpus, tmp_path / "project", windows=2, run=None, control=None)
    assert (tmp_path / "project" / "README.md").read_text() == "mine"
    report = write(loaded, corpus, folders["mine"], windows=2, run=tmp_path / "mine", control=None)
    assert [frame["step"] for frame in report["specialisation"]] == [2]


def test_what_a_report_would_end_on_is_refused_before_it_measures(tmp_path: Path) -> None:
    corpus = Corpus("verse", CHARACTERS, CHARACTERS[:9])  # which fills no window, so that nothing can be measured
    told = {"corpus": {"name": "verse", "sha256": corpus.digests}}
    checkpoint.save(tmp_path / "mine", as_trained(plain_files(), **told))
    loaded = checkpoint.load(tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(runs.NotWritable, match="file is no folder"):
        write(loaded, corpus, tmp_path / "file", windows=1, run=None, control=None)
    with pytest.raises(BadConfig, match=r"has no metrics\.jsonl"):
        write(loaded, corpus, tmp_path / "out", windows=1, run=tmp_path, control=None)


def test_a_report_stands_beside_its_checkpoint_and_keeps_what_is_no_longer_at_hand(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text(VERSE)
    folder = train_here(tmp_path / "verse.txt", "mine")
    train_here(tmp_path / "verse.txt", "dense", "--num-experts", 1, "--experts-per-token", 1, "--expert-size", 64)
    before = checkpoint.verify(folder)
    report = ("report", "--checkpoint", folder.relative_to(tmp_path), "--data", "verse.txt", "--windows", 4)
    process = training(*report, "--run", "runs/mine", "--control", "runs/dense/step-20", cwd=tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.splitlines()[-1] == "read it:  runs/mine/step-20/README.md"
    assert checkpoint.verify(folder) == before
    figures = json.loads((folder / "report.json").read_text())
    assert [frame["step"] for frame in figures["specialisation"]] == [10, 20]
    assert figures["control"]["active_parameters"] == figures["result"]["active_parameters"] - 2 * 32 * 3
    card = (folder / "README.md").read_text()
    shown = {line.rpartition("(")[2].rstrip(")") for line in card.splitlines() if line.startswith("![")}
    assert shown == {path.name for path in folder.iterdir() if path.suffix in (".png", ".gif")}
    assert len(shown) == 5
    assert "\n\n- below" not in card
    of_dense = tmp_path / "runs" / "dense" / "step-20"
    own = corpora.from_file(tmp_path / "verse.txt")
    write(checkpoint.load(folder), own, folder, windows=4, run=None, control=None)
    write(checkpoint.load(of_dense), own, of_dense, windows=4, run=of_dense.parent, control=None)
    card = (of_dense / "README.md").read_text()
    assert "A dense language model" in card
    assert "1 experts" not in card
    assert not (of_dense / "specialisation.gif").exists()
    assert json.loads((folder / "report.json").read_text()) == figures
    assert said("export", folder, "out", cwd=tmp_path)[0] == 0
    assert shown <= {path.name for path in (tmp_path / "out").iterdir()}
    exported = checkpoint.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["fingerprint"] == exported.manifest.fingerprint
    again = write(exported, own, tmp_path / "out", windows=4, run=None, control=None)
    assert again | {"fingerprint": ""} == figures | {"fingerprint": ""}, "what it had of a run and a control is kept"
    assert_refused_here("trained on another text", "report", "--checkpoint", folder, "--data", __file__, cwd=tmp_path)
