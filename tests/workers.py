"""What the ranks of a test compute; each function runs under tests.ranks.run_ranks() and returns tensors.

They import nothing heavier than src: every rank pays for it.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from src import load, parallel
from src.checkpoint import saving, shards
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.command.config import LoraFlags, OptimizerFlags
from src.data.batch import Batch
from src.errors import UserError
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models import forward
from src.models.cache import KVCache, PromptCache, n_positions
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.forward import vocab_entropy, vocab_gradient, vocab_logprobs
from src.models.layers import ParallelEmbedding
from src.models.lora import LINEARS, LoraConfig
from src.runlog import RunLog
from src.training.sft import n_supervised, sft_loss
from src.training.trainer import Trainer

# Longer than a block of the cache.
LONG_ROW = torch.arange(75) * 7 % 61


def all_logits(model: Decoder, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of right-padded rows, without gradient."""
    with torch.no_grad():
        return parallel.gather_vocab(model.logits(model(tokens)))[..., : model.config.vocab_size]


def gradients(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    """This rank's gradients of the SFT loss, by parameter."""
    model.zero_grad(set_to_none=True)
    (sft_loss(model, batch) / n_supervised([batch])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def decoders(
    folders: dict[str, str], tokens: list[list[int]], mask: list[list[bool]], cached: list[str]
) -> dict[str, object]:
    """Logits, SFT gradients and a step of several checkpoints, and cached decoding of those named in `cached`."""
    batch = Batch(torch.tensor(tokens), torch.tensor(mask))
    log = RunLog(f"{next(iter(folders.values()))}-log", {})
    results = {}
    for name, folder in folders.items():
        model = load.load_solver(folder)
        results[name] = {
            "logits": all_logits(model, batch.tokens),
            "gradients": gradients(model, batch),
            "cached": cached_logprobs(model) if name in cached else {},
            "stepped": one_step(model, batch, log),
            "adapted": freshly_adapted(model, batch.tokens) if name in cached else {},
        }
    return results


def freshly_adapted(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Logits [B, S, V] of a model, and with fresh adapters on every linear that can have one, which add nothing."""
    targets = LINEARS[:4] if model.config.n_experts else LINEARS
    before = all_logits(model, tokens)
    load.put_lora_on(model, LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=targets), seed=1)
    return {"before": before, "after": all_logits(model, tokens)}


def one_step(model: Decoder, batch: Batch, log: RunLog) -> dict[str, object]:
    """The gradient's norm and this rank's weights after one optimizer step."""
    model.zero_grad(set_to_none=True)
    trainer = Trainer(model, log, OptimizerFlags(lr=0.01, warmup_ratio=0.0), total_steps=1)
    trainer.backward(sft_loss(model, batch) / n_supervised([batch]))
    return {"grad_norm": trainer.step().grad_norm, "weights": adapter_tensors(model)}


@torch.no_grad()
def cached_logprobs(model: Decoder) -> dict[str, Tensor]:
    """Log-probs [S, V] of one row of 75 tokens, computed in every way there is.

    Rows of 64 positions change their bucket on the way. `plain` is the reference for all.
    """
    row = LONG_ROW
    other = torch.arange(120) * 5 % 61

    def logprobs(hidden: Tensor) -> Tensor:
        return parallel.gather_vocab(model.logits(hidden)).log_softmax(-1)

    padded = torch.zeros(3, 120, dtype=torch.int64)
    padded[0, :90], padded[1, :75], padded[2] = other[:90], row, other
    return {
        "plain": logprobs(model(row[None]))[0],
        "padded": logprobs(model(padded))[1, :75],
        "packed": logprobs(model(torch.cat((other[:30], row))[None], lengths=((0, 30), (0, 75))))[0, 30:],
        "token by token": logprobs(_token_by_token(model, row, KVCache(1))),
        "among others": logprobs(_among_others(model, row, other)),
        "after a prefix": logprobs(_after_prefix(model, row, other)),
    }


def _read(model: Decoder, cache: KVCache, prompts: dict[int, Tensor]) -> Tensor:
    """Put each slot's prompt into the cache, all read in one batch. -> hidden states [B, S, D]."""
    read, start = PromptCache(cache.prefix), n_positions(cache.prefix)
    tokens = nn.utils.rnn.pad_sequence(list(prompts.values()), batch_first=True)
    hidden = model(tokens, torch.arange(start, start + tokens.shape[1]).expand_as(tokens), read)
    for index, (slot, prompt) in enumerate(prompts.items()):
        cache.admit([slot], read.row(index, len(prompt)))
    return hidden


def _step(model: Decoder, cache: KVCache, sequences: dict[int, Tensor]) -> dict[int, Tensor]:
    """Feed every slot its sequence's next token. -> hidden state [1, D] by slot."""
    starts, positions = cache.lengths.copy(), cache.advance()
    tokens = torch.stack([sequences[slot][starts[slot]] for slot in cache.slots()])
    return dict(zip(cache.slots(), model(tokens[:, None], positions, cache), strict=True))


def _token_by_token(model: Decoder, row: Tensor, cache: KVCache) -> Tensor:
    """Hidden states [S, D] of a row of which only the first token is read as a prompt."""
    outputs = [_read(model, cache, {0: row[:1]})[0]]
    outputs += [_step(model, cache, {0: row})[0] for _ in range(len(row) - 1)]
    return torch.cat(outputs)


def _among_others(model: Decoder, row: Tensor, other: Tensor) -> Tensor:
    """Hidden states [S, D] of `row` decoded among rows of other lengths that come, outgrow buckets and leave."""
    cache = KVCache(4)
    sequences = {0: other, 1: row, 2: other[20:], 3: other[5:]}
    outputs = [_read(model, cache, {0: other[:11], 1: row[:4], 2: other[20:29]})[1, :4]]

    def steps(n: int) -> None:
        outputs.extend(_step(model, cache, sequences)[1] for _ in range(n))

    steps(2)
    cache.release(0)  # another row takes its place
    steps(1)
    _read(model, cache, {3: other[5:85]})  # into the next bucket, which our row enters later
    _read(model, cache, {0: other[:62]})  # leaves its bucket after two steps
    steps(5)
    cache.release(2)
    steps(30)
    cache.release(3)
    cache.release(0)
    _read(model, cache, {2: other[:63], 3: other[:2]})
    sequences[2], sequences[3] = other, other
    steps(len(row) - 42)
    return torch.cat(outputs)


def _after_prefix(model: Decoder, row: Tensor, other: Tensor) -> Tensor:
    """Hidden states [S, D] of `row`, whose beginning another row shares, which outgrows its bucket."""
    prefix, cache = PromptCache(), KVCache(2)
    outputs = [model(row[None, :40], cache=prefix)[0]]
    cache.prefix = prefix.row(0, 40)
    sequences = {0: row[40:], 1: other}
    outputs.append(_read(model, cache, {0: row[40:50], 1: other[:62]})[0, :10])
    outputs += [_step(model, cache, sequences)[0] for _ in range(len(row) - 50)]
    return torch.cat(outputs)


def fill_lora_b(model: Decoder) -> None:
    """Give every adapter's B values, and change DoRA's lengths: drawn whole and cut, so alike at every
    tensor-parallel size."""
    generator = torch.Generator().manual_seed(3)
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b.weight", "lora_m.weight")):
            how = shards.cut_of(name, model.config, n)
            rows = parameter.shape[0] if how.dim is None else how.size
            values = shards.cut(torch.randn(rows, *parameter.shape[1:], generator=generator), how, rank) / 10
            parameter.data.copy_(values if name.endswith("lora_b.weight") else parameter.data * (1 + values))


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """A copy of this rank's trainable tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def lora(
    folder: str, save_dir: str, tokens: list[list[int]], mask: list[list[bool]], dora: bool
) -> dict[str, object]:
    """The life of an adapter, of DoRA one that is rank-stabilised too: put on, differentiated, trained for a step,
    saved, merged in three ways."""
    batch = Batch(torch.tensor(tokens), torch.tensor(mask))
    flags = LoraFlags(lora_rank=4, lora_alpha=6.0, lora_targets=list(LINEARS), rslora=dora, dora=dora)
    config, model = load.lora_config(flags), load.load_solver(folder)
    results: dict[str, object] = {"base": all_logits(model, batch.tokens)}
    load.put_lora_on(model, config, seed=5)
    results["initial"] = all_logits(model, batch.tokens)
    results["adapters"] = adapter_tensors(model)
    fill_lora_b(model)
    results["filled"] = adapter_tensors(model)
    results["gradients"] = gradients(model, batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    optimizer.step()
    after = dict(model.named_parameters())
    results["base_unchanged"] = len(before) > 0 and all(
        torch.equal(before[name], after[name]) for name in before
    )
    results["trained_adapters"] = adapter_tensors(model)
    results["trained"] = all_logits(model, batch.tokens)
    saving.begin_save(model, save_dir, folder, lora=config).complete()
    results["loaded"] = all_logits(load.load_solver(save_dir), batch.tokens)
    if parallel.rank() == 0:
        source = open_source(save_dir)
        split(source, Path(f"{save_dir}-merged"), parallel.world_size(), save_dir)
    parallel.barrier()
    results["merged"] = all_logits(load.load_solver(f"{save_dir}-merged"), batch.tokens)
    for name, path in ("loaded_bfloat16", save_dir), ("merged_bfloat16", f"{save_dir}-merged"):
        results[name] = dict(load.load_solver(path, precision="bfloat16").named_parameters())
    results["dropout"] = dropout_logits(folder, batch.tokens)
    results["verifier"] = verifier_scores(folder, f"{save_dir}/../verifier", batch.tokens)
    return results


def dropout_logits(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of a model with heavily dropping adapters in both modes, and without dropout."""
    results = {}
    for name, dropout in ("without", 0.0), ("eval", 0.5), ("train", 0.5):
        model = load.load_solver(folder)
        load.put_lora_on(model, LoraConfig(rank=4, alpha=6.0, dropout=dropout, targets=LINEARS), seed=5)
        fill_lora_b(model)
        model.train(name == "train")
        parallel.seed_all(1)
        results[name] = all_logits(model, tokens)
    return results


def verifier_scores(folder: str, save_dir: str, tokens: Tensor) -> dict[str, Tensor]:
    """Scores of a verifier before and after its adapters and value head went to disk and back."""
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq", "w2"))
    verifier = load.load_verifier(folder, from_solver=True)
    load.put_lora_on(verifier, config, seed=5)
    fill_lora_b(verifier)
    nn.init.normal_(verifier.v_head.weight, generator=torch.Generator().manual_seed(4))
    saving.begin_save(verifier, save_dir, folder, lora=config).complete()
    with torch.no_grad():
        return {
            name: model.scores(model(tokens))
            for name, model in (("saved", verifier), ("loaded", load.load_verifier(save_dir)))
        }


def vocabulary_and_layers(n_rows: int, vocab_size: int) -> dict[str, object]:
    """Vocabulary-parallel log-probs and entropy of random logits with their gradients, and refused layer sizes."""
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    logits, targets, weights = random_vocabulary(n_rows, vocab_size)
    columns = shards.Cut(
        1, vocab_size, tuple(parallel.padded_share(vocab_size, n, index) for index in range(n))
    )
    local, huge = (shards.cut(scaled, columns, rank) for scaled in (logits, logits * 1e4))
    (found, logprobs), (huge_found, huge_logprobs) = (vocab_logprobs(each, targets) for each in (local, huge))
    entropy, nothing = vocab_entropy(found), torch.zeros_like(logprobs)
    gathered = shards.cut(logits, columns, rank).requires_grad_()
    (parallel.gather_vocab(gathered) * logits).sum().backward()
    with torch.device("meta"):
        model = Decoder(CONFIG)
    return {
        "logprobs": logprobs,
        "gradient": vocab_gradient(found.clone(), targets, entropy, weights, None),
        "huge": huge_logprobs,
        "none": vocab_logprobs(local[:0], targets[:0])[1],
        "entropy": entropy,
        "entropy_gradient": vocab_gradient(found, targets, entropy, nothing, weights),
        "huge_entropy": vocab_entropy(huge_found),
        "gathered": parallel.gather_vocab(local),
        "gathered_gradient": gathered.grad,
        "shapes": {name: list(p.shape) for name, p in model.named_parameters() if p.is_meta},
        "refusal": refusal(2 * n + 1),
        "sum": parallel.sum_over_tensor_parallel(torch.tensor([1.0 + rank])),
        "from_first": parallel.broadcast_from_first(torch.tensor([1.0 + rank])),
        "draw": torch.rand(3),
    }


def random_vocabulary(n_rows: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V], a target id for each row and a weight for each row's log-prob; the same wherever called."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(n_rows, vocab_size, generator=generator) * 3,
        torch.randint(vocab_size, (n_rows,), generator=generator),
        torch.randn(n_rows, generator=generator),
    )


CONFIG = ModelConfig(
    dim=16, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=24, vocab_size=32, max_seq_len=8
)


def refusal(width: int) -> str:
    """The message with which an embedding cut along this width is refused; empty if it is not."""
    try:
        ParallelEmbedding(4, width)
    except UserError as error:
        return str(error)
    return ""


# Every way of drawing a token, as settings of Sampling.
WAYS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 1.5, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 5},
    "min_p": {"temperature": 2.0, "min_p": 0.05},
    "all": {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "logit_bias": {7: 2.0, 40: -1e9}},
}


