"""Every byte of a checkpoint on disk: tensor files, the manifest, and when a directory counts as complete.

The only door to safetensors and to torch.save and torch.load. A checkpoint directory holds
`consolidated.NN.pth` (an adapter directory `adapter.NN.pth` and adapter.json), the tokenizer's files,
params.json and manifest.json, written in this order: an interrupted save leaves no params.json and is refused.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from src.errors import UserError

WEIGHTS, ADAPTER = "consolidated", "adapter"

# What torch.load raises on bytes that are no checkpoint: its unpickler checks little before it acts on them.
_UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


class StoredTensor(NamedTuple):
    """A tensor that is still on disk: its shape, and a call that reads it."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def shard_name(kind: str, index: int) -> str:
    """File name of one shard; two digits, so that names sort by rank."""
    return f"{kind}.{index:02d}.pth"


def shard_paths(folder: Path, kind: str = WEIGHTS) -> list[Path]:
    """The shards of a directory by rank. Raises UserError when the numbering has a hole."""
    found = {}
    for path in folder.glob(f"{kind}.*.pth"):
        number = path.name.removeprefix(f"{kind}.").removesuffix(".pth")
        if number.isdigit():
            found[int(number)] = path
    if sorted(found) != list(range(len(found))):
        hole = next(i for i in range(len(found)) if i not in found)
        raise UserError(
            f"{folder} has {len(found)} {kind} shards but {shard_name(kind, hole)} is missing; "
            f"restore it or split the checkpoint again"
        )
    return [found[i] for i in range(len(found))]


def read_json(path: Path) -> dict[str, object]:
    """A json object from a file. Raises UserError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not valid json ({problem})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a json object")
    return values


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a json object so that the file is either the old one or the new one."""
    _replace(
        path, lambda temporary: temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush it to disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes for its owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_torch(path: Path) -> dict[str, object]:
    """The dictionary in a torch file, tensors memory-mapped where the format allows it; nothing is executed.

    Raises UserError when the file is truncated, corrupt or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            values = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as problem:
        reason = str(problem).strip().split("\n")[0] or type(problem).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint of tensors ({reason[:200]}); "
            f"it is truncated, corrupt, or holds pickled code"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a dictionary of tensors")
    return values


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, each read when asked for. Raises UserError on a bad file."""
    try:
        file = safetensors.safe_open(path, framework="pt")
        return {
            name: StoredTensor(
                tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name)
            )
            for name in file.keys()
        }
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except safetensors.SafetensorError as problem:
        raise UserError(f"{path} is not a readable safetensors file ({problem})") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in the format that transformers reads."""
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one of our shards, memory-mapped. Raises UserError unless it holds tensors alone."""
    values = read_torch(path)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}; expected tensors only")
    return values


def write_shard(folder: Path, kind: str, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one shard, complete or not at all."""
    _replace(folder / shard_name(kind, index), lambda temporary: torch.save(dict(tensors), temporary))


def begin(folder: Path) -> None:
    """Make a directory ready to be written: from here until finish() it does not count as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "params.json", "adapter.json"):
        (folder / name).unlink(missing_ok=True)
    for pattern in (f"{WEIGHTS}.*.pth", f"{ADAPTER}.*.pth", ".*.tmp"):  # .tmp: left by a save that was killed
        for path in folder.glob(pattern):
            path.unlink()


def finish(
    folder: Path,
    kind: str,
    n: int,
    params: Mapping[str, object],
    tokenizer_files: Sequence[Path],
    facts: Mapping[str, object],
) -> None:
    """Complete a directory whose n shards are written: tokenizer, params.json, and last of all the manifest."""
    copy_tokenizer(tokenizer_files, folder)
    shards = [folder / shard_name(kind, index) for index in range(n)]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in shards}
    write_json(folder / "params.json", params)
    write_json(folder / "manifest.json", {"format": 1, "shards": n, "files": files, **facts})


def copy_tokenizer(files: Sequence[Path], folder: Path) -> None:
    """Put a tokenizer's files into a directory; a sentencepiece model is always called tokenizer.model there."""
    for source in files:
        target = folder / ("tokenizer.model" if source.suffix == ".model" else source.name)
        if source.resolve() != target.resolve():
            _replace(target, lambda temporary, source=source: shutil.copyfile(source, temporary))


def publish(source: Path, target: Path) -> None:
    """Make `target` a checkpoint with the same contents as the complete directory `source`.

    Shards are hard links where the file system has them, so nothing is stored twice.
    """
    begin(target)
    last = ("params.json", "manifest.json")
    for path in sorted(source.iterdir(), key=lambda path: (path.name in last, path.name == "manifest.json")):
        _replace(target / path.name, lambda temporary, path=path: _link_or_copy(path, temporary))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_complete(folder: Path) -> None:
    """Raise UserError unless every file that the manifest names is there with its size.

    Directories without a manifest (Meta's, Llama-RLHF's) only need params.json.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory; expected a checkpoint made by checkpoint_split.py")
    if not (folder / "params.json").is_file():
        raise UserError(
            f"{folder} has no params.json: it is no checkpoint, or its save was interrupted; "
            f"make it again with checkpoint_split.py or the trainer"
        )
    if not (folder / "manifest.json").is_file():
        return
    manifest = read_json(folder / "manifest.json")
    for key in ("shards", "files"):
        if key not in manifest:
            raise UserError(f"{folder / 'manifest.json'}: key {key!r} is missing; split the checkpoint again")
    for name, facts in manifest["files"].items():
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has {manifest['shards']} shards by its manifest but {name} is missing; "
                f"restore it or split the checkpoint again"
            )
        size = (folder / name).stat().st_size
        if size != facts["bytes"]:
            raise UserError(
                f"{folder / name} has {size} bytes but the manifest says {facts['bytes']}: it was "
                f"truncated or changed; restore it or split the checkpoint again"
            )


def fingerprint(folder: Path) -> str:
    """One hash for a checkpoint's weights: of the manifest's file hashes, or of the shards without one."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        hashes = [facts["sha256"] for _, facts in sorted(read_json(manifest)["files"].items())]
    else:
        hashes = [sha256(path) for path in shard_paths(folder)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files that lie in a directory."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def check_writable(folder: Path) -> None:
    """Make the directory and prove that a file can be written there, before any work. Raises UserError."""
    probe = folder / f".write-probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as problem:
        raise UserError(f"cannot write to {folder} ({problem.strerror}); choose another directory") from None
