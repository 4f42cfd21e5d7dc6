"""src/planning/memory.py: parameters by hand, and activations beside the tensors that autograd really keeps."""

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src import context_parallel, parallel
from src.load import put_lora_on, solver_to_verifier
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.forward import CHUNK_BYTES, response_logprobs, summed_logprobs, token_scores
from src.models.linear import INTEL
from src.models.lora import LINEARS, LoraConfig, add_lora
from src.models.quantize import quantize_weights
from src.planning.memory import (
    Training,
    activations,
    available_memory,
    decoding_memory,
    local_parameters,
    scores_memory,
    scoring_memory,
    sent_for_attention,
    training_memory,
)
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=12, vocab_size=10, max_seq_len=32
)
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq", "w2"))
WIDE = dataclasses.replace(
    CONFIG, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=160, vocab_size=50
)


def test_parameters_by_hand() -> None:
    # embeddings and output 2*80; wq, wo 2*64; wk, wv 2*32; w1, w2, w3 3*96; three norms 3*8
    assert local_parameters(CONFIG, 1) == 160 + 128 + 64 + 288 + 24


def test_lora_parameters_by_hand_on_two_ranks() -> None:
    # wq [8, 8]: A 2*8 whole, B 8*2 halved; w2 [8, 12]: A 2*12 halved, B 8*2 whole
    assert local_parameters(CONFIG, 2, LORA) == 16 + 8 + 12 + 16


def test_kv_cache_by_hand() -> None:
    # keys and values, one layer, one kv head of 4, three rows in a bucket of 64 tokens, float32
    assert decoding_memory(CONFIG, 1, n_rows=3, n_tokens=7)["kv cache"] == 2 * 4 * 4 * 3 * 64
    # the first five are the same in all rows
    assert decoding_memory(CONFIG, 1, n_rows=3, n_tokens=7, shared=5)["kv cache"] == 2 * 4 * 4 * (5 + 3 * 64)
    # in a bucket of 128, after one of 96
    assert decoding_memory(CONFIG, 1, n_rows=3, n_tokens=100)["kv cache"] == 2 * 4 * 4 * 3 * (128 + 96)
    # keys and values of what is read at once, and what a block makes of it
    read = {rows: decoding_memory(CONFIG, 1, rows, 7)["prefill"] for rows in (3, 6, 1000, 2000)}
    assert read[6] == 2 * read[3] > 4 * 21 * 2 * 4 and read[1000] == read[2000]


def test_training_memory_by_hand() -> None:
    held = training_memory(CONFIG, 1, 15, Training())
    assert (held["weights"], held["optimizer"], held["gradients"]) == (4 * 664, 8 * 664, 4 * 664)
    # 15 hidden states of 8 and their gradient, logits of 10, twice where oneDNN takes a copy, the same in a part and
    # its softmax
    assert held["logits"] == 4 * (2 * 15 * 8 + (3 if INTEL else 4) * 15 * 10) and "gathered" not in held
    # more than a chunk: two are held where one is kept, and a chunk's gradient of the output layer unless it is frozen
    kept, summed, frozen = (training_memory(CONFIG, 1, 3_000_000, how)["logits"]
                            for how in (Training(summed=False), Training(), Training(LORA)))
    assert (kept - summed, summed - frozen) == (CHUNK_BYTES["cpu"], 4 * 80)
    adapted = training_memory(CONFIG, 1, 15, Training(LORA))
    assert adapted["weights"] == 4 * (664 + 72) and adapted["optimizer"] == 8 * 72
    shared = training_memory(CONFIG, 1, 15, Training(data_parallel=2))
    assert shared["optimizer"] == 4 * 664 and shared["gradients"] == 2 * 664
    assert shared["gathered"] == 2 * 4 * 664  # as loaded, and as gathered
    on_gpu = training_memory(CONFIG, 1, 15, Training(data_parallel=2, on_gpu=True, half=True))
    assert on_gpu["gathered"] == 2 * (3 * 496 + 168) + 4 * (496 + 168)  # gathered in bfloat16, summed in float32
    half = training_memory(CONFIG, 1, 15, Training(half=True))
    assert half["weights"] == 4 * 664 and half["rounded weights"] == 2 * (480 + 80)
    frozen = training_memory(CONFIG, 1, 15, Training(LORA, half=True))
    assert frozen["weights"] == 2 * 664 + 4 * 72 and "rounded weights" not in frozen
    summed = training_memory(CONFIG, 1, 15, Training(data_parallel=2, accumulates=True))
    assert summed["gradients"] == 4 * 664  # whole until the last backward pass of a step


