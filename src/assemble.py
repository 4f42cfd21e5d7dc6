"""Checkpoint directory to ready model or tokenizer, and a trained model back to a checkpoint directory.

A model is laid out on the meta device and filled from this rank's shard alone. An adapter directory (LoRA)
names its base; loading it loads the base and folds the adapter in, in the requested dtype.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from src import parallel, runlog
from src.checkpoint import adapters, peft_forward, shards, sources, storage, training_state
from src.checkpoint.saving import Save, TensorGroup
from src.checkpoint.sources import AdapterSource, Source
from src.checkpoint.training_state import RunState
from src.config import LoraFlags
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.foreign import check_model_type
from src.models.lora import LoraConfig, add_lora, check_targets, init_lora
from src.models.quantize import quantize_weights
from src.text.tokenizer import VOCABULARY_FILES, Tokenizer, read_template_args


def load_config(
    ckpt_dir: str, model_type: str = "", kind: Literal["", "solver", "verifier"] = ""
) -> ModelConfig:
    """The config of a checkpoint directory, which --model_type must not contradict and must be of this kind.

    Scripts call this before any work. Raises UserError.
    """
    config = sources.read_config(Path(ckpt_dir))
    check_model_type(config, model_type, ckpt_dir)
    if kind == "solver" and config.value_head:
        raise UserError(f"{ckpt_dir} is a verifier (it has a value head); a solver is needed here")
    if kind == "verifier" and not config.value_head:
        raise UserError(
            f"{ckpt_dir} is a solver (no value head); train a verifier from it with verifier_train.py"
        )
    return config


def n_shards(ckpt_dir: str) -> int:
    """How many ranks a checkpoint directory is cut for."""
    folder = Path(ckpt_dir)
    kind = storage.ADAPTER if (folder / "adapter.json").is_file() else storage.WEIGHTS
    return len(storage.shard_paths(folder, kind))


def tensor_parallel_size(ckpt_dir: str, asked: int = -1) -> int:
    """How many ranks share one model: as many as asked; else the directory's shards if they divide the ranks, else all.

    Raises UserError when `asked` does not divide the number of ranks.
    """
    world, n = parallel.world_size(), n_shards(ckpt_dir)
    if asked == -1:
        return n if n and world % n == 0 else world
    if world % asked:
        raise UserError(
            f"--tensor_parallel_size {asked} does not divide the {world} processes that run; start a multiple of it"
        )
    return asked


def planned_ranks(ckpt_dir: str, asked: int = -1) -> int:
    """How many ranks share one model in a dry run: those of the command, or without torchrun the shards."""
    n_ranks = tensor_parallel_size(ckpt_dir, asked)
    return n_ranks if parallel.world_size() > 1 else n_shards(ckpt_dir)


def load_tokenizer(
    ckpt_dir: str, tokenizer_file: str = "", chat_template: str = "", template_args: str = ""
) -> Tokenizer:
    """The tokenizer that travels in the checkpoint directory, or the one named; it must fit. Raises UserError.

    chat_template: none, file or a built-in name; empty = what training used, as params.json says, else none.
    template_args: as --template_args gives them; empty = what training used, with its template.
    """
    config = load_config(ckpt_dir)
    name = chat_template or config.chat_template or "none"
    recorded = config.template_args if name == config.chat_template else {}
    args = read_template_args(template_args) if template_args else recorded
    if name == config.chat_template and args != recorded:
        runlog.logger().warning(
            "%s was trained with the template arguments %s; --template_args %s shows it texts in another form",
            ckpt_dir,
            json.dumps(recorded),
            json.dumps(args),
        )
    if chat_template and config.chat_template not in ("", chat_template):
        runlog.logger().warning(
            "%s was trained with chat template %s; --chat_template %s shows it texts in another form",
            ckpt_dir,
            config.chat_template,
            chat_template,
        )
    tokenizer = Tokenizer(Path(tokenizer_file or ckpt_dir), name, args)
    rows = config.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces but {ckpt_dir} embeds {rows}; "
            f"give the tokenizer that the checkpoint was trained with"
        )
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, *ckpt_dirs: str) -> None:
    """Raise UserError if another tokenizer travels in one of these directories, warn if another chat template does.

    Empty names are skipped, and so are directories without a tokenizer.
    """
    for folder in filter(None, ckpt_dirs):
        if not any((Path(folder) / name).is_file() for name in VOCABULARY_FILES):
            continue
        if Tokenizer(Path(folder)).fingerprint() != tokenizer.fingerprint():
            raise UserError(
                f"{folder} has another tokenizer than {tokenizer.path}; models that read each other's token ids "
                f"need the same one"
            )
        then = load_config(folder)
        if then.chat_template and _form(then) != _form(tokenizer):
            runlog.logger().warning(
                "%s was trained with chat template %s, but reads texts in the form of %s here",
                folder,
                _form(then),
                _form(tokenizer),
            )


def _form(chosen: ModelConfig | Tokenizer) -> str:
    """A chat template with its arguments, in words."""
    args = f" {json.dumps(chosen.template_args)}" if chosen.template_args else ""
    return chosen.chat_template + args


def load_solver(
    ckpt_dir: str,
    *,
    model_type: str = "",
    precision: str = "",
    trained: bool = False,
    quantize: str = "",
    n_layers: int | None = None,
) -> Decoder:
    """A language model on this rank's device that computes in --precision.

    Its weights are held in that type too, or `trained` in float32: rounding would swallow an update.
    quantize: empty, or a precision of models/quantize.py for weights that will not be trained.
    n_layers: leave out the layers behind this many; None keeps all.
    """
    config = load_config(ckpt_dir, model_type, "solver")
    return _load(Path(ckpt_dir), config, precision, trained, quantize=quantize, n_layers=n_layers)


def load_verifier(
    ckpt_dir: str,
    *,
    model_type: str = "",
    precision: str = "",
    trained: bool = False,
    from_solver: bool = False,
    quantize: str = "",
) -> Decoder:
    """A model with a value head; the rest as for load_solver().

    With from_solver a solver will do: its value head starts at zero.
    """
    config = load_config(ckpt_dir, model_type, "" if from_solver else "verifier")
    return _load(Path(ckpt_dir), config, precision, trained, value_head=True, quantize=quantize)


def _load(
    folder: Path,
    config: ModelConfig,
    precision: str,
    trained: bool,
    *,
    value_head: bool = False,
    quantize: str = "",
    n_layers: int | None = None,
) -> Decoder:
    """Lay the model out on the meta device and assign this rank's tensors to it."""
    left_out = range(config.n_layers if n_layers is None else n_layers, config.n_layers)
    config = dataclasses.replace(config, n_layers=left_out.start)
    dtype = parallel.compute_dtype(precision)
    held = None if quantize else torch.float32 if trained else dtype  # None: as stored, to be made smaller
    tensors = local_tensors(folder, held, left_out)
    if value_head and not config.value_head:
        tensors.pop("output.weight", None)
        tensors["v_head.weight"] = torch.zeros(1, config.dim, dtype=held or dtype, device=parallel.device())
        config = solver_to_verifier(config)
    with torch.device("meta"):
        model = Decoder(config, dtype)
    assign(model, tensors, str(folder))
    if quantize:
        tensors.clear()  # each weight goes as its codes come
        quantize_weights(model, quantize, dtype)
    return model


