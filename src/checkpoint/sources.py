"""Any checkpoint that a user brings, opened as one table of whole tensors under our names.

Single files (a plain or nested dictionary, safetensors), lists of files, Hugging Face directories and
directories of tensor-parallel shards all become a Source; tensors are read one at a time, when asked for.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.checkpoint import adapters, convert, peft_layout, storage, training_state
from src.checkpoint.description import check_counts, choose_description, read_descriptions
from src.checkpoint.shards import check_pieces, cut_of, expected_shapes, join, reshard
from src.checkpoint.tensor_files import StoredTensor
from src.checkpoint.weight_files import OpenedFile, open_file, weight_files
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig, config_from_dict, refuse_infinities
from src.models.families import PLAIN
from src.models.foreign import config_from_hf
from src.models.lora import LoraConfig
from src.models.meta import MetaWeights, config_from_meta


class Source(NamedTuple):
    """An opened checkpoint: what it is, its whole tensors in our names and layout, its tokenizer's files."""

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    tokenizer_files: list[Path]
    folders: list[Path]


def open_source(ckpt_file: str | list[str], config_file: str = "", base_dir: str = "") -> Source:
    """Open a file, a list of files or a directory. Raises UserError that names what is wrong with it.

    The config comes from `config_file`, else from params.json or config.json beside the weights, else from
    the `model_args` inside the file. An adapter is merged into its base, or into `base_dir`.
    """
    paths = [Path(path) for path in ([ckpt_file] if isinstance(ckpt_file, str) else ckpt_file)]
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    if adapter := open_adapter(paths[0], base_dir):
        return merge(adapter)
    descriptions = read_descriptions(folder, config_file)
    if len(paths) == 1 and paths[0].is_dir():
        paths = weight_files(folder)
    files = [open_file(path) for path in paths]
    hf = any(convert.uses_hf_names(file.tensors) for file in files)
    described, values = choose_description(descriptions, folder, files[0], hf)
    family = str(values.get("model_type", PLAIN)) if hf else None
    named = [_our_names(file, family) for file in files]
    check_counts(values, {name: stored.shape for part in named for name, stored in part.items()}, described)
    if len(named) > 1 and all(set(tensors) == set(named[0]) for tensors in named):
        tensors, config = _join_shards(named, values, described)
    else:
        tensors = _merge_parts(files, named)
        config = _config(values, described, tensors)
    if hf and "v_head.weight" in tensors:
        tensors, config = _verifier_from_hf(tensors, values, config, described)
    tensors = _one_of_tied(tensors, config, described)
    if hf:
        tensors = convert.as_ours(tensors, config)
    _check_shapes(tensors, config, described)
    return Source(config, tensors, storage.tokenizer_files(folder), [folder])


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


def open_adapter(folder: Path, base_dir: str = "") -> AdapterSource | None:
    """The adapter in a directory of ours or of PEFT, or in a file of one; None when there is none. Raises UserError.

    base_dir takes the place of the base that the adapter names; for one of ours it must hold the same weights.
    """
    if folder.is_file():
        if not folder.name.startswith("adapter"):
            return None
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
    tensors = {}
    for name, load in local_tensors(folder, storage.ADAPTER, config, 1, 0).items():
        if name not in shapes:
            raise UserError(f"{folder}: unknown parameter {name!r}; adapter.json describes no such tensor")
        tensors[name] = StoredTensor(shapes[name], load, shard[name].dtype)
    return AdapterSource(config, tensors, adapter.lora, adapter.base, folder, storage.tokenizer_files(folder))


