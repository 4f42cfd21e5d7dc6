"""Checkpoint directory to ready model or tokenizer.

A model is laid out on the meta device and filled from this rank's shard alone; of one that will be trained a rank
reads its share of each tensor and no more. An adapter directory (LoRA) names its base; loading it loads the base and
folds the adapter in, in the requested dtype.
"""

import dataclasses
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from src import parallel, runlog
from src.checkpoint import adapters, shards, sources, storage
from src.checkpoint.foreign_config import check_model_type
from src.command.config import LoraFlags, TokenizerFlags
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.lora import LoraConfig, add_lora, check_targets, init_lora
from src.models.quantize import quantize_weights
from src.text.blocks import CODE_FORM
from src.text.chat import has_own_template
from src.text.tokenizer import VOCABULARY_FILES, Tokenizer, read_template_args

# What to do where rounding swallows an adapter
ALL_OF_IT = "--precision float32 computes with all of it"


def load_config(ckpt_dir: str, model_type: str = "", kind: Literal["", "solver", "verifier"] = "") -> ModelConfig:
    """The config of a checkpoint directory, which --model_type must not contradict and must be of this kind.

    Scripts call this before any work. Raises UserError.
    """
    config = sources.read_config(Path(ckpt_dir))
    check_model_type(config, model_type, ckpt_dir)
    if kind == "solver" and config.value_head:
        raise UserError(f"{ckpt_dir} is a verifier (it has a value head); a solver is needed here")
    if kind == "verifier" and not config.value_head:
        raise UserError(f"{ckpt_dir} is a solver (no value head); train a verifier from it with verifier_train.py")
    return config


def n_shards(ckpt_dir: str) -> int:
    """How many ranks a checkpoint directory is cut for."""
    folder = Path(ckpt_dir)
    kind = storage.ADAPTER if (folder / "adapter.json").is_file() else storage.WEIGHTS
    return len(storage.shard_paths(folder, kind))


def tensor_parallel_size(ckpt_dir: str, asked: int = -1, *, planned: bool = False) -> int:
    """How many ranks share one model: as many as asked; else the directory's shards if they divide the ranks, else all.

    planned: of a dry run, which without torchrun is of the shards. Raises UserError when `asked` does not divide the
    number of ranks.
    """
    world = parallel.world_size()
    if asked != -1:
        parallel.divided(world, "tensor_parallel_size", asked, "processes")
        return asked
    n = n_shards(ckpt_dir)
    return n if (n and world % n == 0) or (planned and world == 1) else world


