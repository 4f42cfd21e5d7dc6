"""What benchmarks/gpu.py measures of models that are made in place: shapes, clocks, decoding, training, scoring."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from src import load, parallel
from src.checkpoint import shards
from src.command.config import LoraFlags, OptimizerFlags
from src.data.batch import Batch, Step, make_batch
from src.data.encoding import Encoded
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.forward import response_logprobs, response_scores
from src.models.quantize import quantize_weights
from src.planning.memory import Training, training_memory
from src.processes import heap
from src.runlog import RunLog
from src.training.run import ThroughputMeter, matrix_rate
from src.training.sft import n_supervised, sft_loss
from src.training.trainer import Trainer

Found = Iterator[tuple[str, dict[str, float | str]]]  # what was done, and figures by name


class Size(NamedTuple):
    """Shapes as transformers names them, and how much of each part is done."""

    large: dict[str, int]
    middle: dict[str, int]
    small: dict[str, int]
    rows: tuple[int, ...]  # that decode at once
    new_tokens: int
    pack: int
    greedy: int  # tokens compared
    problems: int


def shape(width: int, inner: int, layers: int, heads: int, kv_heads: int, words: int) -> dict[str, int]:
    """A Llama's sizes."""
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 4096}


SIZES = {
    "llama-2-7b": Size(shape(4096, 11008, 32, 32, 32, 32000), shape(2048, 5632, 22, 32, 4, 32000),
                       shape(576, 1536, 30, 9, 3, 49152), (1, 32, 128, 384), 128, 4096, 500, 64),
    "tiny": Size(*[shape(64, 172, 2, 4, 2, 640)] * 3, (1, 3), 8, 128, 12, 4),
}
LORA = LoraFlags(lora_rank=16)
HALF = torch.bfloat16


def on_gpu() -> bool:
    """Whether there is a GPU to measure."""
    return parallel.device().type == "cuda"


def wait() -> None:
    """Until the device has done all that it was given."""
    if on_gpu():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Time of the second of two calls; the first warms up and compiles."""
    for _ in range(2):
        wait()
        began = time.perf_counter()
        run()
        wait()
    return time.perf_counter() - began


def free() -> None:
    """Give back what models that are gone have held, and forget the peak."""
    gc.collect()
    heap.release_memory()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(2**30 if on_gpu() else 2**24, dtype=torch.uint8, device=parallel.device())
    target = torch.empty_like(source)
    return 2 * len(source) * 10 / seconds(lambda: [target.copy_(source) for _ in range(10)])


def config_of(sizes: dict[str, int]) -> ModelConfig:
    """The same shape as our models are told of it."""
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
             "n_kv_heads": "num_key_value_heads", "ffn_dim": "intermediate_size", "vocab_size": "vocab_size",
             "max_seq_len": "max_position_embeddings"}
    config = {ours: sizes[theirs] for ours, theirs in names.items()}
    return ModelConfig(head_dim=config["dim"] // config["n_heads"], **config)


def random_model(config: ModelConfig, held: torch.dtype) -> Decoder:
    """A model that computes in bfloat16 on weights held in this type."""
    with torch.device("meta"):
        model = Decoder(config, HALF)
    tensors = {name: torch.empty(each.shape, dtype=held, device=parallel.device()).normal_(0, 0.02)
               for name, each in model.named_parameters()}
    shards.assign(model, tensors, "the benchmark")
    return model


def random_rows(n: int, length: int, words: int) -> Batch:
    """Rows [n, length] of which all but the first token is learnt."""
    rows = torch.randint(0, words, (n, length), generator=torch.Generator().manual_seed(n)).tolist()
    return make_batch([Encoded(row, 1) for row in rows])


def their_model(sizes: dict[str, int], dtype: torch.dtype = HALF) -> torch.nn.Module:
    """transformers' model of a shape, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(parallel.device()):
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).to(dtype)


def decode(place: Path, size: Size) -> Found:
    """Tokens a second; of the memory's rate: the weights and the rows' keys and values, read once a step."""
    rate, config = copy_rate(), config_of(size.large)
    yield "a large copy", {"GB/s": rate / 1e9}
    peers: dict[int, float] = {}
    theirs = their_model(size.large).eval()
    for n in size.rows[:2]:
        tokens = torch.full((n, 32), 7, device=parallel.device())
        peers[n] = n / per_step(size, lambda new, theirs=theirs, tokens=tokens: theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0))
        yield f"transformers' generate(), {n} rows", {"tokens/s": peers[n]}
    del theirs
    free()
    for precision in ("", "int8", "int4"):
        model = random_model(config, HALF)
        if precision:
            quantize_weights(model, precision, HALF)
        for n, compiled in [(n, way) for way in (False, True) for n in size.rows if n == 1 or not way]:
            prompts = [[1 + (row + place) % 99 for place in range(32 + 97 * row % 256)] for row in range(n)]
            requests = [Request(str(row), 0, prompt) for row, prompt in enumerate(prompts)]
            took = per_step(size, lambda new, n=n, requests=requests, compiled=compiled, model=model: list(generate(
                model, requests, Sampling(max_new_tokens=new), vocabulary=Vocabulary((), config.vocab_size, str),
                max_batch_size=n, compiled=compiled)))
            held = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
            cached = 4 * config.n_layers * config.n_kv_heads * config.head_dim * sum(map(len, prompts))
            yield f"{precision or 'bfloat16'}, {n} rows, {'graphs' if compiled else 'eager'}", {
                "tokens/s": n / took, "of the copy's rate": (held + cached) / took / rate,
                "of transformers'": n / took / peers[n] if n in peers else float("nan")}
        del model
        free()


