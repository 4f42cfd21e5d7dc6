"""The flags of scripts as frozen dataclasses: each is declared once, with its type, bounds, default and meaning.

A class is a group of --help, named by the first line of its docstring; a script's config inherits the groups that it
needs and adds its own:

    @dataclass(frozen=True, kw_only=True)
    class SolverTrainConfig(TrainConfig):
        \"\"\"Supervised fine-tuning\"\"\"
        eval_file: str = flag("", "rows whose loss is measured while training")
        lr: NonNegative = 2e-5          # another default; its meaning and group stay those of OptimizerFlags

`cli.run(main)` builds the object that `main(config: SolverTrainConfig)` takes from the words of the command line and
the file that --config names. Making one does no work but to check its numbers and what goes together.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from src.errors import UserError


class Bounds(NamedTuple):
    """The values a flag may hold, in words and as a test that NaN fails."""

    expects: str
    allow: Callable[[Any], bool]


Count = Annotated[int, Bounds("1 or more", lambda x: x >= 1)]
CountOrOff = Annotated[int, Bounds("1 or more, or -1", lambda x: x >= 1 or x == -1)]
CountOrZero = Annotated[int, Bounds("0 or more", lambda x: x >= 0)]
NonNegative = Annotated[float, Bounds("0 or more", lambda x: 0 <= x < math.inf)]
NonNegativeOrOff = Annotated[float, Bounds("0 or more, or -1", lambda x: 0 <= x < math.inf or x == -1)]
Positive = Annotated[float, Bounds("more than 0", lambda x: 0 < x < math.inf)]
PositiveOrOff = Annotated[float, Bounds("more than 0, or -1", lambda x: 0 < x < math.inf or x == -1)]
Share = Annotated[float, Bounds("a number from 0 to 1", lambda x: 0 <= x <= 1)]
ShareOrOff = Annotated[float, Bounds("a number from 0 to 1, or -1", lambda x: 0 <= x <= 1 or x == -1)]
TopP = Annotated[float, Bounds("more than 0 and at most 1", lambda x: 0 < x <= 1)]
AtLeastOne = Annotated[float, Bounds("a number of at least 1", lambda x: 1 <= x < math.inf)]
Counts = Annotated[list[int], Bounds("1 or more each", lambda x: len(x) > 0 and all(n >= 1 for n in x))]
Weights = Annotated[list[float], Bounds("0 or more each", lambda x: all(0 <= one < math.inf for one in x))]
Seed = Annotated[int, Bounds("a whole number of 64 bits", lambda x: -(2**63) <= x < 2**63)]

Schedule = Literal["cosine", "linear", "constant"]
Recomputed = Literal["none", "selective", "full"]
Resume = Literal["none", "auto"]
StoredType = Literal["", "float32", "bfloat16", "float16"]
Precision = Literal["", "auto", "float32", "bfloat16", "float16"]
LINEARS = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]


def flag(default: object = MISSING, help: str = "") -> Any:
    """A field of a config: its default (none: the flag is required) and its meaning in --help."""
    metadata = {"help": " ".join(help.split())}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The run"""

    dry_run: bool = flag(False, "print the plan - steps, memory of each rank, disk, an example - and stop")

    def __post_init__(self) -> None:
        """Raise UserError for a value that its flag cannot mean: no samples, a negative rate."""
        hints = get_type_hints(type(self), include_extras=True)
        for each in fields(self):
            for bounds in getattr(hints[each.name], "__metadata__", ()):
                check_bounds(each.name, getattr(self, each.name), bounds)

    def changed(self, names: Collection[str]) -> list[str]:
        """Those of these flags, as far as the config has them, with another value than their default."""
        return [each.name for each in fields(self) if each.name in names and getattr(self, each.name) != (
            each.default if each.default_factory is MISSING else each.default_factory())]

    def refuse(self, names: Collection[str], why: str) -> None:
        """Raise UserError for one of these flags that was given: nothing would come of it."""
        for name in self.changed(names):
            raise UserError(f"--{name} has no effect: {why}; leave it out")

    def flags(self) -> dict[str, Any]:
        """Every flag by name, as run.json records it and --config reads it back."""
        return asdict(self)


def check_bounds(name: str, value: object, bounds: Bounds) -> None:
    """Raise UserError unless the bounds allow the value of the flag."""
    if not bounds.allow(value):
        raise UserError(f"--{name} is {value}, expected {bounds.expects}")


@dataclass(frozen=True, kw_only=True)
class SeedFlags(Config):
    """What is random"""

    seed: Seed = flag(1, "seed of everything random: data order, sampling, new adapters, dropout")


def renamed(columns: Sequence[str]) -> dict[str, str]:
    """The file's names by ours, of words THEIRS=OURS."""
    return {ours: theirs for theirs, _, ours in (word.partition("=") for word in columns)}


