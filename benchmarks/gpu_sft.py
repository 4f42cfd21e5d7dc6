"""Training speed of a random-weight Llama-2-7B on a GPU, LoRA and full, beside a plain transformers loop.

python benchmarks/gpu_sft.py

Samples of many lengths lie packed in passes of 4096 tokens. Ours is what solver_train.py runs; the other side is
AutoModelForCausalLM with sdpa attention, torch's fused AdamW and, for LoRA, peft: same weights, adapters, tokens, loss
and precision (bfloat16 products; full: of float32 weights; LoRA: on a bfloat16 base). They take turns (A B B A), each
with a new model; nothing is timed unless the log-probs of tokens and the first losses agree within tolerances.

Full training takes the most layers that memory.training_memory() sees fit into the card. MFU, as ThroughputMeter has
it, is 6 FLOP a weight and token, of the matrix rate measured in this run; frozen weights need 4 of the 6, so of LoRA's
figure about two thirds were done. Compiled means all of a layer for transformers. Ours compiles norms and
feed-forwards: a graph of its attention holds for one number of samples only; the trainers have no flag for it. Without
a GPU a tiny model runs in float32, which shows that the script works and nothing else.
"""

import dataclasses
import gc
import random
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a script's own folder is on the path, ours is not

from src import load, parallel
from src.checkpoint import shards
from src.checkpoint.convert import rotary_from_hf, to_hf_name
from src.command import cli
from src.command.config import LoraFlags, OptimizerFlags
from src.data.batch import Batch, make_batch
from src.data.encoding import Encoded
from src.data.sampler import Step
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.feedforward import FeedForward, RMSNorm
from src.models.forward import response_logprobs
from src.models.lora import LINEARS, LoraLinear
from src.models.quantize import quantize_weights
from src.runlog import RunLog
from src.training.memory import Training, training_memory
from src.training.optimizers import BETAS
from src.training.sft import n_supervised, sft_loss
from src.training.throughput import ThroughputMeter
from src.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

LLAMA_2_7B = ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=11008,
                         vocab_size=32000, max_seq_len=4096)  # fmt: skip
TINY = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=172, vocab_size=512,
                   max_seq_len=4096)  # fmt: skip
LORA = load.lora_config(LoraFlags(lora_rank=16, lora_alpha=32.0, lora_targets=list(LINEARS)))
LR, MAX_GRAD_NORM = 1e-4, 1.0
WARM_UP = 2  # steps of each turn that are not timed
GATE_STEPS = 3
# How far the sides may lie apart, in nats: the mean absolute difference of tokens' log-probs under equal weights, and
# the losses of GATE_STEPS eager steps on the same tokens. Losses alone show little: at random weights attention across
# samples moves them by chance, on the tiny model by 1e-5 to 1e-2, and its log-probs by 0.05 to 0.08 each.
TOKEN_TOLERANCE = {"bfloat16": 0.05, "float32": 1e-4}
LOSS_TOLERANCE = {"bfloat16": 0.05, "float32": 1e-4}
SHARE_OF_CARD = 0.9  # for the model; the rest is the allocator's and the other side's, whose logits are whole


class Side(NamedTuple):
    """A model in training. step: micro-batches, supervised tokens -> loss; logprobs: a batch -> [N] of those tokens."""

    step: Callable[[Sequence[Batch], int], float]
    logprobs: Callable[[Batch], Tensor]


