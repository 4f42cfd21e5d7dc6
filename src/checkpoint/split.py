"""A source checkpoint cut into n tensor-parallel shards on disk."""

from pathlib import Path

import torch

from src.checkpoint import shards, storage
from src.checkpoint.sources import Source
from src.errors import UserError


def split(source: Source, folder: Path, n: int, dtype: str, tokenizer_file: str, description: str) -> None:
    """Write n shards of a source with params.json, tokenizer and manifest; one shard is in memory at a time.

    dtype "" keeps the source's. Raises UserError when the model does not divide or a file is missing.
    """
    source.config.check_divides(n, description)
    tokenizer = [Path(tokenizer_file)] if tokenizer_file else source.tokenizer_files
    for path in tokenizer:
        if not path.is_file():
            raise UserError(f"--tokenizer_file {path} does not exist")
    storage.check_writable(folder)
    if any(path.resolve() == folder.resolve() for path in source.folders):
        raise UserError(f"--save_path {folder} is the source itself; choose another directory")
    stored = getattr(torch, dtype or source.config.dtype)
    cuts = {name: shards.cut_of(name, source.config, n) for name in source.tensors}
    storage.begin(folder)
    for index in range(n):
        pieces = {
            name: shards.cut(tensor.load(), cuts[name], index).to(stored)
            for name, tensor in source.tensors.items()
        }
        storage.write_shard(folder, storage.WEIGHTS, index, pieces)
    params = source.config.to_dict() | {"dtype": str(stored).removeprefix("torch.")}
    facts = {
        "source": description,
        "rotary_layout": "interleaved",
        "split": {name: how.dim for name, how in cuts.items()},
    }
    storage.finish(folder, storage.WEIGHTS, n, params, tokenizer, facts)