def solver_to_verifier(config: ModelConfig) -> ModelConfig:
    """The config of the verifier that starts from a solver."""
    return dataclasses.replace(config, value_head=True, tied=False)


def local_tensors(folder: Path, dtype: torch.dtype | None, left_out: range = range(0)) -> dict[str, Tensor]:
    """This rank's tensors of a directory on its device, adapters folded in, some layers left out.

    dtype None = as stored. Raises UserError.
    """
    place = {"device": parallel.device(), "dtype": dtype, "copy": True}
    # one at a time: what was merged or resharded is freed as it is copied
    return {
        name: load().to(**place)
        for name, load in _stored_tensors(folder).items()
        if shards.layer_of(name) not in left_out
    }


def _stored_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """This rank's tensors as stored; adapters are folded in before any rounding to the dtype asked for.

    The ranks share the files out to compare them with their hashes: a flipped bit must not train on in silence.
    """
    adapter = adapters.read_adapter(folder)
    kind = storage.ADAPTER if adapter else storage.WEIGHTS
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    storage.verify_hashes(folder, kind, rank, n)
    own = sources.local_tensors(folder, kind, sources.read_config(folder), n, rank)
    return adapters.fold(_stored_tensors(adapter.base), own, adapter.lora) if adapter else own


def assign(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Make these tensors the model's parameters. Raises UserError unless names and shapes match exactly."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"{source}: parameter {name!r} is missing from its shard")
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{source}: {name} has shape {list(tensors[name].shape)} but params.json means "
                f"{list(shape)} on each of {parallel.tensor_parallel_size()} ranks"
            )
    unknown = sorted(set(tensors) - set(wanted))
    if unknown:
        raise UserError(f"{source}: unknown parameter {unknown[0]!r}; params.json describes no such tensor")
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():  # assigned tensors come without
        parameter.requires_grad_(True)