def test_shared_tokens_by_hand() -> None:
    """Two ranks take 7 and 8 of 15 tokens; their one key head is copied for the two query heads."""
    how = Training(data_parallel=2, context_parallel=2)
    copies = 4 * 2 * 4  # float32, key and value of one more head of 4
    assert training_memory(CONFIG, 1, 15, how)["activations"] == (
        training_memory(CONFIG, 1, 8, Training())["activations"] + 8 * copies)
    # of 8 tokens queries, keys, values and output in 8 heads of 4, half of them to the other rank, and gradients
    assert sent_for_attention(CONFIG, 1, 15, how) == 8 * 8 * 4 * 4 // 2 * 2
    assert sent_for_attention(CONFIG, 1, 15, how, learns=False) == 8 * 8 * 4 * 4 // 2


def kept(config: ModelConfig, n_tokens: int, lora: LoraConfig | None, *, packed: bool, half: bool) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, parameters apart."""
    parallel.start()
    model = Decoder(config, torch.bfloat16 if half else torch.float32)
    if lora:
        add_lora(model, lora)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        if half and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    length = n_tokens // 2
    lengths = ((0, length), (0, length)) if packed else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.ones((1, 2 * length) if lengths else (2, length), dtype=torch.int64), lengths=lengths)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [None, dataclasses.replace(LORA, targets=LINEARS)])
@pytest.mark.parametrize("changes", [{}, {"post_norms": True}, {"qk_norm": True}])
def test_activations_are_those_that_autograd_keeps(
    packed: bool, lora: LoraConfig | None, changes: dict[str, object], half: bool
) -> None:
    """Of a block, its rounded weights included: but for the narrow tensors, and a packed row's outputs end to end."""
    n_tokens = 128  # products have whole blocks of rows, see models/linear.py
    three, four = (dataclasses.replace(WIDE, n_layers=n, **changes) for n in (3, 4))
    how = Training(lora, half=half)
    counted = [
        sum(activations(config, 1, n_tokens, how)) + training_memory(config, 1, 1, how).get("rounded weights", 0)
        for config in (four, three)
    ]
    found = [kept(config, n_tokens, lora, packed=packed, half=half) for config in (four, three)]
    narrow = 0.13 if half else 0.11  # a share that grows as the wide tensors halve
    assert counted[0] - counted[1] == pytest.approx(found[0] - found[1], rel=narrow)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{"n_experts": 8, "n_active_experts": 4}, {"n_experts": 4, "n_active_experts": 2, "shared_ffn_dim": 96},
     {"attention_softcap": 30.0}, {"windows": 8}, {"attention_softcap": 30.0, "windows": 8}, {"dropout": 0.1},
     {"dora": True}])
def test_what_experts_softcaps_windows_dropout_and_dora_keep(changes: dict[str, object], half: bool) -> None:
    adapters = changes.keys() & {"dropout", "dora"}
    lora = dataclasses.replace(LORA, targets=LINEARS, **changes) if adapters else None
    how, n_tokens, found, counted = Training(lora, half=half, longest=64), 128, [], []
    for n_layers in (3, 4):
        own = {} if adapters else dict(changes)
        if "windows" in own:
            own["windows"] = (own["windows"],) * n_layers
        config = dataclasses.replace(WIDE, n_layers=n_layers, **own)
        found.append(kept(config, n_tokens, lora, packed=True, half=half))
        rounded = training_memory(config, 1, 1, how).get("rounded weights", 0)
        scores = scores_memory(config, 1, n_tokens * 64, how)
        counted.append(sum(activations(config, 1, n_tokens, how)) + rounded + sum(scores))
    assert counted[1] - counted[0] == pytest.approx(found[1] - found[0], rel=0.15)