def check_context_parallel(models: Mapping[str, ModelConfig], size: int, n: int) -> int:
    """How many batches the ranks take at once, `size` of them and n tensor-parallel ones sharing each. Raises UserError
    for ranks that this does not divide, and, by its directory, for a model whose heads it does not."""
    for folder, model in models.items():
        model.check_heads(n, size, folder)
    return parallel.divided(parallel.world_size() // n, "context_parallel_size", size)


def scoring_ranks(models: Mapping[str, ModelConfig], context_parallel_size: int, *, planned: bool = False) -> int:
    """How many tensor-parallel ranks share a model that scores rows: all that run, or those of each part of a row.
    planned: of a dry run, which without torchrun is of the shards. Raises UserError like check_context_parallel()."""
    world = parallel.world_size()
    n = parallel.divided(world, "context_parallel_size", context_parallel_size, "processes")
    check_context_parallel(models, context_parallel_size, n)
    return n_shards(next(iter(models))) if planned and world == 1 else n


def load_tokenizer(ckpt_dir: str, flags: TokenizerFlags = TokenizerFlags()) -> Tokenizer:  # noqa: B008
    """The tokenizer that travels in the checkpoint directory, or the one named; it must fit.

    What the flags leave open of the chat template is as in training, which params.json says; without either, prompts
    are raw. Warns of another form than in training, of raw prompts where a template is there that nobody chose,
    and of a BOS token on which the tokenizer's files differ. Raises UserError.
    """
    config = load_config(ckpt_dir)
    name = flags.chat_template or config.chat_template or "none"
    recorded = config.template_args if name == config.chat_template else {}
    args = read_template_args(flags.template_args) if flags.template_args else recorded
    system = "" if flags.system_prompt == "none" else flags.system_prompt
    if not flags.system_prompt and name not in ("none", CODE_FORM):  # which have no system message
        system = config.system_prompt
    tokenizer = Tokenizer(Path(flags.tokenizer_file or ckpt_dir), name, args, system)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{tokenizer.path} has {tokenizer.vocab_size} pieces but {ckpt_dir} embeds {config.vocab_size};"
                        " give the tokenizer that the checkpoint was trained with")
    if not (config.chat_template or flags.chat_template) and has_own_template(tokenizer.path.parent):
        runlog.logger().warning("%s has a chat template, but its prompts are raw here; give --chat_template file, or "
                                "none to say that it is meant", tokenizer.path.parent)
    has_bos = tokenizer.bos_id is not None
    if tokenizer.path.name == "tokenizer.json" and has_bos != tokenizer.vocabulary.adds_bos:
        found, followed = ("no", "with") if has_bos else ("a", "without")
        runlog.logger().warning("%s puts %s BOS token before a sequence, but tokenizer_config.json beside it says "
                                "otherwise (add_bos_token, bos_token) and is followed: sequences begin %s one here, "
                                "and perhaps not in transformers", tokenizer.path, found, followed)
    _tell_of_form(ckpt_dir, config, tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, *ckpt_dirs: str) -> None:
    """Raise UserError if another tokenizer travels in one of these directories, warn if another chat template does.

    Empty names are skipped, and so are directories without a tokenizer.
    """
    for folder in filter(None, ckpt_dirs):
        if not any((Path(folder) / name).is_file() for name in VOCABULARY_FILES):
            continue
        if Tokenizer(Path(folder)).fingerprint() != tokenizer.fingerprint():
            raise UserError(f"{folder} has another tokenizer than {tokenizer.path}; models that read each other's "
                            "token ids need the same one")
        config = load_config(folder)
        where = ""
        if tokenizer.chat and config.chat_template == tokenizer.chat_template:  # by name: a file's may be another
            then = Tokenizer(Path(folder), config.chat_template, config.template_args, config.system_prompt)
            if then.chat.source != tokenizer.chat.source:
                where = f" of {tokenizer.path.parent}, which is another template,"
        _tell_of_form(folder, config, tokenizer, where)


def _tell_of_form(folder: str, config: ModelConfig, tokenizer: Tokenizer, where: str = "") -> None:
    """Warn where a tokenizer shows a checkpoint texts in another form than it has learnt, as far as that is known.
    where: that of a template of the same name which is another one."""
    forms = []
    for of in (config, tokenizer):
        args = f" {json.dumps(of.template_args)}" if of.template_args else ""
        begins = json.dumps(textwrap.shorten(of.system_prompt, 60), ensure_ascii=False)
        forms.append(of.chat_template + args + (f" and the system prompt {begins}" if of.system_prompt else ""))
    then, now = forms
    if config.chat_template and (then != now or where):
        runlog.logger().warning("%s was trained with chat template %s, but reads texts in the form of %s here",
                                folder, then, now + where)


class Trained(NamedTuple):
    """That a model will be trained: the fresh adapters it is given, None where all weights learn, and their seed."""

    lora: LoraConfig | None = None
    seed: int = 1


def load_solver(
    ckpt_dir: str, *, model_type: str = "", precision: str = "", trained: Trained | None = None, quantize: str = "",
    n_layers: int | None = None,
) -> Decoder:
    """A language model on this rank's device that computes in --precision.

    Its weights are held in that type too, those that learn in float32: rounding would swallow an update. A `trained`
    model is shared over the data-parallel ranks, whose forward passes then wait for each other.
    quantize: empty, or a precision of models/quantize.py for weights that will not be trained.
    n_layers: leave out the layers after this many; None keeps all.
    """
    config = load_config(ckpt_dir, model_type, "solver")
    return _load(Path(ckpt_dir), config, precision, trained, quantize=quantize, n_layers=n_layers)