def _open_peft(folder: Path, base_dir: str) -> AdapterSource:
    adapter = peft_layout.read(folder)
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "consolidated.*.pth"):
        for path in folder.glob(pattern):
            raise UserError(
                f"{folder} holds an adapter and whole weights, {path.name}; name the file that is meant, or move one"
            )
    below = base = _base_of(adapter, base_dir)
    above = {folder.resolve()}
    while (below / peft_layout.CONFIG).is_file():
        if below.resolve() in above:
            raise UserError(
                f"{folder} stands on itself: {below} is the base of its base; name it with --base_dir"
            )
        above.add(below.resolve())
        below = _base_of(peft_layout.read(below), "")
    opened = open_source(str(base))
    config = opened.config
    if "v_head.weight" in adapter.tensors and not config.value_head:
        config = dataclasses.replace(config, value_head=True, tied=False)
    tensors, lora = peft_layout.as_ours(adapter, config, opened.tensors)
    return AdapterSource(config, tensors, lora, base, folder, storage.tokenizer_files(folder), adapter)


def _base_of(adapter: peft_layout.PeftAdapter, base_dir: str) -> Path:
    """base_dir, or the base that a foreign adapter names, seen from here or from the adapter. Raises UserError."""
    named = Path(base_dir or adapter.config.base)
    places = [path for path in ([named] if base_dir else [named, adapter.folder / named]) if path.exists()]
    if not places:
        raise UserError(
            f"{adapter.folder} adapts {named}, which is no directory here; name its base with --base_dir"
        )
    if len({path.resolve() for path in places}) > 1:
        raise UserError(
            f"{adapter.folder} adapts {named}: {places[0]} or {places[1]}? Name one with --base_dir"
        )
    return places[0]


def merge(adapter: AdapterSource) -> Source:
    """An adapter with its base: every adapted weight is merged in float32 when it is read, and stored as the base's."""
    base = open_source(str(adapter.base))
    plain = {name: stored.load for name, stored in base.tensors.items()}
    own = {name: stored.load for name, stored in adapter.tensors.items()}
    merged = adapters.fold(plain, own, adapter.lora)
    dtype = getattr(torch, adapter.config.dtype)
    tensors = {
        name: StoredTensor(shape, merged[name], base.tensors[name].dtype if name in base.tensors else dtype)
        for name, shape in expected_shapes(adapter.config).items()
    }
    tokenizer = adapter.tokenizer_files or base.tokenizer_files
    return Source(adapter.config, tensors, tokenizer, [adapter.folder, *base.folders])


def folders_of(source: Source | AdapterSource) -> list[Path]:
    """The directories that a checkpoint is read from, an adapter's base included."""
    return source.folders if isinstance(source, Source) else [source.folder, source.base]


def describe(ckpt_dir: str) -> tuple[Source, str, int]:
    """A checkpoint, what kind of files it is stored in and how many they are. Raises UserError if it cannot be read."""
    folder = Path(ckpt_dir)
    source = open_source(ckpt_dir)
    if open_adapter(folder):
        return source, "files of the adapter and its base", sum(len(_tensor_files(f)) for f in source.folders)
    kind = "shards" if storage.shard_paths(folder) else "Hugging Face files"
    return source, kind, len(_tensor_files(folder))


def _tensor_files(folder: Path) -> list[Path]:
    optimizer = f"{training_state.OPTIMIZER}."
    return [
        path
        for path in folder.iterdir()
        if path.suffix in (".pth", ".safetensors", ".bin") and not path.name.startswith(optimizer)
    ]


def local_tensors(
    folder: Path, kind: str, config: ModelConfig, n: int, index: int
) -> dict[str, Callable[[], Tensor]]:
    """What rank `index` of n holds of a directory of any number of shards, read when called.

    Only the rows that this rank holds are read. Raises UserError when the shards are not of one split.
    """
    paths = storage.shard_paths(folder, kind)
    if len(paths) == n:
        own = storage.read_shard(paths[index])
        return {
            name: lambda tensor=tensor: tensor for name, tensor in own.items() if not convert.is_derived(name)
        }
    all_shards = [storage.read_shard(path) for path in paths]
    tensors = {}
    for name in all_shards[0]:
        if convert.is_derived(name):
            continue
        for path, shard in zip(paths, all_shards, strict=True):
            if name not in shard:
                raise UserError(f"{path}: parameter {name!r} is missing, but {paths[0].name} has it")
        pieces = [shard[name] for shard in all_shards]
        how, other = cut_of(name, config, len(paths)), cut_of(name, config, n)
        check_pieces(name, [tuple(piece.shape) for piece in pieces], how, str(folder))
        tensors[name] = functools.partial(reshard, pieces, how, other, index)
    return tensors


