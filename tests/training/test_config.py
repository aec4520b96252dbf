"""What is asked for is what is trained, and what cannot be is refused in a line before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.processes import ROOT, assert_refused_here, training
from training import config as configs
from training import corpora
from training.__main__ import main
from training.config import BadConfig
from training.memory import least_bytes, require_room
from training.process import told
from training.trainer import Trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "nonsense"], "choose one of"),
        (["train", "--preset", "tiny", "--steps", "0"], "steps is 0"),
        (["train", "--preset", "tiny", "--hidden-size", "30"], "hidden_size is 30"),
        (["train", "--preset", "tiny", "--tokenizer", "word"], "tokenizer is 'word'"),
        (["train", "--preset", "tiny", "--bpe-vocab-size", "255"], "bpe_vocab_size is 255"),
        (["train", "--preset", "tiny", "--run", "../out"], "plain name"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--run", ""], "plain name"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--run", "caf\udce9"], "plain name"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--corpus", "tinyshakespeare"], "leave one of them out"),
        (["train", "--preset", "tiny", "--matrix-learning-rate", "nan"], "matrix_learning_rate is nan"),
        (["train", "--preset", "tiny", "--clip-norm", "nan"], "clip_norm is nan"),
        (["train", "--preset", "tiny", "--clip-norm=-1"], "clip_norm is -1"),
        (["train", "--preset", "tiny", "--activation", "tanh"], "activation is 'tanh'"),
        (["train", "--preset", "tiny", "--load-weight", "0.1"], "router_noise gaussian"),
        (["train", "--preset", "tiny", "--jitter", "0.1"], "make that jitter, or leave jitter out"),
        (["train", "--preset", "tiny", "--weight-decay", "75"], "matrix_learning_rate times weight_decay is 1.5"),
        (
            ["train", "--preset", "tiny", *(f"--{of}-learning-rate=0" for of in ("matrix", "embedding", "head"))],
            "all learning rates are 0",
        ),
        (["train", "--preset", "tiny", "--warmup-steps", "21"], "warmup_steps is 21, but steps is 20"),
        (["train", "--preset", "tiny", "--bpe-vocab-size", "300"], "make that bpe, or leave bpe_vocab_size out"),
        (["evaluate", "--corpus", "tinyshakespeare", "--data", "verse.txt"], "leave one of them out"),
        (["report", "--corpus", "tinyshakespeare", "--data", "verse.txt"], "leave one of them out"),
        (["sample", "--temperature", "nan"], "--temperature is nan"),
        (["sample", "--temperature", "1e-308"], "0, which is greedy, or from 0.01 up"),
        (["sample", "--data", "verse.txt"], "--data is for --items N"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: Path, arguments: list[str], message: str) -> None:
    assert_refused_here(message, *arguments, cwd=text.parent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "tiny", "--data", "none.txt"], "none.txt cannot be read"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--resume"], "no whole checkpoint"),
        (["train", "--preset", "tiny", "--data", "short.txt"], "context_length 32 needs more"),
        (["train", "--preset", "tiny", "--data", "verse.txt", "--batch-size", "100000000000"], "GiB of memory"),
        (["train", "--preset", "tiny", "--device", "cuda"], "torch sees no GPU"),
        (["sample", "--checkpoint", "none"], "none is no folder"),
    ],
)
def test_what_only_a_look_around_can_tell_is_refused_in_one_line(
    text: Path, arguments: list[str], message: str
) -> None:
    assert_refused_here(message, *arguments, cwd=text.parent)


def test_memory_that_runs_out_on_the_way_is_told_in_one_line_and_a_fault_is_not() -> None:
    with pytest.raises(RuntimeError) as of_a_cpu:
        torch.empty(2**60)
    for error in (of_a_cpu.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"), MemoryError()):
        assert (
            told(error) == "there is not enough memory for this; a smaller batch_size, or a smaller model, needs less"
        )
    assert told(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_an_interrupt_while_torch_is_imported_ends_the_process(tmp_path: Path) -> None:
    """As torch does when its import of numpy is interrupted, this one takes no notice."""
    (tmp_path / "torch.py").write_text(
        "import signal\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise SystemExit('went on')\n"
    )
    process = training("evaluate", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")


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


@pytest.mark.parametrize("arguments", [["train", "--steps", "many"], ["trian"], [], ["report", "--window", "3", "x"]])
def test_a_line_that_cannot_be_understood_is_refused_in_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith("python -m training")
    assert "--help" in line


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["sample"], ["report"], ["export"]])
def test_every_command_tells_what_there_is(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert ("".join(command) or "evaluate  loss over") in capsys.readouterr().out


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


def test_what_a_preset_or_its_shape_does_not_have_is_named() -> None:
    for values, message in (
        ({"step": 3}, "^a preset has no step; train --help "),
        ({"shape": {"layers": 3, "num_heads": 4}}, "^a shape has no layers; train --help "),
        ({"shape": 3}, "^shape is 3; it must be a table$"),
        ({"shape": {"num_layers": 2.0}}, "^num_layers is 2.0; it must be a whole number$"),
        ({"shape": {"rope_theta": "high"}}, "^rope_theta is 'high'; it must be a number$"),
    ):
        with pytest.raises(BadConfig, match=message):
            configs.from_dict(values)


def test_a_preset_may_leave_the_fraction_of_a_number_out() -> None:
    values = {"dropout": 0, "shape": {"rope_theta": 10_000}}
    assert configs.from_dict(values).model_config(65) == configs.from_dict({}).model_config(65)


@pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe"])
def test_a_preset_that_is_no_toml_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(configs, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(BadConfig, match=r"mine\.toml is no preset: ") as caught:
        configs.from_preset("mine", {})
    assert len(str(caught.value).splitlines()) == 1


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
