"""Training learns, stops cleanly, goes on exactly where it was, and refuses what cannot be."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from model import checkpoint
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.checkpoints import TINY, tiny_files, tiny_model
from tests.training.processes import ROOT, VERSE, start, train, training
from training import config as configs
from training import corpora, runs
from training.chance import chance_in
from training.config import BadConfig, TrainingConfig
from training.corpora import Corpus
from training.evaluate import evaluate
from training.history import History, flops_per_token
from training.memory import least_bytes, require_room
from training.optimizer import LearningRates, Muon, Optimizer, polar_factor, schedule
from training.sample import stream
from training.trainer import Trainer, fast_products


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "nonsense"], "choose one of"),
        (["train", "--preset", "tiny", "--steps", "0"], "steps is 0"),
        (["train", "--preset", "tiny", "--hidden-size", "30"], "hidden_size is 30"),
        (["train", "--preset", "tiny", "--data", "none.txt"], "none.txt cannot be read"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--resume"], "no whole checkpoint"),
        (["train", "--preset", "tiny", "--data", "short.txt"], "context_length 32 needs more"),
        (["train", "--preset", "tiny", "--tokenizer", "word"], "tokenizer is 'word'"),
        (["train", "--preset", "tiny", "--bpe-vocab-size", "255"], "bpe_vocab_size is 255"),
        (["train", "--preset", "tiny", "--run", "../out"], "plain name"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--run", ""], "plain name"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--run", "caf\udce9"], "plain name"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--corpus", "tinyshakespeare"], "leave one of them out"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--batch-size", "100000000000"], "GiB of memory"),
        (["train", "--preset", "tiny", "--matrix-learning-rate", "nan"], "matrix_learning_rate is nan"),
        (["train", "--preset", "tiny", "--clip-norm", "nan"], "clip_norm is nan"),
        (["train", "--preset", "tiny", "--clip-norm=-1"], "clip_norm is -1"),
        (["train", "--preset", "tiny", "--device", "cuda"], "torch sees no GPU"),
        (["train", "--preset", "tiny", "--activation", "tanh"], "activation is 'tanh'"),
        (["train", "--preset", "tiny", "--load-weight", "0.1"], "router_noise gaussian"),
        (["sample", "--checkpoint", "none"], "none is no folder"),
        (["sample", "--temperature", "nan"], "--temperature is nan"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: Path, arguments: list[str], message: str) -> None:
    process = training(*arguments, cwd=text.parent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in output
    assert len(output.splitlines()) == 1


def test_what_a_preset_or_a_flag_refuses_is_said_at_once_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for wrong in (
        ["train", "--preset", "none"],
        ["train", "--steps", 0],
        ["train", "--run", "a/b"],
        ["sample", "--top-p", 2],
    ):
        process = training(*wrong, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "torch" not in output


def test_a_run_that_cannot_be_written_is_refused_before_its_text_is_read(text: Path) -> None:
    (text.parent / "runs").write_text("no folder")
    process = training("train", "--preset", "tiny", "--data", "none.txt", cwd=text.parent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith("runs/tiny cannot be written")
    assert len(output.splitlines()) == 1


def test_the_best_step_outlives_the_newest_two(tmp_path: Path) -> None:
    history, files = History(), tiny_files(tiny_model())
    for step, loss in enumerate([3.0, 1.5, 2.0, 1.6, 1.9], start=1):
        history.step = step
        history.remember(loss, loss, tokens=10 * step, flops=100 * step)
        assert history.best
        runs.save_step(tmp_path, step, files, "card", {"w": torch.ones(2)}, int(history.best["step"]))
    assert history.best == {"step": 2, "validation_loss": 1.5}
    assert sorted(runs.step_of(folder) for folder in tmp_path.glob("step-*")) == [2, 4, 5]
    assert history.milestones == {"1.7439": {"step": 2, "tokens": 20, "seconds": 0.0, "flops": 200}}


def test_an_optimizer_that_is_restored_goes_on_where_its_model_is(device: torch.device) -> None:
    def stepped(model: Transformer, number: int, state: dict[str, torch.Tensor] | None = None) -> Optimizer:
        optimizer = Optimizer(model, LearningRates())
        if state is not None:
            optimizer.restore(state)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(number, factor=1.0)
        return optimizer

    model = tiny_model().to(device)
    state = {name: tensor.cpu() for name, tensor in stepped(model, 0).state().items()}  # as a file tells it
    other = copy.deepcopy(model)
    stepped(other, 1, state)
    assert all(tensor.device.type == device.type for tensor in other.parameters())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other.state_dict(), model.state_dict())
    stepped(model, 1, {name: tensor.to(device) for name, tensor in state.items()})
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_run_has_one_trainer_at_a_time(text: Path) -> None:
    run = text.parent / "runs" / "mine"
    with runs.claim(run, seen=[]):
        process = start(text, "mine")
        output, _ = process.communicate(timeout=60)
        assert output == "runs/mine is being trained by another process; name another run with --run\n"
        assert process.returncode == 1
    train(text, "mine")
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


def test_a_run_of_another_version_of_the_program_is_refused_in_a_line(text: Path) -> None:
    corpus, run = corpora.from_file(text), text.parent / "run"
    config = configs.from_preset("tiny", {"steps": 2, "evaluate_every": 2})
    folder = Trainer(config, corpus, run, torch.device("cpu")).train()
    kept = {name: (folder / name).read_bytes() for name in checkpoint.verify(folder).files}
    facts = json.loads(kept[checkpoint.RECORD])
    facts["config"]["not_yet_known"] = 1
    shutil.rmtree(folder)
    checkpoint.save(folder, kept | {checkpoint.RECORD: json.dumps(facts).encode()})
    with pytest.raises(BadConfig, match=r"begun by another version of this program: .*not_yet_known"):
        Trainer.resume(replace(config, steps=3), corpus, run, torch.device("cpu"))


def test_a_text_whose_file_name_is_no_utf8_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.txt"
    path.write_text(VERSE)
    train(path, "mine", "--steps", 2)
    assert checkpoint.read_record(tmp_path / "runs" / "mine" / "step-2")["corpus"]["name"] == "caf?"


def test_a_clipped_step_sees_gradients_of_the_norm_that_was_asked_for() -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = Optimizer(model, LearningRates(), clip_norm=0.5)
    optimizer.step(0, factor=0.0)
    state = optimizer.state()
    seen = [tensor / 0.1 for name, tensor in state.items() if name.startswith("adamw.exp_avg.")]
    seen += [tensor / 0.15 for name, tensor in state.items() if name.startswith("muon.")]
    assert sum(tensor.numel() for tensor in seen) == model.config.num_parameters
    assert torch.cat([tensor.flatten() for tensor in seen]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_products_are_fast_within_a_step_alone_even_if_it_raises() -> None:
    """What is scored afterwards is multiplied as everywhere."""
    products = cast(Any, torch.backends.mkldnn).matmul
    with suppress(ZeroDivisionError), fast_products(torch.device("cpu")):
        assert products.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert products.fp32_precision == "none"


def test_flops_are_six_for_each_active_weight_and_twelve_for_each_position_attended() -> None:
    config = tiny_model().config
    weights = 65 * 32 + 32  # the head and its norm
    for _ in range(3):
        weights += 32 * 32 * (2 * 2 + 2 * 1) + 2 * 32  # attention and the norms of its heads
        weights += 4 * 32 + 2 * 3 * 32 * 32 + 2 * 32  # router, two experts, two norms
    assert flops_per_token(config) == 6 * weights + 12 * 3 * 2 * 32 * 32


def test_a_resume_is_refused_for_another_run_and_a_damaged_step_is_passed_over(text: Path) -> None:
    train(text, "mine")
    run = text.parent / "runs" / "mine"
    for other, named in (["--seed", 9], "seed"), (["--weight-decay", 0.3], "weight_decay"), ([], "20 steps already"):
        process = training(
            "train", "--preset", "tiny", "--data", text, "--run", "mine", "--resume", *other, cwd=text.parent
        )
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, len(output.splitlines())) == (1, 1)
        assert named in output
    assert runs.newest(run) == run / "step-20"
    (run / "step-20" / runs.RESUME).write_bytes(b"torn")
    assert runs.newest(run) == run / "step-10"
    train(text, "mine", "--resume", "--steps", 21)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 22)), "a step is on record once, however often it was taken"


def test_a_run_that_diverges_says_so_and_keeps_what_it_had(text: Path) -> None:
    arguments = ("train", "--preset", "tiny", "--data", text, "--run", "wild", "--evaluate-every", 1)
    process = training(*arguments, "--embedding-learning-rate", 1e18, cwd=text.parent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "lower the learning rates" in output.splitlines()[-1]
    for folder in (text.parent / "runs" / "wild").glob("step-*"):
        checkpoint.load(folder)


def test_the_loss_that_is_descended_holds_balance_and_z(text: Path) -> None:
    """With the cross entropy's part taken away, the router still moves, and by either term alone."""
    corpus = corpora.from_file(text)
    gradients = {}
    for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        config = configs.from_preset("tiny", {"balance_weight": balance, "z_weight": z, "warmup_steps": 10**6})
        trainer = Trainer(config, corpus, text.parent / "run", torch.device("cpu"))
        router = trainer.model.layers[0].moe.router.weight
        with torch.no_grad():
            router.normal_(generator=torch.Generator().manual_seed(0))
        seen: list[torch.Tensor] = []
        router.register_hook(seen.append)
        trainer.train_step(0)
        gradients[balance, z] = seen[0].abs().sum().item()
    # The head is zero at first, so cross entropy alone moves no router at all.
    assert gradients[0.0, 0.0] == 0
    assert gradients[1.0, 0.0] > 0
    assert gradients[0.0, 1.0] > 0