def put_lora_on(model: Decoder, lora: LoraConfig | None, seed: int) -> None:
    """Freeze a loaded model and give it fresh float32 adapters; a value head stays trainable. None changes nothing.

    The model may be one that quantize_weights() has changed.
    """
    if lora is None:
        return
    check_targets(lora, model.config)
    with torch.device("meta"):
        add_lora(model, lora)
    if model.config.value_head:
        model.v_head.float()
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()

    def local_slice(name: str, whole: Tensor) -> Tensor:
        return shards.cut(whole, shards.cut_of(name, model.config, n), rank)

    for name, tensor in init_lora(model, seed, local_slice):
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(tensor.to(parallel.device()))


def lora_config(flags: LoraFlags, dropout: float = 0.0) -> LoraConfig | None:
    """What the --lora_* flags ask for; None (train all weights) for rank -1. Raises UserError."""
    if flags.lora_rank == -1:
        return None
    return LoraConfig(
        rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=dropout, targets=tuple(flags.lora_targets)
    )


def check_quantize(quantize: str, lora_rank: int) -> None:
    """Raise UserError for a base in few bits that is to be trained itself."""
    if quantize and lora_rank == -1:
        raise UserError(
            f"--quantize {quantize} holds weights that are not trained, but --lora_rank -1 trains all of them; "
            f"give a --lora_rank, or leave --quantize out"
        )


def check_step(ckpt_dir: str, config: ModelConfig, asked: str) -> None:
    """Raise UserError if --step asks for other steps than those that a verifier has learnt to judge; empty follows."""
    if asked and config.objective == "pairwise":
        raise UserError(f"{ckpt_dir} is no verifier of outcomes or steps; leave --step {asked} out")
    if asked not in ("", config.step):
        raise UserError(
            f"{ckpt_dir} has learnt steps that are {config.step}s, but --step is {asked}; leave it out to follow "
            f"the checkpoint, or give a verifier that was trained with --step {asked}"
        )


def context_limit(max_seq_len: int, ckpt_dir: str, config: ModelConfig) -> int:
    """The longest training sequence: --max_seq_len, -1 being 512 or the model's context if that is less.

    Raises UserError for more than the context: positions that the model has never seen teach it nothing.
    """
    if max_seq_len > config.max_seq_len:
        raise UserError(
            f"--max_seq_len {max_seq_len} is more than the context of {ckpt_dir}, {config.max_seq_len} tokens "
            f"(max_seq_len in its params.json); give at most that"
        )
    return min(512, config.max_seq_len) if max_seq_len == -1 else max_seq_len


def set_score(verifier: Decoder, **facts: str | float) -> None:
    """Record in the config that save_model() writes how a verifier is read, or its score statistics."""
    verifier.config = dataclasses.replace(verifier.config, **facts)


def set_chat_template(model: Decoder, tokenizer: Tokenizer) -> None:
    """Record in the config that save_model() writes how texts were put to the model; later commands follow it."""
    model.config = dataclasses.replace(
        model.config, chat_template=tokenizer.chat_template, template_args=tokenizer.template_args
    )


def check_save_dir(save_dir: str, *ckpt_dirs: str) -> None:
    """Raise UserError unless a trainer can write there without touching a checkpoint that it reads.

    An adapter's base counts: without it the adapter is worth nothing. Empty names are skipped.
    """
    target, unsafe = Path(save_dir), [Path(folder) for folder in ckpt_dirs if folder]
    for folder in unsafe:
        if folder.resolve() == target.resolve() or (
            folder.resolve().parent == target.resolve()
            and folder.name.startswith(("epoch-", "step-", "best", "reference"))
        ):
            raise UserError(
                f"saving to {save_dir} would overwrite {folder}, which is read; choose another directory"
            )
        if adapter := adapters.read_adapter(folder):
            unsafe.append(adapter.base)
    storage.claim(target)


