"""The checkpoint folder: what is in it, how it is written so that no kill can tear it, when it is refused.

``verify`` needs no torch, so a service can refuse a bad folder before it pays for one. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig, UnsupportedConfig

if TYPE_CHECKING:
    import torch

    from model.tokenizer import Tokenizer
    from model.transformer import Transformer

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
RECORD = "training.json"
BASELINE_TOLERANCE = 0.01
"""Shares are written with six digits, and there may be thousands of them."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")


class CheckpointError(Exception):
    """A folder cannot be used as a checkpoint. One sentence that names the file."""


@dataclass(frozen=True)
class Manifest:
    """The list of files with their SHA-256. fingerprint is the SHA-256 of the manifest itself, 64 hex digits."""

    folder: Path
    fingerprint: str
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder: the model in float32 on its device, and what came with it."""

    model: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    training: dict[str, Any]
    manifest: Manifest


def save(folder: Path, files: Mapping[str, bytes], unlisted: Mapping[str, bytes] | None = None) -> None:
    """Write a new folder so that it is there whole or not at all, even if the power goes.

    ``files`` are listed in the manifest, which is written last; ``unlisted`` ones (a model card) may be edited later.
    Raises FileExistsError when the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a checkpoint is always a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in {**files, **(unlisted or {}), MANIFEST: _manifest_bytes(files)}.items():
            _write_durably(temporary / name, content)
        temporary.chmod(0o755)
        _fsync_folder(temporary)
        temporary.rename(folder)
        _fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fingerprint(files: Mapping[str, bytes]) -> str:
    """That of the manifest which ``save`` would write."""
    return hashlib.sha256(_manifest_bytes(files)).hexdigest()


def verify(folder: Path) -> Manifest:
    """Check every listed file against its SHA-256. Raises CheckpointError."""
    folder = Path(folder)
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):  # a name that no file system takes
        is_folder = False
    if not is_folder:
        raise CheckpointError(f"{folder} is no folder; --checkpoint names a folder with a {MANIFEST}")
    content = _read(folder / MANIFEST)
    try:
        listing = json.loads(content)
        version, files = listing["format"], {str(name): str(digest) for name, digest in listing["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it is not a list of files") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} has format {version!r}; this version reads format {FORMAT}")
    for name in (WEIGHTS, CONFIG, RECORD, "tokenizer.json"):
        if name not in files:
            raise CheckpointError(f"{folder / MANIFEST} does not list {name}")
    for name, digest in files.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{folder / MANIFEST} lists a file with an odd name: {name!r}")
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return Manifest(folder.resolve(), hashlib.sha256(content).hexdigest(), files)


def load(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Verify and load a folder onto a device, in float32. Raises CheckpointError."""
    from model import weights

    manifest = verify(folder)
    config = read_config(manifest.folder)
    tokenizer = read_tokenizer(manifest.folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{manifest.folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, "
            f"but {CONFIG} says {config.vocab_size}"
        )
    try:
        model = weights.read(manifest.folder / WEIGHTS, config).to(device)
    except weights.WrongWeights as error:
        raise CheckpointError(f"{manifest.folder / WEIGHTS} does not fit {CONFIG}: {error}") from None
    return Checkpoint(model.eval(), config, tokenizer, read_record(manifest.folder), manifest)


def read_config(folder: Path) -> ModelConfig:
    """Raises CheckpointError when the file is damaged or asks for what we do not compute."""
    try:
        return ModelConfig.from_hf(_read_object(folder / CONFIG))
    except UnsupportedConfig as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be served: {error}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """Raises CheckpointError."""
    from model.tokenizer import Tokenizer

    try:
        return Tokenizer.load(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
        raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None


def read_record(folder: Path) -> dict[str, Any]:
    """The training record. Raises CheckpointError when it lacks what serving needs: the corpus and a known answer."""
    record = _read_object(folder / RECORD)
    try:
        name, known = record["corpus"]["name"], record["known_answer"]
        prompt, ids = known["prompt"], known["ids"]
        sound = all(isinstance(each, str) and each for each in (name, prompt)) and bool(ids)
        sound = sound and all(type(each) is int for each in ids)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{folder / RECORD} lacks the corpus or the known answer")
    return record


def read_baseline(folder: Path, config: ModelConfig) -> list[list[float]] | None:
    """The experts' shares on the validation text, [layer][expert], or None where nobody measured them.

    Raises CheckpointError when they are no shares of this model's layers.
    """
    shares = _read_object(folder / RECORD).get("routing_baseline")
    if shares is None:
        return None
    try:
        fits = [len(layer) for layer in shares] == [config.num_experts] * config.num_layers
        fits = fits and all(share >= 0 for layer in shares for share in layer)
        sound = fits and all(abs(sum(layer) - 1) < BASELINE_TOLERANCE for layer in shares)
    except TypeError:
        sound = False
    if not sound:
        raise CheckpointError(
            f"{folder / RECORD} has a routing_baseline that does not fit {CONFIG}: it should have "
            f"{config.num_layers} layers of {config.num_experts} shares that add up to 1"
        )
    return [[float(share) for share in layer] for layer in shares]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return value


def _manifest_bytes(files: Mapping[str, bytes]) -> bytes:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    return json.dumps({"format": FORMAT, "files": digests}, indent=2).encode() + b"\n"


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        _require_file(path)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _require_file(path: Path) -> None:
    """Opening anything else, a pipe say, may wait for ever."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file")


def _sha256(path: Path) -> str:
    try:
        _require_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