class Case(NamedTuple):
    """What is trained, and how."""

    config: ModelConfig
    lora: bool
    checkpointing: Literal["none", "full"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are held."""
        return torch.bfloat16 if self.lora and on_gpu() else torch.float32


def on_gpu() -> bool:
    """Whether there is a GPU to measure."""
    return parallel.device().type == "cuda"


def drawn(name: str, shape: Sequence[int]) -> Tensor:
    """Random values for a parameter, a function of its name and shape alone: ones for a norm. -> float32."""
    if len(shape) == 1:
        return torch.ones(shape, device=parallel.device())
    generator = torch.Generator(parallel.device()).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, device=parallel.device()).normal_(0, 0.02, generator=generator)


def ours(case: Case, *, compiled: bool) -> Side:
    """The trainer's step on a new model."""
    with torch.device("meta"):
        model = Decoder(case.config, parallel.compute_dtype())
    tensors = {}
    for name, parameter in model.named_parameters():
        values = rotary_from_hf(name, drawn(to_hf_name(name), parameter.shape), case.config)
        tensors[name] = values.to(case.dtype)
    shards.assign(model, tensors, "the benchmark")
    if case.lora:
        if on_gpu():
            quantize_weights(model, "bfloat16", case.dtype)
        load.put_lora_on(model, LORA, seed=1)
        _draw_adapters(model)
    if compiled:
        for module in model.modules():
            if isinstance(module, FeedForward | RMSNorm):
                module.compile()
    with tempfile.TemporaryDirectory() as folder:
        flags = OptimizerFlags(lr=LR, schedule="constant", warmup_ratio=0.0, max_grad_norm=MAX_GRAD_NORM,
                               activation_checkpointing=case.checkpointing)  # fmt: skip
        trainer = Trainer(model, RunLog(folder, {}), flags, total_steps=1)
    model.train()

    def step(batches: Sequence[Batch], n_tokens: int) -> float:
        for batch in batches:
            trainer.backward(sft_loss(model, batch.to(parallel.device())) / n_tokens)
        return trainer.step().loss

    return Side(step, lambda batch: response_logprobs(model, *batch.to(parallel.device()).inputs))


def _draw_adapters(model: Decoder) -> None:
    """Give each A the values that it has on the other side too; each B is zero."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            weight = module.lora_a.weight
            weight.data.copy_(drawn(to_hf_name(f"{name}.weight") + "/A", weight.shape))


def theirs(case: Case, *, compiled: bool) -> Side:
    """A plain loop over transformers' model and loss."""
    model = _their_model(case, compiled=compiled)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)

    def forward(batch: Batch, **options: object) -> "ModelOutput":
        positions = torch.cat([torch.arange(length) for length in batch.lengths])[None]
        with torch.autocast(parallel.device().type, torch.bfloat16, enabled=parallel.device().type == "cuda"):
            return model(
                batch.tokens, position_ids=positions.to(batch.tokens.device), use_cache=False, **options
            )

    def step(batches: Sequence[Batch], n_tokens: int) -> float:
        total = torch.zeros((), device=parallel.device())
        for batch in batches:
            batch = batch.to(parallel.device())
            labels = batch.tokens.masked_fill(~batch.response_mask, -100)
            loss = forward(batch, labels=labels, num_items_in_batch=n_tokens).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    def logprobs(batch: Batch) -> Tensor:
        batch = batch.to(parallel.device())
        found = forward(batch).logits[:, :-1].float().log_softmax(-1)
        return found.gather(-1, batch.tokens[:, 1:, None])[..., 0][batch.response_mask[:, 1:]]

    return Side(step, logprobs)


def _their_model(case: Case, *, compiled: bool) -> nn.Module:
    """transformers' Llama, with peft's adapters under LoRA, holding the values that ours() draws."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    own = case.config
    config = LlamaConfig(
        hidden_size=own.dim, intermediate_size=own.ffn_dim, num_hidden_layers=own.n_layers,
        num_attention_heads=own.n_heads, num_key_value_heads=own.n_kv_heads, vocab_size=own.vocab_size,
        max_position_embeddings=own.max_seq_len, rms_norm_eps=own.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(parallel.device()):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=case.dtype)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(drawn(name, parameter.shape))
    if case.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    if case.lora:
        lora = peft.LoraConfig(
            r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                plain = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                parameter.data.copy_(drawn(plain + "/A", parameter.shape))
    return model.train()


SIDES = {"ours": ours, "transformers": theirs}


def packed_steps(config: ModelConfig, n_steps: int, passes: int, n_tokens: int) -> list[Step]:
    """Steps of `passes` batches: one row of samples laid end to end, all but the first token of each learnt."""
    rng = random.Random(7)

    def batch() -> Batch:
        samples, left = [], n_tokens
        while left:
            drawn_length = int(n_tokens / 8 * rng.lognormvariate(0, 0.5))
            length = left if left - drawn_length < 2 else max(2, drawn_length)
            samples.append(Encoded([rng.randrange(config.vocab_size) for _ in range(length)], 1))
            left -= length
        return make_batch(samples, packing=True)

    return [Step(1, number + 1, [batch() for _ in range(passes)]) for number in range(n_steps)]


def run(
    side: str, case: Case, steps: Sequence[Step], meter: ThroughputMeter, *, compiled: bool
) -> list[dict[str, float]]:
    """What the meter says of each step of a new model."""
    step = SIDES[side](case, compiled=compiled).step
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _, _, batches in meter.timed(iter(steps)):
        n_learnt = n_supervised(batches)
        step(batches, n_learnt)
        found.append(meter.measure(batches, n_learnt))
    del step
    free()
    return found


def free() -> None:
    """Give back what models that are gone have held."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


class Seen(NamedTuple):
    """What the gate compares: log-probs [N] of the first batch's tokens, and the first losses."""

    logprobs: Tensor
    losses: list[float]


def seen(side: str, case: Case, batches: Sequence[Batch]) -> Seen:
    """The gate's view of a new model, eager, on the batches of one step."""
    own = SIDES[side](case, compiled=False)
    with torch.no_grad():
        logprobs = own.logprobs(batches[0])
    losses = [own.step(batches, n_supervised(batches)) for _ in range(GATE_STEPS)]
    del own
    free()
    return Seen(logprobs, losses)