@dataclass(frozen=True, kw_only=True)
class ColumnFlags(Config):
    """Files and rows"""

    columns: list[str] = flag([], """THEIRS=OURS for columns of data files that have other names than ours, such as
        answer=label,problem=instruction; all others stay""")

    @property
    def renamed(self) -> dict[str, str]:
        """The file's names by ours."""
        return renamed(self.columns)

    def __post_init__(self) -> None:
        """Raise UserError for a pair of names that is none, and for a name that stands twice."""
        super().__post_init__()
        object.__setattr__(self, "columns", [part for word in self.columns for part in word.split(",") if part])
        renamed = self.renamed
        if not all(renamed) or not all(renamed.values()) or len({*renamed.values()}) < len(self.columns):
            raise UserError(f"--columns is {','.join(self.columns)}; expected THEIRS=OURS, each name once, such as "
                            f"answer=label,problem=instruction")


@dataclass(frozen=True, kw_only=True)
class ContextFlags(Config):
    """Batches and steps"""

    context_parallel_size: Count = flag(1, """ranks that share each batch, every one with a part of its tokens and of
        what they take in memory, for long rows; they are to divide each rank's query heads""")


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags(SeedFlags, ContextFlags):
    """Optimizer"""

    lr: NonNegative = flag(1e-5, "peak learning rate of AdamW, whose betas are 0.9 and 0.95")
    schedule: Schedule = flag("cosine", "how the rate falls after it has risen")
    warmup_ratio: Share = flag(0.03, "share of all steps in which the rate rises")
    min_lr_ratio: Share = flag(0.1, """share of the peak rate that the last step has, unless the schedule is
        constant""")
    weight_decay: NonNegative = flag(0.0, "decay of weight matrices")
    max_grad_norm: Positive = flag(1.0, "gradients are clipped to this global norm")
    activation_checkpointing: Recomputed = flag("none", """what the backward pass computes again to save
        memory: nothing, feed-forwards, or all""")
    compile: bool = flag(False, """compile the model's blocks (torch.compile; a CPU needs a C++ compiler): a minute at
        the start, faster steps from then on, which round a little differently""")

    def __post_init__(self) -> None:
        """Raise UserError for shared batches compiled, and for the end of a rate that does not fall."""
        super().__post_init__()
        if self.schedule == "constant":
            self.refuse(("min_lr_ratio",), "--schedule constant keeps the rate at its peak")
        if self.compile and self.context_parallel_size > 1:
            raise UserError("--compile has not been tried with --context_parallel_size; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class LoraFlags(Config):
    """LoRA"""

    lora_rank: CountOrOff = flag(-1, "rank of LoRA adapters; -1 trains all weights")
    lora_alpha: Positive = flag(16.0, "adapters are scaled by lora_alpha / lora_rank")
    lora_targets: list[str] = flag(LINEARS, "linears that carry an adapter")
    rslora: bool = flag(False, "rank-stabilised LoRA: scale them by lora_alpha / sqrt(lora_rank)")
    dora: bool = flag(False, """DoRA: learn the lengths of the rows of adapted matrices apart from their directions;
        slower, most of all where the model also samples""")

    def __post_init__(self) -> None:
        """Raise UserError for what adapters should be like without adapters."""
        super().__post_init__()
        if self.lora_rank == -1:
            self.refuse(("lora_alpha", "lora_targets", "rslora", "dora", "lora_dropout"),
                        "--lora_rank -1 trains all weights, without adapters")


@dataclass(frozen=True, kw_only=True)
class SavingFlags(Config):
    """Saving and resuming"""

    eval_every: CountOrOff = flag(-1, "steps between measurements on held-out rows; -1 = after each epoch")
    save_every: CountOrOff = flag(-1, "steps between checkpoints to resume from; -1 = after each epoch")
    keep_last: Count = flag(1, "how many of those are kept")
    background_save: bool = flag(False, """write checkpoints to resume from while training goes on; a copy of
        what they hold is then in main memory until they are written""")
    resume: Resume = flag("none", "auto = go on from the newest complete one in save_dir, if there is one")
    save_dtype: StoredType = flag("", """type of the stored weights; default: as in ckpt_dir, or as computed in if
        that is finer (adapters: float32)""")

    def is_eval_due(self, n_done: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether held-out rows are measured after so many steps."""
        every = self.eval_every if self.eval_every > 0 else steps_per_epoch
        return n_done % every == 0 or n_done == total_steps


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Config):
    """The model"""

    model_type: str = flag("", """a family or released size the checkpoint must agree with; default: what
        params.json says""")
    precision: Precision = flag("", """type that models compute in, and that weights are held in unless they
        are trained: those, norms, softmax and losses stay float32. auto = bfloat16 on a GPU, and on a CPU that
        is measured to be faster in it; default: bfloat16 on a GPU, float32 on a CPU""")


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags(Config):
    """Tokenizer and chat template"""  # of what shows texts to a model

    tokenizer_file: str = flag("", "tokenizer of any kind; default: the one in the checkpoint's directory")
    chat_template: str = flag("", """form of prompts and answers: none, file (the tokenizer's own) or llama-2,
        llama-3, mistral, qwen, deepseek, gemma, internlm2, or code (solutions with code). Training records it
        for later commands; default: what the checkpoint was trained with, else none""")
    template_args: str = flag("", """values of the template's own variables, as enable_thinking=false or a json
        object; recorded and followed with it""")
    system_prompt: str = flag("", """the template's system message before every problem, and before
        conversations that have none; recorded and followed with it; none = no such message""")


@dataclass(frozen=True, kw_only=True)
class RunFlags(ModelFlags, SeedFlags, TokenizerFlags):
    """Batches and steps"""

    tensor_parallel_size: CountOrOff = flag(-1, """ranks that share one model; the others take other rows. -1
        = the shards of ckpt_dir, if they divide the ranks, else all ranks""")
    replicas: Count = flag(1, """copies of the weights that learn, of which each is shared by consecutive ranks: as
        many as machines, weights go over the network within one alone, and summed gradients between them""")
    max_batch_size: Count = flag(1, "rows in one forward pass")
    epochs: Count = flag(1, "passes over the training file")
    max_steps: CountOrOff = flag(-1, "stop after so many optimizer steps; -1 = after all epochs")
    trackers: list[str] = flag([], """where the metrics go besides metrics.jsonl: tensorboard, wandb:PROJECT[/NAME],
        trackio:PROJECT[/NAME], one or more; default: tensorboard, if it is installed""")


@dataclass(frozen=True, kw_only=True)
class AskedFlags(ModelFlags, TokenizerFlags):
    """How the solver is asked"""  # of what samples from a solver: a checkpoint in this process, or a server

    prompt_template: str = flag("", """text or file with {instruction} where the problem goes, \\n for a new
        line; default: the task's""")
    backend: Literal["engine", "openai"] = flag("engine", """engine = the checkpoint, in this process; openai
        = a server that speaks the OpenAI protocol. It gets the bare prompt as text; with tokenizer_file and
        chat_template the token ids of that form; with --chat_template server messages, which it puts in its
        own (/chat/completions)""")
    base_url: str = flag("", "the server's address up to /v1, for example http://localhost:8000/v1")
    model_name: str = flag("", "the model's name at the server")
    api_key_env: str = flag("", "name of the environment variable that holds the server's key")


@dataclass(frozen=True, kw_only=True)
class HeldOutFlags(Config):
    """Held-out rows"""

    label_file: str = flag("", "held-out rows in the same form; default: a share of the training rows")
    held_out: Share = flag(0.1, """share of the problems, the last ones, kept for evaluation when there is no
        label_file""")

    def __post_init__(self) -> None:
        """Raise UserError for a share of what is given whole."""
        super().__post_init__()
        if self.label_file:
            self.refuse(("held_out",), "--label_file has all held-out rows")


@dataclass(frozen=True, kw_only=True)
class CodeFlags(Config):
    """Solutions with code"""

    isolation: Literal["", "bubblewrap", "namespaces", "none"] = flag("", """what the code of solutions with
        code runs in; default: what this machine has; none = your own rights, under limits alone""")
    code_seconds: Positive = flag(6.0, """processor time that a block of code may take, rounded up, and twice as much by
        the clock""")


@dataclass(frozen=True, kw_only=True)
class RoundsFlags(CodeFlags):
    """Solutions with code"""

    max_rounds: Count = flag(24, "blocks of text and code at most in a solution with code (--chat_template code)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunFlags, OptimizerFlags, LoraFlags, SavingFlags, ColumnFlags):
    """Files and rows"""  # of the trainers that go over the rows of a file

    ckpt_dir: str = flag(help="checkpoint directory to start from")
    save_dir: str = flag(help="""directory for epoch-N checkpoints, the final one, metrics.jsonl, run.json, and the rows
        as ids (rows/, 4 bytes a token, and 8 a target of a verifier)""")
    max_seq_len: CountOrOff = flag(-1, """longest prompt + answer in tokens, at most the model's context; -1 =
        512, or that if it is less""")
    accumulation_steps: Count = flag(1, "forward passes in one optimizer step")
    packing: bool = flag(True, """lay the rows of a forward pass end to end instead of padding them; the
        update is the same""")
    optimizer: Literal["adamw", "adamw_8bit"] = flag("adamw", """AdamW with its moments in float32, or in 8
        bits (torchao), a quarter of their memory""")
    lora_dropout: Annotated[float, Bounds("0 or more and less than 1", lambda x: 0 <= x < 1)] = flag(0.0,
        "dropout before the adapters")
    quantize: Literal["", "bfloat16", "int8", "int4"] = flag("", """under LoRA hold the frozen weights in
        bfloat16, or in 8 or 4 bits in groups of 128 or 32 that share a scale; adapters stay float32. Default:
        float32""")

    def __post_init__(self) -> None:
        """Raise UserError for a base in few bits that is to be trained itself."""
        super().__post_init__()
        if self.quantize and self.lora_rank == -1:
            raise UserError(f"--quantize {self.quantize} holds weights that are not trained, but --lora_rank -1 trains "
                            f"all of them; give a --lora_rank, or leave --quantize out")