def per_step(size: Size, run: Callable[[int], object]) -> float:
    """Seconds a step: a long decoding less a short one, so that the prompts' reading drops out."""
    short = size.new_tokens // 4
    return (seconds(lambda: run(size.new_tokens)) - seconds(lambda: run(short))) / (size.new_tokens - short)


def packed_step(size: Size, words: int, number: int) -> Step:
    """One row of samples of unequal lengths, end to end."""
    lengths, generator = [], torch.Generator().manual_seed(number)
    while sum(lengths) < size.pack:
        lengths.append(int(torch.randint(size.pack // 16, size.pack // 4, (), generator=generator)))
    lengths[-1] -= sum(lengths) - size.pack
    tokens = torch.randint(0, words, (size.pack,), generator=generator)
    parts = [part.tolist() for part in tokens.split(lengths)]
    return Step(1, number, [make_batch([Encoded(part, 1) for part in parts if part], packing=True)])


def train(place: Path, size: Size) -> Found:
    """Tokens a second and MFU of steps of one pass, with the peak beside what --dry_run says."""
    config = config_of(size.large)
    meter, steps = ThroughputMeter(config, HALF), [packed_step(size, config.vocab_size, n) for n in range(1, 7)]
    yield "a product of large matrices", {"TFLOP/s": meter.peak / 1e12}
    ways = (False, True) if on_gpu() else (False,)  # the compiler of C++ would take minutes for nothing
    for checkpointing, compiled in itertools.product(("none", "full", "selective"), ways):
        for lora in (load.lora_config(LORA), None):
            kind = f"{'LoRA' if lora else 'full'}, {'compiled' if compiled else 'eager'}"
            what = f"{kind}, computed again: {checkpointing}"
            how = Training(lora, checkpointing=checkpointing, on_gpu=on_gpu(), half=True)
            planned = sum(training_memory(config, 1, size.pack, how).values())
            if on_gpu() and planned > 0.95 * torch.cuda.get_device_properties(0).total_memory:
                yield what, {"planned GiB": planned / 2**30, "left out": "more than the card has"}
                continue
            model = random_model(config, HALF if lora else torch.float32)
            load.put_lora_on(model, lora, 1)
            flags = OptimizerFlags(activation_checkpointing=checkpointing, compile=compiled)
            trainer = Trainer(model.train(), RunLog(str(place), {}), flags, total_steps=len(steps))

            def learn(batch: Batch, n: int, model: Decoder = model, trainer: Trainer = trainer) -> None:
                trainer.backward(sft_loss(model, batch) / n)
                trainer.step()

            yield what, timed_steps(meter, steps, learn) | {"planned GiB": planned / 2**30}
            del model, trainer, learn
            free()
        if (checkpointing, compiled) == ("none", False):
            yield "transformers and peft, LoRA, eager", timed_steps(meter, steps, their_lora(size.large))
            free()


def timed_steps(meter: ThroughputMeter, steps: list[Step], learn: Callable[[Batch, int], None]) -> dict[str, float]:
    """What the last three steps were, in the middle."""
    found = []
    for step in meter.timed(iter(steps)):
        n = n_supervised(step.batches)
        learn(step.batches[0], n)
        found.append(meter.measure(step.batches, n))
    row = sorted(found[-3:], key=lambda each: each["step_seconds"])[1]
    return {"tokens/s": row["tokens_per_second"], "MFU": row["mfu"], "peak GiB": row["peak_memory"] / 2**30}


def their_lora(sizes: dict[str, int]) -> Callable[[Batch, int], None]:
    """A step of transformers with peft's adapters and torch's fused AdamW, samples kept apart by their positions."""
    import peft

    model = peft.get_peft_model(their_model(sizes), peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def learn(batch: Batch, n: int) -> None:
        tokens = batch.tokens.to(parallel.device())
        places = torch.cat([torch.arange(length) for _, length in batch.lengths])[None].to(parallel.device())
        labels = tokens.masked_fill(~batch.response_mask.to(parallel.device()), -100)
        model(tokens, position_ids=places, labels=labels, use_cache=False, num_items_in_batch=n).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait()

    return learn


def score(place: Path, size: Size) -> Found:
    """Tokens a second of rows that are only read, and of the matrix rate: 2 FLOP a weight and token."""
    config, rate = config_of(size.large), matrix_rate(HALF)
    batch = random_rows(8, size.pack // 8, config.vocab_size)
    for what, value_head in (("a verifier's scores", True), ("a reference's log-probs", False)):
        model = random_model(load.solver_to_verifier(config) if value_head else config, HALF).eval()
        n_weights = sum(each.numel() for each in model.linear_weights())
        with torch.no_grad():
            compute = response_scores if value_head else response_logprobs
            took = seconds(lambda compute=compute, model=model: compute(model, *batch.inputs))
        n = batch.tokens.numel()
        yield what, {"tokens/s": n / took, "of the matrix rate": 2 * n_weights * n / took / rate}
        del model
        free()
    theirs = their_model(size.large).eval()
    with torch.no_grad():
        took = seconds(lambda: theirs.model(batch.tokens.to(parallel.device()), use_cache=False))
    yield "transformers' forward, no output layer", {"tokens/s": batch.tokens.numel() / took}