def _our_names(file: OpenedFile, family: str | None) -> dict[str, StoredTensor]:
    """A file's tensors under our names, wrappers' prefixes and derived tensors removed; unknown names are listed.

    family: whose Hugging Face names they are; None = they are ours.
    """
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
            raise UserError(
                f"{file.path}: {name!r} is stored twice, once as {stored_name}; remove one of them"
            )
        tensors[name] = tensor
    if unknown:
        raise UserError(
            f"{file.path}: {len(unknown)} unknown parameters: {', '.join(unknown[:8])}; "
            f"expected a checkpoint in the names of {family or 'Meta'}"
        )
    return tensors


def _merge_parts(files: list[OpenedFile], named: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """One table from files that each hold some of the parameters."""
    tensors: dict[str, StoredTensor] = {}
    for file, part in zip(files, named, strict=True):
        twice = sorted(set(part) & set(tensors))
        if twice:
            raise UserError(
                f"{file.path}: parameter {twice[0]!r} is in an earlier file too; expected parts of "
                f"one checkpoint, or all its tensor-parallel shards"
            )
        tensors |= part
    return tensors


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
            whole, lambda pieces=pieces, how=how: join([p.load() for p in pieces], how), pieces[0].dtype
        )
    return tensors, config


def _config(
    values: dict[str, object],
    described: str,
    tensors: dict[str, StoredTensor],
    scale: int = 1,
    embedding_dim: int = 1,
) -> ModelConfig:
    """The ModelConfig of a description in our, Hugging Face's or Meta's terms.

    `tensors` may be shard 0 of `scale` shards whose embeddings are cut along `embedding_dim`.
    """
    if "ffn_dim" in values:
        return config_from_dict(values, described)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if "hidden_size" in values:
        return config_from_hf(values, described, dtype)
    for key in ("dim", "n_layers", "n_heads"):
        if key not in values:
            raise UserError(
                f"{described}: key {key!r} is missing; expected a Meta params.json or an HF config.json"
            )
    inner = f"layers.0.feed_forward.{'experts.0.' if values.get('moe') else ''}w1.weight"
    _check_present(tensors, ("tok_embeddings.weight", inner), described)
    ffn_rows = tensors[inner].shape[0] * scale
    vocab_rows = tensors["tok_embeddings.weight"].shape[0] * (scale if embedding_dim == 0 else 1)
    weights = MetaWeights(
        ffn_dim=ffn_rows,
        vocab_size=vocab_rows,
        dtype=dtype,
        tied=_is_tied(tensors),
        value_head="v_head.weight" in tensors,
        embedding_split_dim=embedding_dim,
    )
    return config_from_meta(values, described, weights)


def _check_present(tensors: dict[str, StoredTensor], names: tuple[str, ...], described: str) -> None:
    """Raise UserError unless the weights hold the parameters that sizes are read from."""
    for name in names:
        if name not in tensors:
            raise UserError(f"{described}: the weights lack parameter {name!r}")


def _is_tied(tensors: dict[str, StoredTensor]) -> bool:
    """Whether Meta-style weights share the embedding with the output layer: no output, or the very same values."""
    if "v_head.weight" in tensors:
        return False
    output, embedding = tensors.get("output.weight"), tensors["tok_embeddings.weight"]
    return output is None or (
        output.shape == embedding.shape and torch.equal(output.load(), embedding.load())
    )


