"""Weights that a user brings, with their description: which files hold them, and what they are under our names."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src import runlog
from src.checkpoint import convert, storage
from src.checkpoint.families import PLAIN
from src.checkpoint.foreign_config import config_from_hf, family_of
from src.checkpoint.meta_config import config_from_meta
from src.checkpoint.params import config_from_dict, refuse_infinities
from src.checkpoint.shards import check_pieces, cut_of, expected_shapes, join
from src.checkpoint.tensor_files import StoredTensor, as_stored, read_safetensors, read_torch
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig

# In the order in which transformers looks for them; it reads the first that is there.
_HF_FILES = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
_NESTED_KEYS = ("model", "state_dict")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SHARD_NUMBER = re.compile(r"(\d+)(-of-\d+)?\D*$")
_EXPERTS_STACKED = re.compile(r"\.experts\.\w+_stacked")


class Source(NamedTuple):
    """An opened checkpoint: what it is, its whole tensors in our names and layout, its tokenizer's files, and those
    that the tensors are read from."""

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    tokenizer_files: list[Path]
    files: list[Path]

    @property
    def folders(self) -> list[Path]:
        """The directories that it is read from."""
        return list(dict.fromkeys(path.parent for path in self.files))


class OpenedFile(NamedTuple):
    """One tensor file as stored, and the params that some writers store with the tensors."""

    path: Path
    tensors: dict[str, StoredTensor]
    params: dict[str, object] | None


def open_weights(paths: list[Path], folder: Path, config_file: str = "") -> Source:
    """The checkpoint in files or in a directory, with the tokenizer that lies in `folder`.

    The description is `config_file`, else params.json or config.json in `folder`, else what lies in the file.
    Raises UserError that names what is wrong.
    """
    candidates = [Path(config_file)] if config_file else [folder / "params.json", folder / "config.json"]
    descriptions = {str(path): read_json(path) for path in candidates if config_file or path.is_file()}
    for described, values in descriptions.items():
        refuse_infinities(values, described)
        if "model_type" in values and "dim" not in values:
            family_of(values, described)  # refuses one that is not supported
    files = [open_file(path) for path in (weight_files(folder) if paths == [folder] else paths)]
    hf = any(convert.strip_wrappers(name).startswith(("model.", "transformer."))
             for file in files for name in file.tensors)
    if not descriptions:
        # some writers store params with the tensors
        if (inside := files[0].params) is None:
            raise UserError(f"{folder} has neither params.json nor config.json; name one with --config_file")
        descriptions = {f"{files[0].path} (model_args)": inside}
        refuse_infinities(inside, *descriptions)
    # tensors under Hugging Face's names go by config.json, as in transformers
    described, values = list(descriptions.items())[-1 if hf else 0]
    family = str(values.get("model_type", PLAIN)) if hf else None
    named = [_our_names(file, family) for file in files]
    # before anything is made as large as the description says
    check_counts(values, {name: stored.shape for part in named for name, stored in part.items()}, described)
    # tensor-parallel shards hold the same names, parts of one checkpoint different ones
    if len(named) > 1 and all(set(tensors) == set(named[0]) for tensors in named):
        by_number = _in_order([file.path for file in files])
        tensors, config = _join_shards([named[index] for index in by_number], values, described)
    else:
        tensors = {}
        for file, part in zip(files, named, strict=True):
            if twice := sorted(part.keys() & tensors.keys()):
                raise UserError(f"{file.path}: parameter {twice[0]!r} is in an earlier file too; expected parts of one "
                                "checkpoint, or all its tensor-parallel shards")
            tensors |= part
        config = _config(values, described, tensors)
    if hf and "v_head.weight" in tensors:
        tensors, config = _verifier_from_hf(tensors, values, config, described)
    tensors = _one_of_tied(tensors, config, described)
    if hf:
        tensors = convert.as_ours(tensors, config)
    check_shapes(tensors, config, described)
    return Source(config, tensors, storage.tokenizer_files(folder), [file.path for file in files])


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a directory: those that transformers reads, else by the usual names, else shards. What else
    lies there and is not read is said. Raises UserError where shards and others lie side by side."""
    shards = storage.shard_paths(folder)
    named = [name for name in _HF_FILES if (folder / name).exists()]
    parts = [sorted(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")]
    first = next(iter(named or [path.name for paths in parts for path in paths]), "")
    if shards and first:
        raise UserError(f"{folder} holds both {shards[0].name} and {first}, which may be different weights; remove "
                        "one kind, or name the files to read with --ckpt_file")
    if first:
        paths = [folder / first] if named else parts[0] or parts[1]
        is_index = first.endswith(".index.json")
        paths = _indexed_files(folder / first) if is_index else [storage.inside(folder, path) for path in paths]
        left = named[1:] or sorted({path.name for each in parts for path in each} - {path.name for path in paths})
        if left:
            runlog.logger().warning("%s: reads %s%s, and not %s beside it", folder, first,
                                    ", as transformers does" if named else "", " or ".join(left))
        return paths
    if shards:
        storage.check_complete(folder)
        return shards
    raise UserError(f"{folder} holds no weights; expected model*.safetensors, pytorch_model*.bin or consolidated.*.pth")


def _indexed_files(index: Path) -> list[Path]:
    """The files that a Hugging Face index names; they must lie in its directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map names no files; expected parameter names with their files")
    for parameter, name in weight_map.items():
        if not isinstance(name, str):
            raise UserError(f"{index}: weight_map gives {name!r} for {parameter}; expected a file's name")
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: weight_map names {name!r}, which is outside its directory")
    return [storage.inside(index.parent, index.parent / name) for name in sorted(set(weight_map.values()))]


def open_file(path: Path) -> OpenedFile:
    """Open one tensor file; a dictionary nested under `model` or `state_dict` is unwrapped. Raises UserError."""
    if path.suffix == ".safetensors":
        tensors, params = read_safetensors(path), None
    else:
        values = read_torch(path)
        params = values.get("model_args") if isinstance(values.get("model_args"), dict) else None
        for key in _NESTED_KEYS:
            if isinstance(values.get(key), dict):
                # scalars may be losses, whole numbers a generator's state
                beside = [name for name, value in values.items()
                          if isinstance(value, Tensor) and value.is_floating_point() and value.dim()]
                if beside:
                    raise UserError(f"{path}: {beside[0]!r} lies beside the dictionary {key!r}, which is to hold all "
                                    "weights; put them into one")
                values = values[key]
        tensors = {str(name): as_stored(path, str(name), value)
                   for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors; expected a checkpoint, plain or under {' or '.join(_NESTED_KEYS)}")
    return OpenedFile(path, tensors, params)


def as_float(path: Path, name: str, stored: StoredTensor) -> StoredTensor:
    """A tensor that is a weight, 64 bits read in 32: nothing is computed or written in more. Raises UserError for
    numbers that stand for others."""
    if stored.dtype not in _FLOATS:
        raise UserError(f"{path}: {name!r} is stored as {_name_of(stored.dtype)}; expected "
                        f"{', '.join(map(_name_of, _FLOATS))}: bring the weights as they were before quantisation")
    return stored.then(Tensor.float)._replace(dtype=torch.float32) if stored.dtype == torch.float64 else stored


def check_counts(values: dict[str, object], shapes: Mapping[str, tuple[int, ...]], described: str) -> None:
    """Raise UserError where a description counts more layers or experts than the weights hold. Whatever is as large as
    these numbers say comes after this."""
    layers = {found[1] for name in shapes if (found := _LAYER.match(name))}
    experts = {found[1] for name in shapes if (found := _EXPERT.search(name))}
    stacked = [shape[0] for name, shape in shapes.items() if _EXPERTS_STACKED.search(name) and shape]
    n_experts = max([len(experts), *stacked])
    held = {**dict.fromkeys(("n_layers", "num_hidden_layers"), ("layers", len(layers))),
            **dict.fromkeys(("n_experts", "num_experts", "num_local_experts"), ("experts", n_experts))}
    meta_experts = values.get("moe")
    for key, value in (values | (meta_experts if isinstance(meta_experts, dict) else {})).items():
        if key in held and type(value) is int and value > held[key][1]:
            raise UserError(f"{described}: {key}={value}, but the weights hold {held[key][1]} {held[key][0]}")


def _our_names(file: OpenedFile, family: str | None) -> dict[str, StoredTensor]:
    """A file's tensors under our names, wrappers' prefixes and derived tensors removed; unknown names are listed.
    family: whose Hugging Face names they are; None = they are ours."""
    tensors, unknown = {}, []
    for stored_name, tensor in file.tensors.items():
        name = convert.strip_wrappers(stored_name)
        if convert.is_derived(name):
            continue
        try:
            name = name if family is None else convert.from_hf_name(name, family)
        except UserError:
            unknown.append(stored_name)
            continue
        if name in tensors:
            raise UserError(f"{file.path}: {name!r} is stored twice, once as {stored_name}; remove one of them")
        tensors[name] = as_float(file.path, stored_name, tensor)
    if unknown:
        raise UserError(f"{file.path}: {len(unknown)} unknown parameters: {', '.join(unknown[:8])}; expected a "
                        f"checkpoint in the names of {family or 'Meta'}")
    return tensors


def _in_order(paths: list[Path]) -> list[int]:
    """The places of tensor-parallel shards in the order of the numbers in their names. Raises UserError unless these
    are 0, 1, ... or 1, 2, ...: which rows a shard holds, it does not say itself."""
    found = [_SHARD_NUMBER.search(path.stem) for path in paths]
    numbers = [int(each[1]) if each else -1 for each in found]
    if sorted(numbers) not in ([*range(len(paths))], [*range(1, len(paths) + 1)]):
        raise UserError(f"{', '.join(path.name for path in paths)} hold the same parameters: they are tensor-parallel "
                        "shards, whose names must number them, as consolidated.00.pth and consolidated.01.pth")
    return sorted(range(len(paths)), key=numbers.__getitem__)


def _join_shards(
    shards: list[dict[str, StoredTensor]], values: dict[str, object], described: str
) -> tuple[dict[str, StoredTensor], ModelConfig]:
    """Whole tensors from tensor-parallel shards, which all hold the same names."""
    _check_present(shards[0], ("tok_embeddings.weight",), described)
    columns = shards[0]["tok_embeddings.weight"].shape[1]
    # Llama 3 cuts the vocabulary, Llama 1 and 2 the width
    embedding_dim = 0 if columns == values.get("dim", values.get("hidden_size")) else 1
    config = _config(values, described, shards[0], scale=len(shards), embedding_dim=embedding_dim)
    tensors = {}
    for name, (shape, _, _) in shards[0].items():
        how = cut_of(name, config, len(shards))
        pieces = [shard[name] for shard in shards]
        check_pieces(name, [piece.shape for piece in pieces], how, described)
        whole = tuple(how.size if axis == how.dim else size for axis, size in enumerate(shape))
        tensors[name] = StoredTensor(
            whole, lambda pieces=pieces, how=how: join([p.load() for p in pieces], how), pieces[0].dtype)
    return tensors, config


def _config(
    values: dict[str, object], described: str, tensors: dict[str, StoredTensor], scale: int = 1,
    embedding_dim: int = 1,
) -> ModelConfig:
    """The ModelConfig of a description in our, Hugging Face's or Meta's terms. `tensors` may be shard 0 of `scale`
    shards whose embeddings are cut along `embedding_dim`."""
    if "ffn_dim" in values:
        return config_from_dict(values, described)
    numbers: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        numbers[stored.dtype] += math.prod(stored.shape)
    dtype = _name_of(numbers.most_common(1)[0][0])  # that of most: what is trained from these is saved in it
    if "hidden_size" in values:
        return config_from_hf(values, described, dtype)
    for key in ("dim", "n_layers", "n_heads"):
        if key not in values:
            raise UserError(f"{described}: key {key!r} is missing; expected a Meta params.json or an HF config.json")
    inner = f"layers.0.feed_forward.{'experts.0.' if values.get('moe') else ''}w1.weight"
    _check_present(tensors, ("tok_embeddings.weight", inner), described)
    ffn_rows = tensors[inner].shape[0] * scale
    vocab_rows = tensors["tok_embeddings.weight"].shape[0] * (scale if embedding_dim == 0 else 1)
    # no output layer, or the very same values
    output, embedding = tensors.get("output.weight"), tensors["tok_embeddings.weight"]
    tied = "v_head.weight" not in tensors and (
        output is None or output.shape == embedding.shape and torch.equal(output.load(), embedding.load()))
    return config_from_meta(
        values, described, ffn_dim=ffn_rows, vocab_size=vocab_rows, tied=tied,
        value_head="v_head.weight" in tensors, embedding_split_dim=embedding_dim, dtype=dtype)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_present(tensors: dict[str, StoredTensor], names: tuple[str, ...], described: str) -> None:
    """Raise UserError unless the weights hold the matrices that sizes are read from."""
    for name in names:
        if name not in tensors:
            raise UserError(f"{described}: the weights lack parameter {name!r}")
        if len(tensors[name].shape) != 2:
            raise UserError(f"{described}: {name} has shape {list(tensors[name].shape)}; expected a matrix")


def _one_of_tied(
    tensors: dict[str, StoredTensor], config: ModelConfig, described: str
) -> dict[str, StoredTensor]:
    """The matrix of a tied checkpoint once, under the embedding's name, whichever of the two it was stored under. A
    pair that has diverged is refused."""
    output = tensors.get("output.weight")
    if not config.tied or output is None:
        return tensors
    embedding = tensors.get("tok_embeddings.weight", output)
    if embedding is not output and not torch.equal(output.load(), embedding.load()):
        raise UserError(f"{described} says that embeddings are tied, but output and tok_embeddings differ; set "
                        "tie_word_embeddings to false to keep both")
    tensors = tensors | {"tok_embeddings.weight": embedding}
    return {name: stored for name, stored in tensors.items() if name != "output.weight"}


def _verifier_from_hf(
    tensors: dict[str, StoredTensor], values: dict[str, object], config: ModelConfig, described: str
) -> tuple[dict[str, StoredTensor], ModelConfig]:
    """The verifier in a classifier of transformers with one label; where its scores are read, its export knows."""
    if "v_head_in.weight" in tensors:  # Qwen2.5-Math-PRM: logits of wrong and right, here their difference
        heads = {name: tensors[name] for name in ("v_head.weight", "v_head.bias") if name in tensors}
        if any(stored.shape[0] != 2 for stored in heads.values()):
            raise UserError(f"{described}: score.2 has {tensors['v_head.weight'].shape[0]} outputs; expected 2: a step "
                            "is wrong, it is right")
        heads = {name: stored.then(lambda whole: whole[1:] - whole[:1], (1, *stored.shape[1:]))
                 for name, stored in heads.items()}
        tensors = {name: stored for name, stored in tensors.items() if name != "output.weight"} | heads
        return tensors, dataclasses.replace(
            config, value_head=True, two_layer_head=True, tied=False, objective="process", score="steps",
            verifier_form="qwen-prm", chat_template="file")
    bias = tensors.get("v_head.bias")
    if bias is not None and bias.load().any():
        raise UserError(f"{described}: score.bias is not zero, and a verifier's value head has no bias")
    token_classifier = "TokenClassification" in str(values.get("architectures"))
    facts = {} if "splitrl" in values else {"score": "mean" if token_classifier else "last"}
    config = dataclasses.replace(config, value_head=True, tied=False, **facts)
    return {name: stored for name, stored in tensors.items() if name != "v_head.bias"}, config


def check_shapes(tensors: dict[str, StoredTensor], config: ModelConfig, described: str) -> None:
    """Raise UserError unless the tensors are exactly those of the config."""
    expected = expected_shapes(config)
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{len(unknown)} unknown parameters: {', '.join(unknown[:8])}; {described} describes none of "
                        "them")
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{described}: parameter {name!r} is missing from the weights")
        if tensors[name].shape != shape:
            raise UserError(f"{name} has shape {list(tensors[name].shape)}, but {described} means {list(shape)}")
