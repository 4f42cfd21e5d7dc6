"""Any checkpoint that a user brings, opened as one table of whole tensors under our names.

Single files (a plain or nested dictionary, safetensors, GGUF), lists of files, Hugging Face directories and
directories of tensor-parallel shards all become a Source; tensors are read one at a time, when asked for.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.checkpoint import adapters, convert, gguf_layout, peft_layout, storage
from src.checkpoint.gguf import gguf_file
from src.checkpoint.params import config_from_dict, refuse_infinities
from src.checkpoint.shards import check_pieces, cut_of, expected_shapes, reshard
from src.checkpoint.tensor_files import StoredTensor
from src.checkpoint.weight_files import Source, check_counts, open_weights
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig
from src.models.lora import LoraConfig


def open_source(
    ckpt_file: str | list[str], config_file: str = "", base_dir: str = "", own_tokenizer: bool = True
) -> Source:
    """Open a file, a list of files or a directory. Raises UserError that names what is wrong with it.

    The config comes from `config_file`, else from params.json or config.json next to the weights, else from
    the `model_args` inside the file. An adapter is merged into its base, or into `base_dir`. own_tokenizer False: the
    one that a GGUF file holds is not needed, and may be of a kind that is not implemented.
    """
    paths = [Path(path) for path in ([ckpt_file] if isinstance(ckpt_file, str) else ckpt_file)]
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    if adapter := open_adapter(paths[0], base_dir):
        return merge(adapter)
    if path := gguf_file(paths):
        if config_file:
            raise UserError(f"--config_file {config_file}: {path} describes its model itself")
        return gguf_layout.open_model(path, own_tokenizer)
    return open_weights(paths, folder, config_file)


class AdapterSource(NamedTuple):
    """An opened adapter: its own whole tensors in our names and layout, and the base that it adapts.

    foreign: what PEFT stored, where these tensors were made of it.
    """

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    lora: LoraConfig
    base: Path
    folder: Path
    tokenizer_files: list[Path]
    foreign: peft_layout.PeftAdapter | None = None

    @property
    def files(self) -> list[Path]:
        """Those that its tensors are read from."""
        foreign = (self.folder / peft_layout.CONFIG).is_file()
        return [peft_layout.weights_path(self.folder)] if foreign else storage.shard_paths(self.folder, storage.ADAPTER)

    @property
    def folders(self) -> list[Path]:
        """The directories that it is read from."""
        return [self.folder, self.base]


def open_adapter(folder: Path, base_dir: str = "") -> AdapterSource | None:
    """The adapter in a directory of ours or of PEFT, or in a file of one; None when there is none. Raises UserError.
    base_dir takes the place of the base that the adapter names; for one of ours it must hold the same weights."""
    if folder.is_file():
        if not folder.name.startswith("adapter"):
            return None
        _check_named(folder)
        folder = folder.parent
    if (folder / peft_layout.CONFIG).is_file():
        return _open_peft(folder, base_dir)
    adapter = adapters.read_adapter(folder, base_dir)
    if adapter is None:
        return None
    storage.check_complete(folder)
    config = read_config(folder)
    shard = storage.read_shard(storage.shard_paths(folder, storage.ADAPTER)[0])
    shapes = adapters.expected_shapes(config, adapter.lora)
    own = adapter_tensors(folder, adapter.lora, config, 1, 0)
    tensors = {name: StoredTensor(shapes[name], load, shard[name].dtype) for name, load in own.items()}
    return AdapterSource(config, tensors, adapter.lora, adapter.base, folder, storage.tokenizer_files(folder))


def _check_named(path: Path) -> None:
    """Raise UserError for a file in an adapter's directory that is not one of those which are read there."""
    folder = path.parent
    if (folder / peft_layout.CONFIG).is_file():
        read = [folder / peft_layout.CONFIG, peft_layout.weights_path(folder)]
    elif (folder / "adapter.json").is_file():
        read = [folder / "adapter.json", *storage.shard_paths(folder, storage.ADAPTER)]
    else:
        return  # whole weights under an adapter's name
    if path not in read:
        raise UserError(f"{path} is named, but the adapter beside it is read from {read[-1].name}; move one of them")


def _open_peft(folder: Path, base_dir: str) -> AdapterSource:
    adapter = peft_layout.read(folder)
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "consolidated.*.pth"):
        for path in folder.glob(pattern):
            raise UserError(f"{folder} holds an adapter and whole weights, {path.name}; name the file that is meant, "
                            "or move one")
    below = base = _base_of(adapter, base_dir)
    above = {folder.resolve()}
    while (below / peft_layout.CONFIG).is_file():
        if below.resolve() in above:
            raise UserError(f"{folder} stands on itself: {below} is the base of its base; name it with --base_dir")
        above.add(below.resolve())
        below = _base_of(peft_layout.read(below), "")
    opened = open_source(str(base))
    config = opened.config
    if "v_head.weight" in adapter.tensors and not config.value_head:
        config = dataclasses.replace(config, value_head=True, tied=False)
    tensors, lora = peft_layout.as_ours(adapter, config, opened.tensors)
    tokenizer = storage.tokenizer_files(folder)
    if not storage.has_vocabulary(tokenizer):
        tokenizer = opened.tokenizer_files
    tokenizer = storage.with_ends_of(opened.tokenizer_files, tokenizer)
    return AdapterSource(config, tensors, lora, base, folder, tokenizer, adapter)


