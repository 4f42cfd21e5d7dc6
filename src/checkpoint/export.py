"""A checkpoint or an adapter written back as the directory that transformers, PEFT or llama.cpp opens."""

from collections.abc import Mapping
from pathlib import Path

import torch

from src.checkpoint import convert, gguf_layout, peft_layout, storage
from src.checkpoint.families import FAMILIES
from src.checkpoint.foreign_config import config_to_hf
from src.checkpoint.gguf import create_gguf, gguf_bytes
from src.checkpoint.sources import AdapterSource, Source
from src.checkpoint.split import is_finite, refuse_source, write_files
from src.checkpoint.tensor_files import StoredTensor, TensorSpec
from src.errors import UserError
from src.models.config import ModelConfig

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
GGUF = "model.gguf"


def export_hf(
    source: Source, folder: Path, description: str, *, dtype: str = "", max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write config.json, model*.safetensors of at most max_shard_bytes each, their index, and the tokenizer.

    One tensor is in memory at a time; dtype "" keeps every tensor's. A verifier becomes the sequence classifier
    (score at the last token) or the token classifier (a score at each) of its family, with one label. Returns the
    parameters that hold NaN or infinity.
    """
    documents = {"config.json": _config_json(source.config, dtype or source.config.dtype, description)}
    refuse_source(folder, source.folders)
    tensors = convert.as_hf(source.tensors, source.config)
    if source.config.value_head and source.config.score != "last":
        # transformers' token classifiers have a bias, its sequence classifiers none
        bias_dtype = tensors["score.weight"].dtype
        tensors["score.bias"] = StoredTensor((1,), lambda: torch.zeros(1, dtype=bias_dtype), bias_dtype)
    files = file_parts(tensors, dtype, max_shard_bytes)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, layout in files.items() for name in layout}
        total = sum(spec.nbytes for layout in files.values() for spec in layout.values())
        documents = {INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}} | documents
    facts = {"source": description, "rotary_layout": "halves", "tied": source.config.tied}
    passes = [{name: layout} for name, layout in files.items()]
    return write_files(folder, passes, tensors, documents, source.tokenizer_files, facts)


def export_peft(adapter: AdapterSource, folder: Path, description: str) -> list[str]:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT opens on the same base."""
    refuse_source(folder, adapter.folders)
    documents = {
        peft_layout.CONFIG: peft_layout.config_json(adapter.config, adapter.lora, str(adapter.base.resolve()))}
    tensors = peft_layout.as_peft(adapter.tensors, adapter.config)
    files = {peft_layout.WEIGHTS: {name: TensorSpec(t.shape, t.dtype) for name, t in tensors.items()}}
    facts = {"source": description, "rotary_layout": "halves"}
    return write_files(folder, [files], tensors, documents, adapter.tokenizer_files, facts)


def export_gguf(
    source: Source, folder: Path, description: str, tokenizer: Mapping[str, object], *, dtype: str = ""
) -> list[str]:
    """Write model.gguf, which llama.cpp opens, with the metadata of a tokenizer. dtype as in create_gguf(). Returns the
    tensors that hold NaN or infinity."""
    refuse_source(folder, source.folders)
    name = Path(description.split(", ")[0]).resolve().name
    metadata, tensors = gguf_layout.as_gguf(source.config, source.tensors, name, description)
    storage.check_writable(folder)
    storage.check_space(folder, gguf_bytes(tensors, dtype))
    not_finite = []
    with storage.writing(folder):
        with create_gguf(storage.staging(folder) / GGUF, metadata | tokenizer, tensors, dtype) as write:
            for key, stored in tensors.items():
                tensor = stored.load()
                if not is_finite(tensor):
                    not_finite.append(key)
                write(key, tensor)
        storage.finish(folder, 1, {}, [], {"source": description})
    return not_finite


def file_parts(
    tensors: Mapping[str, StoredTensor], dtype: str, max_bytes: int
) -> dict[str, dict[str, TensorSpec]]:
    """What each file holds: files are filled in order up to max_bytes, with a tensor at least."""
    parts: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        spec = TensorSpec(stored.shape, getattr(torch, dtype) if dtype else stored.dtype)
        if parts[-1] and filled + spec.nbytes > max_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = spec
        filled += spec.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _config_json(config: ModelConfig, dtype: str, description: str) -> dict[str, object]:
    """config.json as transformers reads it, of a solver or of a verifier as a classifier with one label. Raises
    UserError for a verifier of a family without one."""
    values = config_to_hf(config) | {"torch_dtype": dtype}
    if config.value_head:
        family = FAMILIES[config.family]
        kind = "ForSequenceClassification" if config.score == "last" else "ForTokenClassification"
        ending = next((each for each in family.classifiers if each.endswith(kind)), None)
        if ending is None:
            raise UserError(f"{description} is a verifier with score={config.score}; transformers has no "
                            f"{kind.removeprefix('For')} of {config.family} models; keep it in SplitRL's own format")
        values["architectures"] = [family.architecture.replace("ForCausalLM", ending)]
        ends, pad = values.get("eos_token_id"), values.get("pad_token_id")
        if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
            # else transformers takes the end, or what its class has by default, for padding: it reads the token before
            values["pad_token_id"] = None
        values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return values
