"""The comparison with other engines tells where two texts part, and how close our choice was. No engine is asked."""

from pathlib import Path

import pytest
import torch

from benchmarks.interop import compare, lengths_within, our_text
from model import checkpoint
from model.checkpoint import Checkpoint
from model.generate import generate
from tests.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("interop")
    return checkpoint.load(tiny_checkpoint(folder / "tiny"))


def test_our_text_is_greedy_and_fits_with_its_prompt_into_the_context(loaded: Checkpoint) -> None:
    assert lengths_within(loaded, ["ab", "a" * 30], 20) == [20, 2]
    ids = generate(loaded.model, loaded.tokenizer.encode("ROMEO:"), 20)
    assert our_text(loaded, "ROMEO:", 20) == loaded.tokenizer.decode(ids)


def test_a_difference_is_told_by_its_place_and_our_margin_there(loaded: Checkpoint) -> None:
    ours = our_text(loaded, "ROMEO:", 12)
    same = compare(loaded, "ROMEO:", ours, ours)
    assert (same.equal, same.margin) == (12, None)
    other = "?" if ours[7] != "?" else "!"
    differs = compare(loaded, "ROMEO:", ours, ours[:7] + other + ours[8:])
    assert differs.equal == 7
    with torch.inference_mode():  # with gradients attention is summed in another order on a CPU
        logits, _ = loaded.model(torch.tensor([loaded.tokenizer.encode("ROMEO:" + ours[:7])]))
    first, second = logits[0, -1].sort(descending=True).values[:2]
    assert differs.margin == pytest.approx((first - second).item())
    assert compare(loaded, "ROMEO:", ours, ours[:5]).equal == 5
    assert "7 of 12" in str(differs)
