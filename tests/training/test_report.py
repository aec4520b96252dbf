"""A report's figures against cases worked by hand, and the whole command on a run of seconds."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

from model import checkpoint
from model.checkpoint import CheckpointError
from model.tokenizer import Tokenizer
from tests.checkpoints import CHARACTERS, as_trained, plain_files, tiny_files, tiny_model
from tests.training.processes import ROOT, VERSE, assert_refused_here, said, train_here, training
from training import config as configs
from training import corpora, runs
from training.config import BadConfig
from training.corpora import Corpus
from training.evaluate import spread_windows
from training.record import training_section
from training.report import experts, pictures
from training.report.card import card, reading
from training.report.overlap import longest_overlap
from training.report.write import control_figures, write
from training.trainer import Trainer


def test_every_token_has_the_class_of_its_first_character_that_is_no_space() -> None:
    tokens = [
        "\n",
        " ",
        "A",
        "e",
        "t",
        "7",
        "!",
        "é",
        " the",
        " \n",
        "",
        "—",
        "bytes:\\xc3",  # the letters, which are a text
    ]
    named = ["newline", "space", "upper case", "vowel", "consonant", "digit", "punctuation"]
    assert [experts.class_of(token.encode()) for token in tokens] == [
        *named, "vowel", "consonant", "newline", "other", "other", "consonant",
    ]  # fmt: skip
    assert [experts.class_of(part) for part in (b"\xc3", b" \xf0", "о".encode())] == ["other"] * 3


def test_lift_is_one_without_preference_and_the_number_of_experts_for_a_sole_taker() -> None:
    even = experts.lift(torch.tensor([[[3, 6], [3, 6]]]))
    assert even.tolist() == [[[1, 1], [1, 1]]]
    split = experts.lift(torch.tensor([[[8, 0, 0], [0, 8, 0]]]))
    assert split[..., :2].tolist() == [[[2, 0], [0, 2]]]
    assert split[..., 2].isnan().all()


def test_favourites_are_what_an_expert_took_most_of_beyond_its_share() -> None:
    counts = torch.tensor([[[90, 10, 1], [10, 90, 0]]])
    (first, second), = experts.favourites(counts, ["a", "b", "z"], experts_per_token=1)  # fmt: skip
    assert [like["token"] for like in first] == ["a", "z"]  # z has the higher lift, and one occurrence
    assert first[0]["taken"] == 0.9
    assert second == [{"token": "b", "lift": 1.81, "taken": 0.9}]


def test_load_of_a_balanced_and_of_a_collapsed_layer() -> None:
    balanced, collapsed = experts.load(torch.tensor([[5, 5, 5, 5], [0, 0, 20, 0]]))
    assert (balanced["max_load_ratio"], balanced["entropy_ratio"], balanced["idle"]) == (1, 1, 0)
    assert (collapsed["max_load_ratio"], collapsed["entropy_ratio"], collapsed["idle"]) == (4, 0, 3)
    (single,) = experts.load(torch.tensor([[20]]))
    assert (single["max_load_ratio"], single["entropy_ratio"], single["idle"]) == (1, 1, 0)


def test_choices_are_counted_under_the_token_that_was_fed() -> None:
    model = tiny_model()
    inputs = torch.tensor([[3, 3, 7, 9]] * 30)  # more than one batch of windows
    counts = experts.count_choices(model, inputs)
    assert counts.sum((1, 2)).tolist() == [2 * inputs.numel()] * 3
    assert counts.sum(1)[0].nonzero().flatten().tolist() == [3, 7, 9]
    assert counts.sum(1)[0, 3] == 2 * 60
    chosen = model(inputs)[1][0].expert_ids[inputs.flatten() == 9]
    assert counts[0, :, 9].tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()


def test_windows_are_exact_and_reach_from_the_first_to_the_last() -> None:
    inputs, targets = spread_windows(torch.arange(101), length=10, most=3)
    assert inputs[:, 0].tolist() == [0, 40, 90]
    assert torch.equal(targets, inputs + 1)


def test_the_causal_map_is_the_loss_without_an_expert_minus_with_it() -> None:
    model = tiny_model()
    silent = model.layers[1].moe.experts
    with torch.no_grad():
        for weight in silent.parameters():
            weight.zero_()  # a layer whose experts write nothing
    ids = torch.randint(0, 65, (5, 33), generator=torch.Generator().manual_seed(1))
    found = experts.causal_map(model, ids[:, :-1], ids[:, 1:])
    assert found.cost[1].abs().max() < 1e-6
    disabled = torch.zeros(1, 3, 4, dtype=torch.bool)
    disabled[0, 2, 3] = True
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(model(ids[:, :-1], off)[0].flatten(0, 1), ids[:, 1:].flatten()).item()
            for off in (None, disabled)
        ]
    assert found.baseline == pytest.approx(losses[0], abs=1e-5)
    assert found.cost[2, 3].item() == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert abs(found.cost[2, 3]) > 1e-4


def test_the_reading_names_the_dearest_and_the_cheapest_expert() -> None:
    causal = {"cost": [[0.01, 0.5], [0.02, -0.001]], "standard_error": [[0.01, 0.01], [0.001, 0.01]]}
    sentence = reading(causal)
    assert "expert 1 of layer 0 costs most, +0.5000" in sentence
    assert "expert 1 of layer 1 costs least, -0.0010" in sentence
    assert "for 2 of 4" in sentence
    of_one_window = {"cost": [[0.5, 0.5]], "standard_error": [[None, None]]}
    assert reading(of_one_window).endswith("+0.5000; one window gives no standard error.")


@pytest.mark.parametrize(
    ("sample", "text", "longest"),
    [
        ("abcdef", "xxcdexx", "cde"),
        ("xyz", "abc", ""),
        ("whole", "the whole of it", "whole"),
        ("ab--abc", "abc", "abc"),
        ("", "abc", ""),
    ],
)
def test_the_longest_overlap(sample: str, text: str, longest: str) -> None:
    assert longest_overlap(sample, text) == longest


@pytest.mark.parametrize("passage", ["plain", "` and ```"])
def test_whatever_a_model_writes_its_card_is_one_table_and_whole_code(passage: str) -> None:
    """As Markdown is read: every token comes back from its cell, and no sample ends its own block."""
    shown = {
        "\n\n": r"\n\n",
        " |": "\u2423|",
        "|": "|",
        "`": "`",
        "a``|b": "a``|b",
        "\\": "\\",
        "\\|": "\\|",
        " the ": "\u2423the\u2423",
        "\t\u2028": r"\t\u2028",
        "bytes:\\xc3": "bytes:\\xc3",
    }
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, report = (json.loads((folder / name).read_text()) for name in ("training.json", "report.json"))
    report["favourites"] = [[[{"token": token, "lift": 2.0, "taken": 0.5}] for token in shown]] * 2
    report["overlap"]["passage"] = passage
    report["samples"] = [f"a list:\n{passage}\n```\ncode\n```", "the second"]
    read = MarkdownIt("commonmark").enable("table").parse(card("any", checkpoint.read_config(folder), facts, report))
    codes = [child.content for token in read for child in token.children or [] if child.type == "code_inline"]
    assert codes[-2 * len(shown) - 1 :] == [*shown.values(), *shown.values(), repr(passage)]
    assert [token.content.strip() for token in read if token.type == "fence"] == report["samples"]


def test_the_shipped_card_is_made_of_its_own_record_and_report_and_the_pages_tell_its_loss() -> None:
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, report = (json.loads((folder / name).read_text()) for name in ("training.json", "report.json"))
    assert report["fingerprint"] == checkpoint.verify(folder).fingerprint
    assert card("shakespeare", checkpoint.read_config(folder), facts, report) == (folder / "README.md").read_text()
    for page in ("README.md", "docs/training.md"):
        assert f"**{facts['validation_loss']:.4f}**" in (ROOT / page).read_text(), page


def test_published_figures_are_told_of_the_text_that_they_are_of() -> None:
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, shape = json.loads((folder / "training.json").read_text()), checkpoint.read_config(folder)
    assert "- below 1.7439 nats per character by step 200" in training_section(shape, facts)
    facts["corpus"] = {"name": "shakespeare", "sha256": Corpus("shakespeare", "a", "b").digests}  # a file's name
    assert "- below" not in training_section(shape, facts)


def test_a_card_of_too_many_experts_says_why_it_tells_nothing_of_each() -> None:
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, report = (json.loads((folder / name).read_text()) for name in ("training.json", "report.json"))
    report |= {"favourites": None, "classes": None, "causal_map": None}
    shape = dataclasses.replace(checkpoint.read_config(folder), num_experts=1024)
    assert "is told of at most 512 experts" in card("any", shape, facts, report)


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
