"""A checkpoint or an adapter cut into n tensor-parallel shards on disk."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import adapters, shards, storage
from src.checkpoint.sources import AdapterSource, Source
from src.checkpoint.tensor_files import StoredTensor, TensorSpec, open_tensor_file
from src.errors import UserError
from src.text.tokenizer import VOCABULARY_FILES, Tokenizer


def split(source: Source | AdapterSource, folder: Path, n: int, description: str, dtype: str = "") -> list[str]:
    """Write n shards of a source with params.json, tokenizer and manifest; one tensor is in memory at a time.

    An adapter stays one, with adapter.json that names its base. dtype "" keeps every tensor's. Returns the parameters
    that hold NaN or infinity. Raises UserError when the model cannot be cut so, a file is missing or the disk is too
    small.
    """
    config, tensors, kind, documents = source.config, source.tensors, storage.WEIGHTS, {}
    config.check_divides(n, description)
    if isinstance(source, AdapterSource):
        storage.check_complete(source.base)
        kind, documents = storage.ADAPTER, {"adapter.json": adapters.document(source.base, source.lora)}
    documents["params.json"] = config.to_dict() | {"dtype": dtype or config.dtype}
    refuse_source(folder, source.folders)
    cuts = {name: shards.cut_of(name, config, n) for name in tensors}

    def layout(index: int) -> dict[str, TensorSpec]:
        """What a shard holds, without reading anything."""
        empty = {name: torch.empty(stored.shape, device="meta") for name, stored in tensors.items()}
        return {name: TensorSpec(tuple(shards.view_of(whole, cuts[name], index).shape),
                                 getattr(torch, dtype) if dtype else tensors[name].dtype)
                for name, whole in empty.items()}

    files = {storage.shard_name(kind, index): layout(index) for index in range(n)}
    facts = {"source": description, "rotary_layout": "interleaved", "tied": config.tied,
             "split": {name: how.dim for name, how in cuts.items()}}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its own would spin on the processors on which the files are hashed and written
    try:
        return write_files(folder, [files], tensors, documents, source.tokenizer_files, facts,
                           piece=lambda name, whole, index: shards.view_of(whole, cuts[name], index))
    finally:
        torch.set_num_threads(n_threads)


def write_files(
    folder: Path, passes: Sequence[Mapping[str, Mapping[str, TensorSpec]]], tensors: Mapping[str, StoredTensor],
    documents: Mapping[str, Mapping[str, object]], tokenizer: list[Path], facts: Mapping[str, object],
    piece: Callable[[str, Tensor, int], Tensor] = lambda name, whole, index: whole,
) -> list[str]:
    """Write tensor files from one reading of the tensors, one of them in memory at a time, and complete the directory.

    passes: layouts by file name; the files of a pass hold the same names and are filled side by side.
    piece: name, whole tensor [...] and index of a file in its pass -> what that file holds of it, [rows, ...].
    Returns the tensors that hold NaN or infinity. Raises UserError when the disk is too small.
    """
    layouts = [layout for files in passes for layout in files.values()]
    storage.check_writable(folder)
    storage.check_space(folder, sum(spec.nbytes for layout in layouts for spec in layout.values()))
    not_finite = []
    with storage.writing(folder):
        for files in passes:
            with ExitStack() as stack:
                opened = [stack.enter_context(open_tensor_file(storage.staging(folder) / name, layout))
                          for name, layout in files.items()]
                for name in opened[0].names:
                    whole = tensors[name].load()
                    if not is_finite(whole):
                        not_finite.append(name)
                    for index, file in enumerate(opened):
                        file.write(name, piece(name, whole, index))
        storage.finish(folder, len(layouts), documents, tokenizer, facts)
    return not_finite


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry of a tensor [...] is a number; one pass, nothing allocated."""
    if tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def with_tokenizer(source: Source | AdapterSource, tokenizer_file: str) -> Source | AdapterSource:
    """A checkpoint with the tokenizer named, if one is. The source's generation_config.json stays, unless the tokenizer
    has one of its own."""
    if not tokenizer_file:
        return source
    if not Path(tokenizer_file).exists():
        raise UserError(f"--tokenizer_file {tokenizer_file} does not exist")
    named = storage.tokenizer_files(Path(tokenizer_file))
    if not storage.has_vocabulary(named):
        raise UserError(f"--tokenizer_file {tokenizer_file} is no tokenizer; expected a directory with one, or a file "
                        f"{', '.join(VOCABULARY_FILES)}")
    return source._replace(tokenizer_files=storage.with_ends_of(source.tokenizer_files, named))


def refuse_source(folder: Path, sources: list[Path]) -> None:
    """Raise UserError if a checkpoint would be written over what it is read from."""
    if any(path.resolve() == folder.resolve() for path in sources):
        raise UserError(f"--save_path {folder} is the source itself; choose another directory")


def as_verifier(source: Source, form: str, tokenizer: Tokenizer) -> Source:
    """The process verifier in a solver that was trained to say "+" after a right step and "-" after a wrong one.

    Its score is the logit of the first minus that of the second, as one row [1, D] of a value head.
    """
    config, ids = source.config, [tokenizer.encode(sign)[-1] for sign in "+-"]
    if config.value_head or config.logit_softcap:
        raise UserError(f"--verifier_form {form} is for a solver without a softcap; found "
                        + ("a verifier" if config.value_head else f"logit_softcap={config.logit_softcap}"))

    def head(output: Tensor) -> Tensor:
        """[V, D] -> [1, D] float32."""
        right, wrong = output[ids].float()
        return (right - wrong)[None] / config.logit_divisor

    output = source.tensors["tok_embeddings.weight" if config.tied else "output.weight"]
    tensors = {name: stored for name, stored in source.tensors.items() if name != "output.weight"}
    tensors["v_head.weight"] = output.then(head, (1, config.dim))._replace(dtype=torch.float32)
    config = dataclasses.replace(
        config, value_head=True, tied=False, objective="process", score="steps", verifier_form=form,
        **{"step": "line"} if form == "math-shepherd" else {"chat_template": "file"})
    return source._replace(config=config, tensors=tensors)


def with_added_tokens(source: Source, n: int, first: int | None = None) -> Source:
    """A checkpoint with n tokens from id `first` on, each the mean of the rows below (Hewitt 2021).

    first None: after the last row. Where the embedding is larger than the tokenizer's vocabulary, rows that nothing
    used so far become those tokens'.
    """
    had = source.config.vocab_size
    first = had if first is None else first
    rows = max(had, first + n)

    def extended(whole: Tensor) -> Tensor:
        """[V, D] -> [rows, D]."""
        mean = whole[:first].mean(0, dtype=torch.float32).type_as(whole)
        return torch.cat([whole[:first], mean.expand(n, -1), whole[first + n :]])

    tensors = dict(source.tensors)
    for name in tensors.keys() & {"tok_embeddings.weight", "output.weight"}:
        tensors[name] = tensors[name].then(extended, (rows, tensors[name].shape[1]))
    config = dataclasses.replace(
        source.config, vocab_size=rows, n_added_tokens=source.config.n_added_tokens + rows - had)
    return source._replace(config=config, tensors=tensors)