def _one_of_tied(
    tensors: dict[str, StoredTensor], config: ModelConfig, described: str
) -> dict[str, StoredTensor]:
    """The matrix of a tied checkpoint once, under the embedding's name, whichever of the two it was stored under.

    A pair that has diverged is refused.
    """
    output = tensors.get("output.weight")
    if not config.tied or output is None:
        return tensors
    embedding = tensors.get("tok_embeddings.weight", output)
    if embedding is not output and not torch.equal(output.load(), embedding.load()):
        raise UserError(
            f"{described} says that embeddings are tied, but output and tok_embeddings differ; "
            f"set tie_word_embeddings to false to keep both"
        )
    tensors = tensors | {"tok_embeddings.weight": embedding}
    return {name: stored for name, stored in tensors.items() if name != "output.weight"}


def _verifier_from_hf(
    tensors: dict[str, StoredTensor], values: dict[str, object], config: ModelConfig, described: str
) -> tuple[dict[str, StoredTensor], ModelConfig]:
    """The verifier in a classifier of transformers with one label; where its scores are read, its export knows."""
    bias = tensors.get("v_head.bias")
    if bias is not None and bias.load().any():
        raise UserError(f"{described}: score.bias is not zero, and a verifier's value head has no bias")
    token_classifier = "TokenClassification" in str(values.get("architectures"))
    facts = {} if "splitrl" in values else {"score": "mean" if token_classifier else "last"}
    config = dataclasses.replace(config, value_head=True, tied=False, **facts)
    return {name: stored for name, stored in tensors.items() if name != "v_head.bias"}, config


def _check_shapes(tensors: dict[str, StoredTensor], config: ModelConfig, described: str) -> None:
    """Raise UserError unless the tensors are exactly those of the config."""
    expected = expected_shapes(config)
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(
            f"{len(unknown)} unknown parameters: {', '.join(unknown[:8])}; {described} describes none of them"
        )
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{described}: parameter {name!r} is missing from the weights")
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} has shape {list(tensors[name].shape)}, but {described} means {list(shape)}"
            )


def read_config(folder: Path) -> ModelConfig:
    """The config of a shard directory, whoever wrote it. Raises UserError."""
    storage.check_complete(folder)
    path = folder / "params.json"
    values = read_json(path)
    if "ffn_dim" not in values:
        return open_source(str(folder)).config
    refuse_infinities(values, str(path))
    names = storage.parameter_names(folder)
    if any(".lora_" in name for name in names):  # an adapter has a part of each layer, not of each expert
        check_counts({"n_layers": values.get("n_layers")}, dict.fromkeys(names, ()), str(path))
    elif names:
        check_counts(values, dict.fromkeys(names, ()), str(path))
    return config_from_dict(values, str(path))


def with_added_tokens(source: Source, n: int, first: int | None = None) -> Source:
    """A checkpoint with n tokens from id `first` on, each the mean of the rows below (Hewitt 2021).

    first None: behind the last row. Where the embedding is larger than the tokenizer's vocabulary, rows that nothing
    used so far become those tokens'.
    """
    had = source.config.vocab_size
    first = had if first is None else first
    rows = max(had, first + n)
    tensors = dict(source.tensors)
    for name in tensors.keys() & {"tok_embeddings.weight", "output.weight"}:
        stored = tensors[name]
        load = functools.partial(_load_extended, stored, first, n)
        tensors[name] = stored._replace(shape=(rows, stored.shape[1]), load=load)
    config = dataclasses.replace(
        source.config, vocab_size=rows, n_added_tokens=source.config.n_added_tokens + rows - had
    )
    return source._replace(config=config, tensors=tensors)


def _load_extended(stored: StoredTensor, first: int, n: int) -> Tensor:
    whole = stored.load()
    mean = whole[:first].mean(0, dtype=torch.float32).type_as(whole)
    return torch.cat([whole[:first], mean.expand(n, -1), whole[first + n :]])
