"""A solver written back as the Hugging Face directory that transformers opens."""

from pathlib import Path

import torch

from src.checkpoint import convert, storage
from src.checkpoint.sources import open_source
from src.errors import UserError
from src.models.families import config_to_hf


def export_hf(ckpt_dir: str, folder: Path, dtype: str = "") -> None:
    """Write config.json, model.safetensors and the tokenizer of a solver; dtype "" keeps the checkpoint's.

    Adapters are merged on the way. Raises UserError for a verifier, whose value head has no place there.
    """
    source = open_source(ckpt_dir)
    if source.config.value_head:
        raise UserError(f"{ckpt_dir} is a verifier; only solvers have a Hugging Face form so far")
    stored = getattr(torch, dtype or source.config.dtype)
    tensors = {}
    for name, tensor in source.tensors.items():
        weight = convert.rotary_to_hf(name, tensor.load(), source.config)
        tensors[convert.to_hf_name(name)] = weight.to(stored).contiguous()
    storage.check_writable(folder)
    storage.write_safetensors(folder / "model.safetensors", tensors)
    storage.copy_tokenizer(source.tokenizer_files, folder)
    values = config_to_hf(source.config) | {"torch_dtype": str(stored).removeprefix("torch.")}
    storage.write_json(folder / "config.json", values)