class Live(TorchDispatchMode):
    """Inside, the most bytes that new tensors take at once are counted; those of a model are not new."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} | {0}
        self.tensors: Counter[int] = Counter()  # by the place of what they share
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.known:
                self.tensors[place] += 1
                self.sizes[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, self.tensors.subtract, [place])
        self.most = max(self.most, sum(size for place, size in self.sizes.items() if self.tensors[place] > 0))
        return result


@torch.no_grad()
def scoring_peaks() -> dict[str, float]:
    """What scoring 2048 tokens is planned to take, over what it takes, by case."""
    parallel.start()
    found = {}
    for kv_heads, ffn_dim, half, is_verifier in itertools.product((1, 8), (64, 320), (False, True), (False, True)):
        config = dataclasses.replace(WIDE, n_heads=8, n_kv_heads=kv_heads, ffn_dim=ffn_dim, max_seq_len=2048)
        config = solver_to_verifier(config) if is_verifier else config
        dtype = torch.bfloat16 if half else torch.float32
        model, read = Decoder(config, dtype).to(dtype), token_scores if is_verifier else response_logprobs
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        mask = torch.ones(1, 2048, dtype=torch.bool)
        mask[0, 0] = False
        with Live(model) as live:
            read(model, mask.long(), mask)
        how = Training(half=half, context_parallel=context_parallel.size())
        planned = scoring_memory(config, 1, 2048, how)["forward pass"]
        found[f"{kv_heads} {ffn_dim} {half} {is_verifier}"] = planned / live.most
    return found


def test_scoring_takes_what_is_planned_of_one_rank_and_of_two(tmp_path: Path) -> None:
    ranks = run_ranks(2, "tests.planning.test_memory:scoring_peaks", tmp_path, 1, context_parallel_size=2)
    # a thread of gloo's may hold what was sent a little longer
    for least, found in ((0.94, scoring_peaks()), *((0.8, rank) for rank in ranks)):
        assert len(found) == 16 and all(least < ratio < 1.02 for ratio in found.values()), found


@pytest.mark.parametrize("precision", ["", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"tied": True, "embedding_split_dim": 0}, {"attention_softcap": 30.0}])
def test_adapters_take_what_is_planned(precision: str, changes: dict[str, object]) -> None:
    """Of a large vocabulary, whose layer is made dense, and of scores, in a forward and a backward pass."""
    parallel.start()
    model = Decoder(dataclasses.replace(WIDE, vocab_size=20_000, max_seq_len=256, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if precision:
        quantize_weights(model, precision, torch.float32)
    put_lora_on(model, LORA, 1)
    mask = torch.ones(1, 256, dtype=torch.bool)
    mask[0, 0] = False
    with Live(model) as live:
        live.known |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
        summed_logprobs(model, mask.long(), mask).backward()
    parts = training_memory(model.config, 1, 256, Training(LORA, precision, longest=256))
    planned = sum(parts[name] for name in ("gradients", "activations", "logits"))
    assert 0.95 < planned / live.most < 1.6


def test_on_a_gpu_gradients_come_as_activations_go() -> None:
    """Unless those of earlier passes are there already: then they lie beside all activations."""
    how = Training(on_gpu=True, half=True)
    few, many, summed = (
        training_memory(WIDE, 1, n_tokens, how._replace(accumulates=accumulates))
        for n_tokens, accumulates in ((4, False), (4096, False), (4096, True))
    )
    gradients = 4 * local_parameters(WIDE, 1)
    assert (few["gradients"], few["logits"]) == (gradients, 0)
    assert many["gradients"] == 0 < many["logits"] and summed == many | {"gradients": gradients}


def test_moments_in_8_bits_are_a_quarter() -> None:
    """A byte a moment, and a float32 scale for 256 of them."""
    plain, small = (
        training_memory(WIDE, 1, 64, Training(optimizer=name))["optimizer"]
        for name in ("adamw", "adamw_8bit")
    )
    assert plain == 8 * local_parameters(WIDE, 1)
    assert small == int((2 + 2 * 4 / 256) * local_parameters(WIDE, 1))


def test_a_step_in_8_bits_works_on_the_largest_tensor_when_activations_are_gone() -> None:
    how = Training(optimizer="adamw_8bit")
    few, many = (training_memory(WIDE, 1, n_tokens, how) for n_tokens in (2, 4096))
    assert sum(few[name] for name in ("8-bit step", "activations", "logits")) == 80 * 64 * 160  # one of w1, w2 and w3
    assert many["8-bit step"] == 0
    for other in (how._replace(on_gpu=True), how._replace(lora=LORA)):
        assert "8-bit step" not in training_memory(WIDE, 1, 2, other)


def test_what_is_computed_again_is_not_kept() -> None:
    whole = activations(dataclasses.replace(WIDE, n_layers=2), 1, 100, Training())[0]
    for kind, share in (("none", 1.0), ("selective", 0.6), ("full", 0.1)):
        three, four = (
            sum(activations(dataclasses.replace(WIDE, n_layers=n), 1, 100, Training(checkpointing=kind)))
            for n in (3, 4)
        )
        assert four - three <= share * whole, kind
    assert four - three == 4 * 100 * WIDE.dim  # full: a block's input


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what the machine has left and what the container may still take."""
    files = {"/proc/meminfo": "MemTotal: 9 kB MemAvailable: 6 kB"}

    def read(path: Path, encoding: str) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(parallel, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory() == 6 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert available_memory() == 6 * 1024
    files["/sys/fs/cgroup/memory.max"] = "4000\n"
    assert available_memory() == 3000
    files.clear()
    assert available_memory() is None
