"""The committed checkpoint against an independent reading of it: Hugging Face transformers on the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint
from model.generate import generate
from model.routing import load_entropy_ratio
from tests.checkpoints import tiny_checkpoint
from tests.evidence import At, Evidence
from training.corpora import Corpus
from training.evaluate import evaluate, stream_loss

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "shakespeare"
LOSS_LIMIT = 1.24


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return checkpoint.load(SHIPPED)


@pytest.fixture(scope="module")
def validation(shipped: Checkpoint, corpus: Corpus) -> Tensor:
    return torch.tensor(shipped.tokenizer.encode(corpus.validation))


@torch.inference_mode()
def theirs(folder: Path, ids: Tensor) -> Tensor:
    """Logits of windows (W, T) from transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return torch.cat([model(window).logits for window in ids.split(8)])


def test_validation_loss_from_both_readers(
    shipped: Checkpoint, corpus: Corpus, validation: Tensor, at: At, evidence: Evidence
) -> None:
    from transformers import AutoTokenizer

    length, windows = shipped.config.context_length, at(24, 435)
    ids = torch.tensor(AutoTokenizer.from_pretrained(str(SHIPPED)).encode(corpus.validation))
    assert torch.equal(ids, validation)
    ids = ids[: windows * length + 1]
    ours = evaluate(shipped.model, ids)
    assert ours.num_windows == windows
    logits = theirs(SHIPPED, ids[:-1].view(windows, length))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()
    evidence(f"validation loss over {windows} windows, ours", ours.loss)
    evidence("the same from transformers", loss)
    assert abs(ours.loss - loss) < 1e-3
    if windows == 435:
        assert ours.loss <= LOSS_LIMIT


def test_the_record_tells_the_truth(shipped: Checkpoint, validation: Tensor, evidence: Evidence) -> None:
    result = evaluate(shipped.model, validation)
    evidence("validation loss, nats per character", result.loss)
    evidence("busiest expert, times the mean load", result.max_load)
    assert result.num_windows == 435
    assert result.loss <= LOSS_LIMIT
    assert result.loss == pytest.approx(shipped.training["validation_loss"], abs=1e-3)
    assert result.num_idle == 0
    assert result.max_load <= 1.3
    assert load_entropy_ratio(result.counts).min() >= 0.98
    for layer, shares in zip(shipped.training["routing_baseline"], result.shares, strict=True):
        assert layer == pytest.approx(shares, abs=1e-3)


def test_loss_while_streaming_is_not_above_that_over_windows(
    shipped: Checkpoint, validation: Tensor, at: At, evidence: Evidence
) -> None:
    ids = validation[: at(20_000, len(validation))]
    windows, streaming = evaluate(shipped.model, ids).loss, stream_loss(shipped.model, ids)
    evidence("loss over windows", windows)
    evidence("loss as one endless stream", streaming)
    assert streaming <= windows


@torch.inference_mode()
def test_logits_agree_with_transformers(shipped: Checkpoint, validation: Tensor, at: At, evidence: Evidence) -> None:
    windows = at(2, 24)
    ids = validation[: windows * 256].view(windows, 256)
    difference = (shipped.model(ids)[0] - theirs(SHIPPED, ids)).abs().max().item()
    evidence("largest difference of a logit from transformers", difference)
    assert difference < 1e-3


@torch.inference_mode()
def test_logits_agree_with_transformers_beyond_the_window(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    ids = torch.randint(0, 65, (2, 150), generator=torch.Generator().manual_seed(5))  # context_length is 32
    assert (checkpoint.load(folder).model(ids)[0] - theirs(folder, ids)).abs().max().item() < 1e-3


def test_a_greedy_continuation_is_the_same_for_200_characters(shipped: Checkpoint, evidence: Evidence) -> None:
    from transformers import AutoModelForCausalLM

    prompt_ids = shipped.tokenizer.encode("ROMEO:\n")
    model = AutoModelForCausalLM.from_pretrained(str(SHIPPED), dtype=torch.float32)
    continued = model.generate(torch.tensor([prompt_ids]), max_new_tokens=200, do_sample=False)
    expected = continued[0, len(prompt_ids) :].tolist()
    assert generate(shipped.model, prompt_ids, 200) == expected
    evidence("greedy characters equal to transformers'", 200)
