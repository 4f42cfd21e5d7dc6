"""Which files of a directory hold its weights, and what one such file holds."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from src import runlog
from src.checkpoint import storage
from src.checkpoint.tensor_files import StoredTensor, as_stored, read_safetensors, read_torch
from src.errors import UserError
from src.jsonfile import read_json

# In the order in which transformers looks for them; it reads the first that is there.
_HF_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NESTED_KEYS = ("model", "state_dict")


class OpenedFile(NamedTuple):
    """One tensor file as stored, and the params that some writers put beside the tensors."""

    path: Path
    tensors: dict[str, StoredTensor]
    params: dict[str, object] | None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a directory: those that transformers reads, else by the usual names, else shards.

    What else lies there and is not read is said. Raises UserError where shards and others lie side by side.
    """
    shards = storage.shard_paths(folder)
    found = [name for name in _HF_FILES if (folder / name).exists()]
    parts = [sorted(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")]
    found = found or [path.name for paths in parts for path in paths]
    if shards and found:
        raise UserError(
            f"{folder} holds both {shards[0].name} and {found[0]}, which may be different weights; remove one kind, "
            f"or name the files to read with --ckpt_file"
        )
    if len(found) > 1 and found[0] in _HF_FILES:
        runlog.logger().warning(
            "%s: reads %s, as transformers does, and not %s beside it",
            folder,
            found[0],
            " or ".join(found[1:]),
        )
    if found and found[0].endswith(".index.json"):
        return _indexed_files(folder / found[0])
    if found:
        paths = [folder / found[0]] if found[0] in _HF_FILES else parts[0] or parts[1]
        return [storage.beside(folder, path) for path in paths]
    if shards:
        storage.check_complete(folder)
        return shards
    raise UserError(
        f"{folder} holds no weights; expected model*.safetensors, pytorch_model*.bin or consolidated.*.pth"
    )


def _indexed_files(index: Path) -> list[Path]:
    """The files that a Hugging Face index names; they must lie beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map names no files; expected parameter names with their files")
    for parameter, name in weight_map.items():
        if not isinstance(name, str):
            raise UserError(f"{index}: weight_map gives {name!r} for {parameter}; expected a file's name")
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: weight_map names {name!r}, which is outside its directory")
    return [storage.beside(index.parent, index.parent / name) for name in sorted(set(weight_map.values()))]


def open_file(path: Path) -> OpenedFile:
    """Open one tensor file; a dictionary nested under `model` or `state_dict` is unwrapped. Raises UserError."""
    if path.suffix == ".safetensors":
        tensors, params = read_safetensors(path), None
    else:
        values = read_torch(path)
        params = values.get("model_args") if isinstance(values.get("model_args"), dict) else None
        for key in _NESTED_KEYS:
            if isinstance(values.get(key), dict):
                values = values[key]
        tensors = {
            str(name): as_stored(path, str(name), value)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
    if not tensors:
        raise UserError(
            f"{path} holds no tensors; expected a checkpoint, plain or under {' or '.join(_NESTED_KEYS)}"
        )
    return OpenedFile(path, tensors, params)
