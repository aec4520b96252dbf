"""The GGUF file says what the model is: its tensors, its sizes, its spelling. What it cannot say is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from model import checkpoint
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from tests.checkpoints import CHARACTERS, tiny_checkpoint, tiny_model
from tests.training.processes import assert_refused_here, training
from training import gguf_export
from training.gguf_export import DType, NoCounterpart, vocabulary_of


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Sizes that all differ, so that none can stand for another."""
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    sizes: dict[str, Any] = {"hidden_size": 64, "num_experts": 5, "num_heads": 4, "num_kv_heads": 2, "expert_size": 48}
    return checkpoint.load(tiny_checkpoint(folder, **sizes, rope_theta=20_000.0, rms_norm_eps=1e-5))


def read_back(loaded: Checkpoint, path: Path, dtype: DType = "f32") -> gguf.GGUFReader:
    gguf_export.export(loaded, path, dtype)
    return gguf.GGUFReader(path)


def values(tensor: gguf.ReaderTensor) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def fact(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field, f"there is no {name}"
    return field.contents()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_tensors_of_the_file_are_those_of_the_model(loaded: Checkpoint, tmp_path: Path, dtype: DType) -> None:
    tensors = {tensor.name: values(tensor) for tensor in read_back(loaded, tmp_path / "m.gguf", dtype).tensors}
    model = loaded.model
    expected: dict[str, torch.Tensor] = {"output_norm.weight": model.norm.weight}
    for index, layer in enumerate(model.layers):
        of_layer: dict[str, torch.Tensor] = {
            "attn_norm": layer.attention_norm.weight,
            "attn_q": layer.attention.query.weight,
            "attn_k": layer.attention.key.weight,
            "attn_v": layer.attention.value.weight,
            "attn_output": layer.attention.out.weight,
            "attn_q_norm": layer.attention.query_norm.weight,
            "attn_k_norm": layer.attention.key_norm.weight,
            "ffn_norm": layer.moe_norm.weight,
            "ffn_gate_inp": layer.moe.router.weight,
            "ffn_gate_exps": layer.moe.experts.gate_up[:, 0],
            "ffn_up_exps": layer.moe.experts.gate_up[:, 1],
            "ffn_down_exps": layer.moe.experts.down,
        }
        expected |= {f"blk.{index}.{name}.weight": weight for name, weight in of_layer.items()}
    assert set(tensors) == {*expected, "token_embd.weight", "output.weight"}
    for name, weight in expected.items():
        # A checkpoint's weights are bfloat16 numbers already, so either kind holds them exactly.
        assert torch.equal(tensors[name], weight), name
    assert torch.equal(tensors["token_embd.weight"][:-1], model.embedding.weight)
    assert torch.equal(tensors["output.weight"][:-1], model.head.weight)


def test_the_matrices_take_half_the_room_as_bf16(loaded: Checkpoint, tmp_path: Path) -> None:
    kinds = {
        dtype: {each.name: each.tensor_type.name for each in read_back(loaded, tmp_path / dtype, dtype).tensors}
        for dtype in ("f32", "bf16")
    }
    assert set(kinds["f32"].values()) == {"F32"}
    assert kinds["bf16"]["blk.0.ffn_gate_exps.weight"] == kinds["bf16"]["token_embd.weight"] == "BF16"
    assert kinds["bf16"]["blk.0.ffn_norm.weight"] == kinds["bf16"]["output.weight"] == "F32"


def test_q8_0_rounds_the_matrices_whose_rows_are_whole_blocks_and_nothing_else(
    loaded: Checkpoint, tmp_path: Path
) -> None:
    exact = {each.name: values(each) for each in read_back(loaded, tmp_path / "f32").tensors}
    rounded = read_back(loaded, tmp_path / "q8_0", "q8_0")
    assert gguf.LlamaFileType(fact(rounded, "general.file_type")).name == "MOSTLY_Q8_0"
    kinds = {each.name: each.tensor_type.name for each in rounded.tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    # 48 numbers a row are a block and a half.
    assert kinds["blk.0.ffn_down_exps.weight"] == kinds["blk.0.ffn_norm.weight"] == kinds["output.weight"] == "F32"
    for each in rounded.tensors:
        # A block of 32 numbers is whole steps of its largest in 127, and the scale itself has 11 bits.
        step = exact[each.name].abs().max() / 127 if each.tensor_type.name == "Q8_0" else 0.0
        assert ((values(each) - exact[each.name]).abs() <= 0.6 * step).all(), each.name


def test_the_facts_of_the_file_are_those_of_the_configuration(loaded: Checkpoint, tmp_path: Path) -> None:
    reader, config = read_back(loaded, tmp_path / "m.gguf"), loaded.config
    assert fact(reader, "general.architecture") == "qwen3moe"
    told = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "rope.freq_base": config.rope_theta,
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": config.expert_size,
        "expert_weights_norm": True,
        "vocab_size": config.vocab_size + 1,
    }
    assert {name: fact(reader, f"qwen3moe.{name}") for name in told} == told


def test_the_end_that_is_added_is_never_the_likeliest_token(loaded: Checkpoint, tmp_path: Path) -> None:
    reader = read_back(loaded, tmp_path / "m.gguf")
    end = fact(reader, "tokenizer.ggml.eos_token_id")
    assert end == loaded.config.vocab_size
    assert not fact(reader, "tokenizer.ggml.add_bos_token")
    (head,) = (values(tensor) for tensor in reader.tensors if tensor.name == "output.weight")
    states = torch.randn(10_000, loaded.config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = states @ head.T
    assert (logits[:, end] < logits[:, :end].amax(dim=1)).all()


@pytest.mark.parametrize("text", [CHARACTERS, "\n \u00e9\u2026\U0001f600ab\u00ea\u2190"])
def test_the_vocabulary_spells_texts_as_ours_does(tmp_path: Path, text: str) -> None:
    """One byte or four: the tokenizers library, given the file's tokens and merges, finds our ids."""
    loaded = checkpoint.load(tiny_checkpoint(tmp_path / "tiny"))
    ours = Tokenizer.of_characters(text)
    config = dataclasses.replace(loaded.config, vocab_size=ours.vocab_size)
    other = dataclasses.replace(
        loaded, tokenizer=ours, config=config, model=tiny_model(vocab_size=ours.vocab_size).eval()
    )
    reader = read_back(other, tmp_path / "m.gguf")
    theirs = byte_level(fact(reader, "tokenizer.ggml.tokens"), fact(reader, "tokenizer.ggml.merges"))
    written = text + text[::-1] * 2
    assert theirs.encode(written).ids == ours.encode(written)
    assert theirs.decode(ours.encode(written)) == written


@pytest.mark.parametrize("ours", [Tokenizer.of_bytes(), Tokenizer.of_bpe("caf\u00e9 the theatre " * 9, 280)])
def test_bytes_and_their_pairs_keep_their_ids(ours: Tokenizer) -> None:
    vocabulary = vocabulary_of(ours)
    theirs = byte_level(list(vocabulary.tokens), list(vocabulary.merges))
    written = "the caf\u00e9\n\U0001f642"
    assert theirs.encode(written).ids == ours.encode(written)
    assert theirs.decode(ours.encode(written)) == written


def byte_level(tokens: list[str], merges: list[str]) -> tokenizers.Tokenizer:
    # The library wants every joined piece in the vocabulary; llama.cpp looks up only what is left at the end.
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        first, second = merge.split(" ")
        for piece in (first, second, first + second):
            vocabulary.setdefault(piece, len(vocabulary))
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))  # type: ignore[misc]
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def test_a_byte_level_bpe_keeps_its_tokens_and_merges() -> None:
    vocabulary, merges = {"a": 0, "b": 1, "\u0120": 2, "ab": 3}, [("a", "b")]
    tokenizer = Tokenizer(byte_level_bpe(vocabulary, merges))
    assert gguf_export.vocabulary_of(tokenizer) == gguf_export.Vocabulary(["a", "b", "\u0120", "ab"], ["a b"])