def completions(folder: str, requests: list[tuple[str, int, list[int]]]) -> dict[str, dict[str, list[int]]]:
    """Tokens by way of drawing, then by "id/sample", as this rank has them."""
    model = load.load_solver(folder)
    results = {}
    for way, settings in WAYS.items():
        sampling = Sampling(**{"max_new_tokens": 24, "seed": 3} | settings)
        found = generate(
            model,
            [Request(*request) for request in requests],
            sampling,
            vocabulary=Vocabulary((2,), 60, str),
            max_batch_size=4,
        )
        results[way] = {f"{done.request.id}/{done.request.sample}": done.tokens for done in found}
    return results


def weight_bytes(model: torch.nn.Module) -> int:
    """Memory of a model's parameters and buffers on this rank."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def quantised_logits(
    folder: str, texts: list[list[int]], precisions: list[str]
) -> dict[str, tuple[list[Tensor], float]]:
    """By precision: logits [S, V] of each text, and the weights' memory as a share of float32's on this rank."""
    whole = weight_bytes(load.load_solver(folder))
    found = {}
    for precision in precisions:
        model = load.load_solver(folder, quantize=precision)
        logits = [all_logits(model, torch.tensor([text]))[0] for text in texts]
        found[precision] = logits, weight_bytes(model) / whole
    return found


def kept_shapes(model: Decoder, batch: Batch) -> list[list[int]]:
    """Shapes of the tensors that the SFT loss keeps for its backward pass."""
    shapes: list[list[int]] = []

    def keep(x: Tensor) -> Tensor:
        shapes.append(list(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sft_loss(model, batch) / n_supervised([batch])
    return shapes


# without w3, so that one linear of the base carries none
ADAPTERS = LoraConfig(rank=4, alpha=6.0, dropout=0.0, targets=("wq", "wk", "wv", "wo", "w1", "w2"))


def quantised_lora(
    folder: str, save_dir: str, tokens: list[list[int]], mask: list[list[bool]], precisions: list[str]
) -> dict[str, dict[str, object]]:
    """By precision: gradients of adapters on a frozen base in few bits, and that base's weights made dense.

    Also the shapes of what the graph keeps for the backward pass, the weights' memory, and the logits of the float32
    base with these adapters, put on it in memory and loaded from the directory that was saved.
    """
    batch = Batch(torch.tensor(tokens), torch.tensor(mask))
    config = ADAPTERS
    found = {}
    for precision in precisions:
        models = {
            "": load.load_solver(folder),
            precision: load.load_solver(folder, quantize=precision),
        }
        for model in models.values():
            load.put_lora_on(model, config, seed=5)
            fill_lora_b(model)
        model = models[precision]
        saving.begin_save(model, f"{save_dir}/{precision}", folder, lora=config).complete()
        found[precision] = {
            "kept": kept_shapes(model, batch),
            "bytes": weight_bytes(model),
            "gradients": gradients(model, batch),
            "dense": {
                name.removesuffix(".matrix").removesuffix(".base") + ".weight": module.dense()
                for name, module in model.named_modules()
                if name.endswith(".matrix")
            },
            "adapted": all_logits(models[""], batch.tokens),
            "loaded": all_logits(load.load_solver(f"{save_dir}/{precision}"), batch.tokens),
        }
    return found


# What attention can be: windows and a softcap over shared key heads; norms of heads; one key head and experts.
KINDS_OF_ATTENTION = {
    "windows": {"windows": (3, 0), "attention_softcap": 5.0, "logit_softcap": 9.0, "n_kv_heads": 2},
    "norms": {"qk_norm": True, "qkv_bias": True, "n_kv_heads": 4, "partial_rotary_factor": 0.5},
    "experts": {"n_experts": 3, "n_active_experts": 2, "n_kv_heads": 1},
    "mean": {"qk_norm_whole": True, "n_kv_heads": 2, "score": "mean"},
}


def shared_positions() -> dict[str, dict[str, Tensor]]:
    """By kind of attention and layout of a batch: all that is read of a model, and the gradient of a loss of it all,
    summed over the ranks that share the batch. Each model is whole on each rank."""
    tokens, mask = torch.arange(33).view(3, 11) * 7 % 31, torch.arange(11).expand(3, 11) > 3
    mask = mask & (torch.arange(11) < torch.tensor([[11], [7], [5]]))
    rows = {"padded": (tokens, mask, None), "packed": (tokens[:1], mask[:1], ((0, 3), (0, 8))),
            "from one beginning": (tokens[:1], mask[:1], ((0, 2), (2, 1, 4, 2)))}
    found = {}
    for kind, changes in KINDS_OF_ATTENTION.items():
        config = ModelConfig(dim=16, n_layers=2, n_heads=4, head_dim=4, ffn_dim=24, vocab_size=31, max_seq_len=64,
                             **changes)
        torch.manual_seed(1)
        solver, verifier = Decoder(config), Decoder(dataclasses.replace(config, value_head=True))
        for parameter in (*solver.parameters(), *verifier.parameters()):
            nn.init.normal_(parameter, std=0.3)
        for layout, (ids, chosen, lengths) in rows.items():
            logprobs, entropies = forward.logprobs_and_entropy(solver, ids, chosen, lengths, learn_entropy=True)
            read = {"logprobs": logprobs, "entropies": entropies,
                    "values": forward.response_values(verifier, ids, chosen, lengths),
                    "scores of tokens": forward.token_scores(verifier, ids, chosen, lengths)}
            if layout != "from one beginning":
                read["scores"] = forward.response_scores(verifier, ids, chosen, lengths)
            parameters = [p for p in (*solver.parameters(), *verifier.parameters()) if p.requires_grad]
            loss = sum((x * torch.arange(1, x.numel() + 1).view_as(x).cos()).sum() for x in read.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = torch.cat([g.flatten() for g in gradients if g is not None])
            found[f"{kind}, {layout}"] = {name: x.detach() for name, x in read.items()} | {
                "gradient": parallel.sum_over_all(flat)}
    return found