def test_one_step_of_muon_is_the_hand_written_one() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(1))
    first = weight.detach().clone()
    with torch.no_grad():
        Muon({"w": weight}, learning_rate=0.02, weight_decay=0.1).step(0, factor=0.5)
    direction = 0.15 * weight.grad + 0.85 * 0.15 * weight.grad
    expected = first * (1 - 0.01 * 0.1) - 0.01 * (96 / 64) ** 0.5 * polar_factor(direction)
    torch.testing.assert_close(weight.detach(), expected)


def test_export_keeps_what_serving_reads(text: Path) -> None:
    train(text, "export")
    process = training("export", "runs/export/step-20", "shipped", cwd=text.parent)
    process.communicate(timeout=60)
    shipped = text.parent / "shipped"
    assert not (shipped / runs.RESUME).exists()
    assert (shipped / "README.md").exists()
    checkpoint.load(shipped)


def test_a_sample_continues_its_prompt_and_repeats_with_its_seed(text: Path) -> None:
    train(text, "sample")
    arguments = ("sample", "--checkpoint", "runs/sample/step-20", "The", "--length", 60, "--seed", 3)
    first, second = (training(*arguments, cwd=text.parent).communicate(timeout=60)[0] for _ in range(2))
    assert first == second
    assert first.startswith("The")
    assert len(first) == len("The") + 60 + 1


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 64), (2, 64, 96)])
def test_the_polar_factor_is_near_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    factor = polar_factor(matrices)
    values = torch.linalg.svdvals(factor)
    # Four steps bring all but the smallest singular values near one, and never turn a direction round.
    assert 0.6 < values.median() < 1.3
    assert values.max() < 1.6
    assert (torch.einsum("nio,nij,njo->no", u, factor, v.mT) > 0).all()