def _base_of(adapter: peft_layout.PeftAdapter, base_dir: str) -> Path:
    """base_dir, or the base that a foreign adapter names, seen from here or from the adapter. Raises UserError."""
    named = Path(base_dir or adapter.config.base)
    places = [path for path in ([named] if base_dir else [named, adapter.folder / named]) if path.exists()]
    if not places:
        raise UserError(f"{adapter.folder} adapts {named}, which is no directory here; name its base with --base_dir")
    if len({path.resolve() for path in places}) > 1:
        raise UserError(f"{adapter.folder} adapts {named}: {places[0]} or {places[1]}? Name one with --base_dir")
    return places[0]


def merge(adapter: AdapterSource, rounded: str = "", advice: str = "") -> Source:
    """An adapter with its base: every adapted weight is merged in float32 when it is read, and stored as the base's.
    rounded: the type that the merged weights will have; where it keeps little of the adapter the log says so and gives
    the advice."""
    base = open_source(str(adapter.base))
    plain = {name: stored.load for name, stored in base.tensors.items()}
    own = {name: stored.load for name, stored in adapter.tensors.items()}
    adapters.tell_of_rounding(adapter.folder, plain, own, adapter.lora, getattr(torch, rounded, torch.float32), advice)
    merged = adapters.fold(plain, own, adapter.lora)
    dtype = getattr(torch, adapter.config.dtype)
    tensors = {name: StoredTensor(shape, merged[name], base.tensors[name].dtype if name in base.tensors else dtype)
               for name, shape in expected_shapes(adapter.config).items()}
    tokenizer = adapter.tokenizer_files or base.tokenizer_files
    return Source(adapter.config, tensors, tokenizer, [*adapter.files, *base.files])


def describe(ckpt_dir: str) -> tuple[Source, str]:
    """A checkpoint, and the kind and number of the files it is stored in. Raises UserError if it cannot be read."""
    source = open_source(ckpt_dir)
    kind = "shards" if source.files[0].suffix == ".pth" else "Hugging Face files"
    kind = "GGUF files" if gguf_file([Path(ckpt_dir)]) else kind
    kind = "files of the adapter and its base" if open_adapter(Path(ckpt_dir)) else kind
    return source, f"{kind}: {len(source.files)}"


def local_tensors(folder: Path, kind: str, config: ModelConfig, n: int, index: int) -> dict[str, Callable[[], Tensor]]:
    """What rank `index` of n holds of a directory of any number of shards of one kind, read when called.

    Only its rows [rows, ...] are read. PARAMETER/WHAT, of an optimizer, is cut as its parameter is. Raises UserError
    when the shards are not of one split.
    """
    paths = storage.shard_paths(folder, kind)
    if len(paths) == n:
        own = storage.read_shard(paths[index])
        return {name: lambda tensor=tensor: tensor for name, tensor in own.items() if not convert.is_derived(name)}
    all_shards = [storage.read_shard(path) for path in paths]
    tensors = {}
    for name in all_shards[0]:
        if convert.is_derived(name):
            continue
        for path, shard in zip(paths, all_shards, strict=True):
            if name not in shard:
                raise UserError(f"{path}: parameter {name!r} is missing, but {paths[0].name} has it")
        pieces = [shard[name] for shard in all_shards]
        parameter = name.partition("/")[0]
        how, other = cut_of(parameter, config, len(paths)), cut_of(parameter, config, n)
        check_pieces(name, [tuple(piece.shape) for piece in pieces], how, str(folder))
        tensors[name] = functools.partial(reshard, pieces, how, other, index)
    return tensors


def adapter_tensors(
    folder: Path, lora: LoraConfig, config: ModelConfig, n: int, index: int
) -> dict[str, Callable[[], Tensor]]:
    """local_tensors() of an adapter. Raises UserError unless all of it is there: without one tensor it would adapt
    less, or by LoRA in place of DoRA, and with factors of another rank by another scale, and nothing would show it."""
    own, shapes = local_tensors(folder, storage.ADAPTER, config, n, index), adapters.expected_shapes(config, lora)
    for name in sorted(shapes.keys() ^ own.keys()):
        raise UserError(f"{folder}: {name!r} is {'unknown' if name in own else 'missing'}; expected the tensors that "
                        "adapter.json and params.json describe")

    def read(name: str) -> Tensor:
        """A tensor of the adapter, [rows, ...] as the shard holds it."""
        tensor, how = own[name](), cut_of(name, config, n)
        shape = [len(how.rows[index]) if axis == how.dim else size for axis, size in enumerate(shapes[name])]
        if list(tensor.shape) != shape:
            raise UserError(f"{folder}: {name} is {list(tensor.shape)}, but adapter.json and params.json mean {shape}")
        return tensor

    return {name: functools.partial(read, name) for name in own}


def read_config(folder: Path) -> ModelConfig:
    """The config of a shard directory, whoever wrote it. Raises UserError."""
    storage.check_complete(folder)
    path = folder / "params.json"
    values = read_json(path)
    if "ffn_dim" not in values:
        return open_source(str(folder)).config
    refuse_infinities(values, str(path))
    paths = storage.shard_paths(folder) or storage.shard_paths(folder, storage.ADAPTER)
    names = list(storage.read_manifest(folder).get("split") or (storage.read_shard(paths[0]) if paths else ()))
    if names:  # an adapter has a part of each layer, not of each expert
        counted = {"n_layers": values.get("n_layers")} if any(".lora_" in name for name in names) else values
        check_counts(counted, dict.fromkeys(names, ()), str(path))
    return config_from_dict(values, str(path))
