"""A source checkpoint cut into n tensor-parallel shards on disk."""

from contextlib import ExitStack
from pathlib import Path

import torch

from src.checkpoint import shards, storage
from src.checkpoint.sources import Source
from src.checkpoint.tensor_files import TensorSpec, open_torch_file
from src.errors import UserError


def split(source: Source, folder: Path, n: int, dtype: str, tokenizer_file: str, description: str) -> None:
    """Write n shards of a source with params.json, tokenizer and manifest; one tensor is in memory at a time.

    dtype "" keeps every tensor's. Raises UserError when the model cannot be cut so, a file is missing or the disk
    is too small.
    """
    source.config.check_divides(n, description)
    tokenizer = tokenizer_of(source, tokenizer_file)
    cuts = {name: shards.cut_of(name, source.config, n) for name in source.tensors}
    layouts = [_layout(source, cuts, index, dtype) for index in range(n)]
    prepare_target(folder, source, sum(spec.nbytes for layout in layouts for spec in layout.values()))
    with storage.writing(folder):
        with ExitStack() as stack:
            paths = [
                storage.staging(folder) / storage.shard_name(storage.WEIGHTS, index) for index in range(n)
            ]
            files = [
                stack.enter_context(open_torch_file(path, layout))
                for path, layout in zip(paths, layouts, strict=True)
            ]
            for name, stored in source.tensors.items():
                whole = stored.load()
                for index, file in enumerate(files):
                    file.write(name, shards.cut(whole, cuts[name], index))
        params = source.config.to_dict() | {"dtype": dtype or source.config.dtype}
        facts = {
            "source": description,
            "rotary_layout": "interleaved",
            "tied": source.config.tied,
            "split": {name: how.dim for name, how in cuts.items()},
        }
        storage.finish(folder, n, {"params.json": params}, tokenizer, facts)


def tokenizer_of(source: Source, tokenizer_file: str) -> list[Path]:
    """The tokenizer's files that go with a checkpoint: the one named, else those beside the source."""
    if tokenizer_file and not Path(tokenizer_file).is_file():
        raise UserError(f"--tokenizer_file {tokenizer_file} does not exist")
    return [Path(tokenizer_file)] if tokenizer_file else source.tokenizer_files


def prepare_target(folder: Path, source: Source, n_bytes: int) -> None:
    """Raise UserError unless n_bytes of tensors can be written to a directory that is not the source itself."""
    storage.check_writable(folder)
    if any(path.resolve() == folder.resolve() for path in source.folders):
        raise UserError(f"--save_path {folder} is the source itself; choose another directory")
    storage.check_space(folder, n_bytes)


def _layout(source: Source, cuts: dict[str, shards.Cut], index: int, dtype: str) -> dict[str, TensorSpec]:
    """What shard `index` holds, without reading anything."""
    layout = {}
    for name, stored in source.tensors.items():
        piece = shards.cut(torch.empty(stored.shape, device="meta"), cuts[name], index)
        layout[name] = TensorSpec(tuple(piece.shape), getattr(torch, dtype) if dtype else stored.dtype)
    return layout
