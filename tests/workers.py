"""What the ranks of a test compute; each function runs under tests.ranks.run_ranks() and returns tensors.

They import nothing heavier than src: every rank pays for it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from src import assemble, parallel
from src.checkpoint import shards
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.data.collate import Batch
from src.errors import UserError
from src.inference.engine import Request, generate
from src.inference.sampling import Sampling
from src.models.attention import KVCache
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.lora import LINEARS, LoraConfig
from src.training.solver import n_supervised, sft_loss


def all_logits(model: Decoder, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of right-padded rows, without gradient."""
    with torch.no_grad():
        return parallel.gather_vocab(model.logits(model(tokens)))[..., : model.config.vocab_size]


def gradients(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    """This rank's gradients of the SFT loss, by parameter."""
    model.zero_grad(set_to_none=True)
    sft_loss(model, batch, n_supervised([batch])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def decoders(
    folders: dict[str, str], tokens: list[list[int]], mask: list[list[bool]], cached: list[str]
) -> dict[str, object]:
    """Logits and SFT gradients of several checkpoints, and cached decoding of those named in `cached`."""
    batch = Batch(torch.tensor(tokens), torch.tensor(mask))
    results = {}
    for name, folder in folders.items():
        model = assemble.load_solver(folder)
        results[name] = {
            "logits": all_logits(model, batch.tokens),
            "gradients": gradients(model, batch),
            "cached": cached_logprobs(model) if name in cached else {},
        }
    return results


@torch.no_grad()
def cached_logprobs(model: Decoder) -> dict[str, Tensor]:
    """Log-probs [S, V] of one row of 75 tokens, computed in every way there is.

    With 64 positions a block, the cache grows on the way. `plain` is the reference for all.
    """
    row = torch.arange(75) * 7 % 61 + 1
    other = torch.arange(120) * 5 % 61 + 1

    def logprobs(hidden: Tensor) -> Tensor:
        return parallel.gather_vocab(model.logits(hidden)).log_softmax(-1)

    def cached(pieces: list[int]) -> Tensor:
        cache, outputs, start = KVCache(model.config.n_layers), [], 0
        for piece in pieces:
            positions = torch.arange(start, start + piece)[None]
            outputs.append(logprobs(model(row[None, start : start + piece], positions, cache))[0])
            start += piece
        return torch.cat(outputs)

    padded = torch.zeros(3, 120, dtype=torch.int64)
    padded[0, :90], padded[1, :75], padded[2] = other[:90], row, other
    return {
        "plain": logprobs(model(row[None]))[0],
        "padded": logprobs(model(padded))[1, :75],
        "token by token": cached([1] * 9 + [50] + [1] * 16),
        "in chunks": cached([5, 30, 1, 28, 11]),
        "rows come and go": _come_and_go(model, row, other),
    }


def _come_and_go(model: Decoder, row: Tensor, other: Tensor) -> Tensor:
    """Log-probs of `row` decoded among rows of other lengths that leave and join the cache."""
    outputs = []

    def forward(tokens: list[Tensor], starts: list[int], cache: KVCache, index: int) -> None:
        """Feed rows of different lengths from their own positions; keep what row `index` gives."""
        lengths = [len(piece) for piece in tokens]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        positions = torch.tensor(starts)[:, None] + torch.arange(max(lengths))
        hidden = model(padded, positions, cache)[index, : lengths[index]]
        outputs.append(parallel.gather_vocab(model.logits(hidden)).log_softmax(-1))

    cache = KVCache(model.config.n_layers)
    forward([other[:11], row[:4], other[20:29]], [0, 0, 0], cache, 1)
    forward([other[11:12], row[4:5], other[29:30]], [11, 4, 9], cache, 1)
    cache.keep(torch.tensor([2, 1]))  # the first row leaves, the others change places
    forward([other[30:31], row[5:6]], [10, 5], cache, 1)
    joining = KVCache(model.config.n_layers)
    model(torch.stack((other[:80], other[5:85])), cache=joining)  # longer than one block
    cache.extend(joining)
    forward([other[31:32], row[6:7], other[80:81], other[85:86]], [11, 6, 80, 80], cache, 1)
    cache.keep(torch.tensor([1]))
    forward([row[7:40]], [7], cache, 0)
    late = KVCache(model.config.n_layers)
    model(other[None, :3], cache=late)
    late.extend(cache)  # a short cache takes a long one in
    forward([other[40:61], row[40:61]], [3, 40], late, 1)
    for position in range(61, 75):
        token = row[position : position + 1]
        forward([other[position : position + 1], token], [position - 37, position], late, 1)
    return torch.cat(outputs)


def fill_lora_b(model: Decoder) -> None:
    """Give every adapter's B values: drawn whole and cut, so alike at every tensor-parallel size."""
    generator = torch.Generator().manual_seed(3)
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b.weight"):
            how = shards.cut_of(name, model.config, n)
            rows = parameter.shape[0] if how.dim is None else how.size
            whole = torch.randn(rows, parameter.shape[1], generator=generator)
            parameter.data.copy_(shards.cut(whole, how, rank) / 10)


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """A copy of this rank's trainable tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def lora(folder: str, save_dir: str, tokens: list[list[int]], mask: list[list[bool]]) -> dict[str, object]:
    """The life of an adapter: put on, differentiated, trained for a step, saved, merged in three ways."""
    batch = Batch(torch.tensor(tokens), torch.tensor(mask))
    config = LoraConfig(rank=4, alpha=6.0, dropout=0.0, targets=LINEARS)
    model = assemble.load_solver(folder)
    results: dict[str, object] = {"base": all_logits(model, batch.tokens)}
    assemble.put_lora_on(model, config, seed=5)
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
    assemble.save_model(model, save_dir, folder, lora=config)
    results["loaded"] = all_logits(assemble.load_solver(save_dir), batch.tokens)
    if parallel.rank() == 0:
        source = open_source(save_dir)
        split(source, Path(f"{save_dir}-merged"), parallel.world_size(), "", "", save_dir)
    parallel.barrier()
    results["merged"] = all_logits(assemble.load_solver(f"{save_dir}-merged"), batch.tokens)
    for name, path in ("loaded_bfloat16", save_dir), ("merged_bfloat16", f"{save_dir}-merged"):
        results[name] = dict(assemble.load_solver(path, dtype=torch.bfloat16).named_parameters())
    results["dropout"] = dropout_logits(folder, batch.tokens)
    results["verifier"] = verifier_scores(folder, f"{save_dir}/../verifier", batch.tokens)
    return results


def dropout_logits(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of a model with heavily dropping adapters in both modes, and without dropout."""
    results = {}
    for name, dropout in ("without", 0.0), ("eval", 0.5), ("train", 0.5):
        model = assemble.load_solver(folder)
        assemble.put_lora_on(model, LoraConfig(rank=4, alpha=6.0, dropout=dropout, targets=LINEARS), seed=5)
        fill_lora_b(model)
        model.train(name == "train")
        results[name] = all_logits(model, tokens)
    return results


def verifier_scores(folder: str, save_dir: str, tokens: Tensor) -> dict[str, Tensor]:
    """Scores of a verifier before and after its adapters and value head went to disk and back."""
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq", "w2"))
    verifier = assemble.load_verifier(folder, from_solver=True)
    assemble.put_lora_on(verifier, config, seed=5)
    fill_lora_b(verifier)
    nn.init.normal_(verifier.v_head.weight, generator=torch.Generator().manual_seed(4))
    assemble.save_model(verifier, save_dir, folder, lora=config)
    with torch.no_grad():
        return {
            name: model.scores(model(tokens))
            for name, model in (("saved", verifier), ("loaded", assemble.load_verifier(save_dir)))
        }


def vocabulary_and_layers(n_rows: int, vocab_size: int) -> dict[str, object]:
    """Vocabulary-parallel log-probs and entropy of random logits with their gradients, and refused layer sizes."""
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    logits, targets, weights = random_vocabulary(n_rows, vocab_size)
    columns = shards.Cut(
        1, vocab_size, tuple(parallel.padded_share(vocab_size, n, index) for index in range(n))
    )
    local = shards.cut(logits, columns, rank).requires_grad_()
    logprobs = parallel.vocab_logprobs(local, targets)
    (logprobs * weights).sum().backward()
    huge = shards.cut(logits * 1e4, columns, rank)
    gathered = shards.cut(logits, columns, rank).requires_grad_()
    (parallel.gather_vocab(gathered) * logits).sum().backward()
    with torch.device("meta"):
        model = Decoder(CONFIG)
    return {
        "logprobs": logprobs.detach(),
        "gradient": local.grad,
        "bfloat16": parallel.vocab_logprobs(local.detach().bfloat16(), targets),
        "huge": parallel.vocab_logprobs(huge, targets),
        "none": parallel.vocab_logprobs(local[:0], targets[:0]),
        "entropy": parallel.vocab_entropy(local),
        "huge_entropy": parallel.vocab_entropy(huge),
        "gathered": parallel.gather_vocab(local.detach()),
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
        parallel.ParallelEmbedding(4, width)
    except UserError as error:
        return str(error)
    return ""


def completions(folder: str, requests: list[tuple[str, int, list[int]]]) -> dict[str, dict[str, list[int]]]:
    """Tokens by temperature, then by "id/sample", as this rank has them."""
    model = assemble.load_solver(folder)
    results = {}
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, top_p=0.9, max_new_tokens=24, seed=3)
        found = generate(
            model, [Request(*request) for request in requests], sampling, eos_id=2, max_batch_size=4
        )
        results[str(temperature)] = {
            f"{done.request.id}/{done.request.sample}": done.tokens for done in found
        }
    return results