def load_verifier(
    ckpt_dir: str, *, model_type: str = "", precision: str = "", trained: Trained | None = None,
    from_solver: bool = False, quantize: str = "",
) -> Decoder:
    """A model with a value head; the rest as for load_solver().

    With from_solver a solver will do: its value head starts at zero.
    """
    config = load_config(ckpt_dir, model_type, "" if from_solver else "verifier")
    if from_solver and config.verifier_form:
        raise UserError(f"{ckpt_dir} is a verifier of the form {config.verifier_form}, which scores here and is not "
                        "trained; begin with a solver, or with a verifier trained here")
    return _load(Path(ckpt_dir), config, precision, trained, value_head=True, quantize=quantize)


def _load(
    folder: Path, config: ModelConfig, precision: str, trained: Trained | None, *, value_head: bool = False,
    quantize: str = "", n_layers: int | None = None,
) -> Decoder:
    """Lay the model out on the meta device, share it if it will be trained, and read what this rank keeps."""
    left_out = range(config.n_layers if n_layers is None else n_layers, config.n_layers)
    config = dataclasses.replace(config, n_layers=left_out.start, windows=config.windows[: left_out.start])
    dtype = parallel.compute_dtype(precision)
    rounded = {"": dtype, "bfloat16": torch.bfloat16}.get(quantize)  # codes have steps of their own
    stored = {name: read for name, read in _stored_tensors(folder, rounded).items()
              if shards.layer_of(name) not in left_out}
    if value_head and not config.value_head:
        stored.pop("output.weight", None)
        stored["v_head.weight"] = lambda: torch.zeros(1, config.dim)
        config = solver_to_verifier(config)
    with torch.device("meta"):
        model = Decoder(config, dtype)
    if quantize:
        shards.assign(model, _read(stored, None), str(folder))
        quantize_weights(model, quantize, dtype)
        if trained:
            put_lora_on(model, *trained)
        return model
    model.to(torch.float32 if trained and trained.lora is None else dtype)
    if trained:
        _add_adapters(model, trained.lora)
        parallel.shard_over_data_parallel(model, model.layers, dtype)
    places = shards.places(model)
    # one at a time: what was merged or resharded is freed as this rank's part is copied
    parts = {name: parallel.part_like(read(), model.get_parameter(places[name])) if name in places else read()
             for name, read in stored.items()}
    shards.assign(model, parts, str(folder))
    if trained:
        _init_adapters(model, trained.seed)
    return model


def load_adapted(folder: str, base_dir: str, precision: str = "") -> Decoder:
    """The solver base_dir with an adapter, one of PEFT or ours, merged in float32; for one rank. Raises UserError
    for a directory without an adapter, or with one of another base."""
    adapter, dtype = sources.open_adapter(Path(folder), base_dir), parallel.compute_dtype(precision)
    if not adapter:
        raise UserError(f"{folder} holds no adapter; expected adapter_config.json of PEFT, or adapter.json")
    source = sources.merge(adapter, str(dtype).removeprefix("torch."), ALL_OF_IT)
    if source.config.value_head:
        raise UserError(f"{folder} is a verifier's adapter (it has a value head); a solver's is needed here")
    with torch.device("meta"):
        model = Decoder(source.config, dtype)
    shards.assign(model, _read({name: stored.load for name, stored in source.tensors.items()}, dtype), folder)
    return model


def solver_to_verifier(config: ModelConfig) -> ModelConfig:
    """The config of the verifier that starts from a solver."""
    return dataclasses.replace(config, value_head=True, tied=False)


