"""A checkpoint written back as the Hugging Face directory that transformers opens."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import convert, storage
from src.checkpoint.sources import Source
from src.checkpoint.split import prepare_target, tokenizer_of
from src.checkpoint.tensor_files import StoredTensor, TensorSpec, open_safetensors_file
from src.models.config import ModelConfig
from src.models.families import config_to_hf

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def export_hf(
    source: Source,
    folder: Path,
    description: str,
    *,
    dtype: str = "",
    tokenizer_file: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, model*.safetensors of at most max_shard_bytes each, their index, and the tokenizer.

    One tensor is in memory at a time; dtype "" keeps every tensor's. A verifier becomes the sequence classifier
    (score at the last token) or the token classifier (a score at each) of its family, with one label.
    """
    tokenizer = tokenizer_of(source, tokenizer_file)
    tensors = _hf_tensors(source)
    layout = {
        name: TensorSpec(stored.shape, getattr(torch, dtype) if dtype else stored.dtype)
        for name, stored in tensors.items()
    }
    total = sum(spec.nbytes for spec in layout.values())
    prepare_target(folder, source, total)
    parts = file_parts(layout, max_shard_bytes)
    with storage.writing(folder):
        for file_name, names in parts.items():
            part = {name: layout[name] for name in names}
            with open_safetensors_file(storage.staging(folder) / file_name, part) as file:
                for name in names:
                    file.write(name, tensors[name].load())
        documents: dict[str, dict[str, object]] = {}
        if len(parts) > 1:
            weight_map = {name: file_name for file_name, names in parts.items() for name in names}
            documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        documents["config.json"] = _config_json(source.config, dtype or source.config.dtype)
        facts = {"source": description, "rotary_layout": "halves", "tied": source.config.tied}
        storage.finish(folder, len(parts), documents, tokenizer, facts)


def _hf_tensors(source: Source) -> dict[str, StoredTensor]:
    """The tensors under Hugging Face's names and in its rotary layout, still on disk."""
    tensors = {}
    for name, stored in source.tensors.items():
        load = functools.partial(_load_for_hf, name, stored, source.config)
        tensors[convert.to_hf_name(name)] = stored._replace(load=load)
    if source.config.value_head and source.config.score != "last":
        # transformers' token classifiers have a bias, its sequence classifiers none
        dtype = tensors["score.weight"].dtype
        tensors["score.bias"] = StoredTensor((1,), lambda: torch.zeros(1, dtype=dtype), dtype)
    return tensors


def _load_for_hf(name: str, stored: StoredTensor, config: ModelConfig) -> Tensor:
    return convert.rotary_to_hf(name, stored.load(), config)


def file_parts(layout: dict[str, TensorSpec], max_bytes: int) -> dict[str, list[str]]:
    """Parameter names by the file that holds them; files are filled in order up to max_bytes, a tensor at least."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, spec in layout.items():
        if parts[-1] and filled + spec.nbytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += spec.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": names for i, names in enumerate(parts, 1)}


def _config_json(config: ModelConfig, dtype: str) -> dict[str, object]:
    """config.json as transformers reads it, of a solver or of a verifier as a classifier with one label."""
    values = config_to_hf(config) | {"torch_dtype": dtype}
    if config.value_head:
        kind = "ForSequenceClassification" if config.score == "last" else "ForTokenClassification"
        (architecture,) = values["architectures"]
        values["architectures"] = [architecture.replace("ForCausalLM", kind)]
        values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        values["splitrl"] = {key: getattr(config, key) for key in ("score", "score_mean", "score_std")}
    return values