def save_model(
    model: Decoder,
    save_dir: str,
    ckpt_dir: str,
    dtype: str = "",
    lora: LoraConfig | None = None,
) -> None:
    """Write a trained model as a checkpoint directory, each rank its own shard; all ranks call this.

    The arguments are begin_save()'s.
    """
    begin_save(model, save_dir, ckpt_dir, dtype, lora).complete()


def begin_save(
    model: Decoder,
    save_dir: str,
    ckpt_dir: str,
    dtype: str = "",
    lora: LoraConfig | None = None,
    tokenizer_file: str = "",
    state: RunState | None = None,
    background: bool = False,
) -> Save:
    """A save of the model as it is now, for all ranks to complete.

    ckpt_dir is where training started: it gives the tokenizer unless tokenizer_file does and, with LoRA, the base
    that the adapter directory will name. dtype of the stored weights: empty = as in ckpt_dir; adapters are always
    float32. With a state the directory is one that training can be resumed from. In the background the model may
    change before complete() is called.
    """
    parallel.free_gathered(model)
    source = Path(ckpt_dir)
    dtype = dtype or model.config.dtype
    tensors = {
        name: parameter
        for name, parameter in model.named_parameters()
        if lora is None or parameter.requires_grad
    }
    kind, stored = (storage.ADAPTER, torch.float32) if lora else (storage.WEIGHTS, getattr(torch, dtype))
    groups = [TensorGroup(kind, tensors, stored)]
    documents = {"adapter.json": adapters.document(source, lora)} if lora else {}
    if state:
        groups.append(TensorGroup(training_state.OPTIMIZER, state.trainer.tensors, torch.float32))
        documents[training_state.STATE] = state.document()
    documents["params.json"] = model.config.to_dict() | {"dtype": dtype}
    n = parallel.tensor_parallel_size()
    facts = {
        "source": str(source),
        "rotary_layout": "interleaved",
        "tied": model.config.tied,
        "split": {name: shards.split_dim(name, model.config, n) for name in tensors},
    }
    tokenizer = storage.tokenizer_files(Path(tokenizer_file) if tokenizer_file else source)
    return Save(Path(save_dir), groups, documents, tokenizer, facts, background=background)


class LogitDifference(NamedTuple):
    """Largest difference, largest value, and the share of positions whose likeliest token is the same."""

    difference: float
    scale: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.3g} of values up to {self.scale:.3g}, "
            f"the same likeliest token at {self.agreement:.1%} of positions"
        )


@torch.no_grad()
def logit_difference(before: Source | AdapterSource, after: Source | AdapterSource) -> LogitDifference:
    """How far the logits (a verifier's scores) of a written checkpoint lie from those of what it was made of.

    Both compute in float32 on random tokens, an adapter unmerged, and one of PEFT's from what PEFT stored. One process;
    both models are in memory in turn.
    """
    length = min(64, before.config.max_seq_len)
    tokens = torch.randint(before.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    first, second = (_outputs(source, tokens) for source in (before, after))
    agreement = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    return LogitDifference((first - second).abs().max().item(), first.abs().max().item(), agreement)


def _outputs(source: Source | AdapterSource, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] or scores [B, S] of a checkpoint on one process, float32."""
    parallel.start()
    base, own, foreign = source, {}, None
    if isinstance(source, AdapterSource):
        base, own, foreign = sources.open_source(str(source.base)), source.tensors, source.foreign
    with torch.device("meta"):
        model = Decoder(source.config)
        if own and not foreign:
            add_lora(model, source.lora)
    tensors = {}
    for name, _ in model.named_parameters():
        plain = name.replace(".base.weight", ".weight")
        tensors[name] = (
            (own.get(name) or base.tensors[plain]).load().to(parallel.device(), torch.float32, copy=True)
        )
    assign(model, tensors, "this checkpoint")
    if foreign:
        peft_forward.put_on(model, foreign, source.config)
    hidden = model(tokens.to(parallel.device()))
    return model.scores(hidden) if source.config.value_head else model.logits(hidden).float()