def local_tensors(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """This tensor-parallel rank's tensors [...] of a directory on its device, adapters folded in.

    dtype None = as stored. Raises UserError.
    """
    return _read(_stored_tensors(folder, dtype), dtype)


def _read(stored: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies [...] of these tensors on this rank's device, made one at a time. dtype None = as stored."""
    return {name: read().to(parallel.device(), dtype, copy=True) for name, read in stored.items()}


def _stored_tensors(folder: Path, dtype: torch.dtype | None) -> dict[str, Callable[[], Tensor]]:
    """This rank's tensors [...] as stored; adapters are folded in before any rounding to dtype (None: nothing is known
    of it), and where that leaves little of them the log says so.

    The ranks share the files out to compare them with their hashes: a flipped bit must not train on in silence.
    """
    adapter = adapters.read_adapter(folder)
    kind = storage.ADAPTER if adapter else storage.WEIGHTS
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    storage.verify_hashes(folder, kind, rank, n)
    config = sources.read_config(folder)
    if not adapter:
        return sources.local_tensors(folder, kind, config, n, rank)
    own = sources.adapter_tensors(folder, adapter.lora, config, n, rank)

    def total(name: str, squares: Tensor) -> Tensor:
        """Squares [out] of the rows of a matrix, summed over the ranks if each holds some of its columns."""
        if shards.split_dim(name, config, n) != 1:
            return squares
        return parallel.sum_over_tensor_parallel(squares.to(parallel.device())).to(squares.device)

    base = _stored_tensors(adapter.base, dtype)
    adapters.tell_of_rounding(folder, base, own, adapter.lora, dtype or torch.float32, ALL_OF_IT, total)
    return adapters.fold(base, own, adapter.lora, total)


def put_lora_on(model: Decoder, lora: LoraConfig | None, seed: int) -> None:
    """Freeze a loaded model and give it fresh float32 adapters; a value head stays trainable. None changes nothing.

    The model may be one that quantize_weights() has changed.
    """
    _add_adapters(model, lora)
    _init_adapters(model, seed)


def _add_adapters(model: Decoder, lora: LoraConfig | None) -> None:
    """put_lora_on() but for the adapters' values, which are on the meta device."""
    if lora is None:
        return
    check_targets(lora, model.config)
    with torch.device("meta"):
        add_lora(model, lora)
    if model.config.value_head:
        model.v_head.float()


def _init_adapters(model: Decoder, seed: int) -> None:
    """Give the adapters that a model has, if any, the values they start from."""
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()

    def local_slice(name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a factor [...]: [rows of the rank, ...]."""
        return shards.cut(whole, shards.cut_of(name, model.config, n), rank)

    for name, tensor in init_lora(model, seed, local_slice):
        shards.put(model, name, parallel.part_like(tensor, model.get_parameter(name)))


def lora_config(flags: LoraFlags, dropout: float = 0.0) -> LoraConfig | None:
    """What the --lora_* flags ask for; None (train all weights) for rank -1. Raises UserError."""
    if flags.lora_rank == -1:
        return None
    alpha = flags.lora_alpha * (flags.lora_rank**0.5 if flags.rslora else 1.0)
    return LoraConfig(rank=flags.lora_rank, alpha=alpha, dropout=dropout, targets=tuple(flags.lora_targets),
                      dora=flags.dora)


def check_step(ckpt_dir: str, config: ModelConfig, asked: str) -> None:
    """Raise UserError if --step asks for other steps than those that a verifier has learnt to judge; empty follows."""
    if asked and config.objective == "pairwise":
        raise UserError(f"{ckpt_dir} is no verifier of outcomes or steps; leave --step {asked} out")
    if asked not in ("", config.step):
        raise UserError(f"{ckpt_dir} has learnt steps that are {config.step}s, but --step is {asked}; leave it out to "
                        f"follow the checkpoint, or give a verifier that was trained with --step {asked}")


def context_limit(max_seq_len: int, ckpt_dir: str, config: ModelConfig) -> int:
    """The longest training sequence: --max_seq_len, -1 being 512 or the model's context if that is less.

    Raises UserError for more than the context: positions that the model has never seen teach it nothing.
    """
    if max_seq_len > config.max_seq_len:
        raise UserError(f"--max_seq_len {max_seq_len} is more than the context of {ckpt_dir}, {config.max_seq_len} "
                        "tokens (max_seq_len in its params.json); give at most that")
    return min(512, config.max_seq_len) if max_seq_len == -1 else max_seq_len