def byte_level_bpe(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], *, add_prefix_space: bool = False
) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return inner


@pytest.mark.parametrize(
    "inner",
    [
        tokenizers.Tokenizer(models.WordLevel({"the": 0, "cat": 1}, unk_token="the")),
        tokenizers.Tokenizer(models.BPE({"a": 0}, [])),
        byte_level_bpe({"a": 0}, [], add_prefix_space=True),
    ],
    ids=["words", "no bytes", "a space more"],
)
def test_another_kind_of_tokenizer_is_refused(inner: tokenizers.Tokenizer) -> None:
    with pytest.raises(NoCounterpart, match=r"^tokenizer.json's model.type is '\w+'"):
        gguf_export.vocabulary_of(Tokenizer(inner))


def test_a_model_without_a_counterpart_is_refused_by_the_field_in_the_way() -> None:
    config = tiny_model().config
    gguf_export.require_counterpart(config)
    foreign: dict[str, Any] = {"num_groups": 2, "activation": "relu", "gates_over": "all"}
    for field, value in foreign.items():
        with pytest.raises(NoCounterpart, match=f"^{field} is {value!r}; "):
            gguf_export.require_counterpart(dataclasses.replace(config, **{field: value}))


def test_the_command_writes_folder_and_file_and_replaces_nothing(tmp_path: Path) -> None:
    source, target, file = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out", tmp_path / "out.gguf"
    process = training("export", source, target, "--gguf", file, "--dtype", "bf16", cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"serve it:  make serve CHECKPOINT={target}\n")
    checkpoint.load(target)
    assert len(gguf.GGUFReader(file).tensors) == 3 + 12 * 3
    before = file.read_bytes()
    refuse(source, tmp_path / "other", "--gguf", file)
    assert file.read_bytes() == before
    assert not (tmp_path / "other").exists()
    refuse(source, target, "--gguf", tmp_path / "late.gguf")
    assert not (tmp_path / "late.gguf").exists()
    (tmp_path / "file").touch()
    refuse(source, tmp_path / "file" / "out", "--gguf", tmp_path / "late.gguf")
    assert not (tmp_path / "late.gguf").exists(), "its folder could not be made, so it would be half an export"
    assert {each.name for each in tmp_path.iterdir()} == {"tiny", "out", "out.gguf", "file"}


@pytest.mark.parametrize(("folder", "file"), [("out", "out"), ("out", "beside/../out/m.gguf"), ("out/model", "out")])
def test_a_file_and_a_folder_in_each_others_way_are_refused_before_either_is_there(
    tmp_path: Path, folder: str, file: str
) -> None:
    source = tiny_checkpoint(tmp_path / "tiny")
    refuse(source, tmp_path / folder, "--gguf", tmp_path / file, message="in each other's way")
    assert [each.name for each in tmp_path.iterdir()] == ["tiny"]


def test_a_dtype_of_no_file_is_refused(tmp_path: Path) -> None:
    refuse(tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out", "--dtype", "bf16", message="add --gguf FILE")
    assert not (tmp_path / "out").exists()


def refuse(source: Path, *arguments: object, message: str = "") -> None:
    assert_refused_here(message, "export", source, *arguments, cwd=source.parent)