def gaps(one: Seen, other: Seen) -> tuple[float, float]:
    """How far two sides lie apart, nats: the mean over tokens, and the largest of the losses."""
    pairs = zip(one.losses, other.losses, strict=True)
    return (one.logprobs - other.logprobs).abs().mean().item(), max(
        abs(left - right) for left, right in pairs
    )


def deepest(case: Case, n_tokens: int, passes: int) -> Case:
    """The case with as many layers as fit into the card; on a CPU with all of them."""
    if not on_gpu():
        return case
    room = SHARE_OF_CARD * torch.cuda.get_device_properties(parallel.device()).total_memory
    how = Training(LORA if case.lora else None, "bfloat16" if case.lora else "", case.checkpointing,
                   accumulates=passes > 1, on_gpu=True, half=True)  # fmt: skip
    for n_layers in range(case.config.n_layers, 1, -1):
        shallower = case._replace(config=dataclasses.replace(case.config, n_layers=n_layers))
        if sum(training_memory(shallower.config, 1, n_tokens, how).values()) <= room:
            return shallower
    return case._replace(config=dataclasses.replace(case.config, n_layers=1))


def compare(case: Case, steps: Sequence[Step], repeats: int, ways: Sequence[bool]) -> None:
    """Print the parity of a case and, where it holds, a line for each side, eager and compiled."""
    meter = ThroughputMeter(case.config)
    by_token, by_loss = gaps(*(seen(side, case, steps[0].batches) for side in SIDES))
    precision = "bfloat16" if on_gpu() else "float32"
    allowed = TOKEN_TOLERANCE[precision], LOSS_TOLERANCE[precision]
    print(f"{'LoRA' if case.lora else 'full'}, {case.config.n_layers} layers, activation checkpointing "
          f"{case.checkpointing}: matrix rate {meter.peak / 1e12:.3g} TFLOP/s; apart by {by_token:.1e} nats a token "
          f"(at most {allowed[0]:g}), by {by_loss:.1e} in the first {GATE_STEPS} losses (at most {allowed[1]:g})",
          flush=True)  # fmt: skip
    if not (by_token <= allowed[0] and by_loss <= allowed[1]):
        print("  no comparison")
        return
    runs = [(side, compiled) for compiled in ways for side in SIDES]
    found: dict[tuple[str, bool], list[dict[str, float]]] = {key: [] for key in runs}
    for turn in range(repeats):
        for side, compiled in runs if turn % 2 == 0 else reversed(runs):
            found[side, compiled] += run(side, case, steps, meter, compiled=compiled)[WARM_UP:]
    for side, compiled in runs:
        rate, mfu = (statistics.median(row[name] for row in found[side, compiled])
                     for name in ("tokens_per_second", "mfu"))  # fmt: skip
        peak = max(row["peak_memory"] for row in found[side, compiled]) / 2**30
        shares = (
            f"  MFU {mfu:6.1%}  peak {peak:5.1f} GiB" if on_gpu() else ""
        )  # the tiny model's would mislead
        print(f"  {side:13} {'compiled' if compiled else 'eager':9} {rate:9.0f} tokens/s{shares}", flush=True)


def main(
    steps: int = 6,
    passes: int = 4,
    n_tokens: int = -1,
    repeats: int = 2,
    layers: int = -1,
    activation_checkpointing: Literal["none", "full"] = "none",
    compiled: bool = True,
) -> None:
    """Print the table.

    steps: timed optimizer steps of each turn
    passes: forward and backward passes of a step
    n_tokens: of a pass; -1 = 4096 on a GPU, 256 on a CPU
    repeats: turns of each side
    layers: of the model; -1 = as many of Llama-2-7B's 32 as fit
    activation_checkpointing: whether both sides compute layers again in the backward pass
    compiled: on a GPU measure compiled layers too
    """
    parallel.start()
    n_tokens = (4096 if on_gpu() else 256) if n_tokens == -1 else n_tokens
    print(f"{torch.cuda.get_device_name()}, bfloat16" if on_gpu() else
          "no GPU: a tiny float32 model on the CPU, eager only", flush=True)  # fmt: skip
    for lora in (True, False):
        case = Case(LLAMA_2_7B if on_gpu() else TINY, lora, activation_checkpointing)
        if layers == -1:
            case = deepest(case, n_tokens, passes)
        else:
            case = case._replace(config=dataclasses.replace(case.config, n_layers=layers))
        data = packed_steps(case.config, WARM_UP + steps, passes, n_tokens)
        compare(case, data, repeats, [False, True] if compiled and on_gpu() else [False])


if __name__ == "__main__":
    cli.run(main)