def test_the_schedule_rises_stays_and_falls_to_zero() -> None:
    factors = [schedule(step, 100, warmup_steps=10, warmdown_share=0.6) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:40] == [1.0] * 30
    assert factors[100] == 0
    assert factors == sorted(factors[:40]) + sorted(factors[40:], reverse=True)


def test_flags_reach_the_model_and_the_run() -> None:
    config = configs.from_preset("tiny", {"steps": 7, "num_experts": 16})
    assert (config.steps, config.model_config(10).num_experts) == (7, 16)
    assert configs.from_dict(config.as_dict()) == config
    with pytest.raises(BadConfig, match="num_layers"):
        configs.from_preset("tiny", {"num_layers": 0})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("steps", 1.5, "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("batch_size", True, "a whole number"),
        ("dropout", False, "a number"),
        ("items", 1, "true or false"),
        ("corpus", 3, "a word"),
        ("corpus", "nonsense", "one of shakespeare, tinyshakespeare"),
        ("dropout", 0.999999, "at most 0.999985"),
        ("expert_dropout", 0.999999, "at most 0.999985"),
        ("bpe_vocab_size", 10**11, "at most 16,777,216"),
    ],
)
def test_a_presets_value_that_cannot_be_is_refused_by_name(name: str, value: object, wanted: str) -> None:
    with pytest.raises(BadConfig, match=f"^{name} is {value!r}; it must be .*{wanted}"):
        configs.from_dict({name: value})


@pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe"])
def test_a_preset_that_is_no_toml_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(configs, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(BadConfig, match=r"mine\.toml is no preset: ") as caught:
        configs.from_preset("mine", {})
    assert len(str(caught.value).splitlines()) == 1


def test_the_largest_dropout_keeps_its_share_and_a_fraction_may_be_left_out() -> None:
    config = configs.from_dict({"dropout": configs.MOST_DROPOUT, "weight_decay": 0})
    chance = chance_in(config, {}, 0, torch.ones(8, 1000))
    assert chance is not None
    kept = chance.layer(0).drop_update(torch.ones(8, 1000, 64), "moe") > 0
    assert 0 < kept.float().mean() < 1e-4  # 2^-16 is the share


def test_memory_is_asked_for_what_a_run_surely_holds(text: Path) -> None:
    """Weights, gradients and the optimizer's state are a little more, for the vocabulary is not known before."""
    config = configs.from_preset("tiny", {"batch_size": 1})
    trainer = Trainer(config, corpora.from_file(text), text.parent / "run", torch.device("cpu"))
    trainer.train_step(0)
    held = [*trainer.model.parameters(), *trainer.model.parameters(), *trainer.optimizer.state().values()]
    assert least_bytes(config) < sum(tensor.nbytes for tensor in held) < 1.2 * least_bytes(config)


def test_what_memory_has_no_room_for_is_refused_and_what_just_fits_is_not() -> None:
    needed = least_bytes(configs.from_preset("tiny", {}))
    require_room(configs.from_preset("tiny", {}), needed)
    for sizes in ({"batch_size": 9}, {"expert_size": 48}, {"expert_size": 2**24}, {"context_length": 33}):
        with pytest.raises(BadConfig, match=r"need at least .* GiB of memory"):
            require_room(configs.from_preset("tiny", sizes), needed)
    require_room(configs.from_preset("tiny", {"batch_size": 9}), needed, num_ranks=4)


@pytest.mark.parametrize(("kind", "unit"), [("byte", "one byte"), ("bpe", "a few letters")])
def test_a_run_on_bytes_is_sampled_resumed_and_says_what_it_writes(text: Path, kind: str, unit: str) -> None:
    text.write_text(("na\u00efve \u20ac and caf\u00e9 \u2014 " * 9 + "\n") * 60)
    flags = ("--tokenizer", kind, "--bpe-vocab-size", 270, "--evaluate-every", 10)
    train(text, kind, *flags, "--steps", 10)
    train(text, kind, *flags, "--steps", 12, "--resume")
    folder = text.parent / "runs" / kind / "step-12"
    loaded = checkpoint.load(folder)
    assert loaded.tokenizer.vocab_size == (256 if kind == "byte" else 270)
    assert f"writes {unit} at a time" in (folder / "README.md").read_text()
    asked = ("sample", "--checkpoint", folder, "caf\u00e9", "--length", 50, "--seed", 3)
    output = training(*asked, cwd=text.parent).communicate(timeout=60)[0]
    prompt_ids = loaded.tokenizer.encode("caf\u00e9")
    drawn = list(stream(loaded.model, prompt_ids, 50, temperature=0.8, top_k=0, top_p=1.0, seed=3))
    assert output.replace("\r", "\n") == ("caf\u00e9" + loaded.tokenizer.decode(drawn) + "\n").replace("\r", "\n")


def test_a_text_is_measured_in_tokens_before_it_is_trained_on(text: Path) -> None:
    short = Corpus("short", "a" * 100, "a" * 30 + "\u20ac\u20ac")
    with pytest.raises(BadConfig, match="part of 32 tokens"):
        Trainer(TrainingConfig(shape=TINY), short, text.parent / "runs", torch.device("cpu"))
    Trainer(TrainingConfig(tokenizer="byte", shape=TINY), short, text.parent / "runs", torch.device("cpu"))
