"""src/memory.py: parameters by hand, and activations beside the tensors that autograd really keeps."""

import dataclasses

import pytest
import torch
from torch import Tensor

from src import parallel
from src.memory import (
    Pass,
    Training,
    activations,
    decoding_memory,
    local_lora_parameters,
    local_parameters,
    training_memory,
)
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.lora import LINEARS, LoraConfig, add_lora

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
    assert local_lora_parameters(CONFIG, LORA, 2) == 16 + 8 + 12 + 16


def test_kv_cache_by_hand() -> None:
    # keys and values, one layer, one kv head of 4, three rows of seven tokens, float32
    assert decoding_memory(CONFIG, 1, n_rows=3, n_tokens=7)["kv cache"] == 2 * 4 * 4 * 3 * 7


def test_training_memory_by_hand() -> None:
    few, many = Pass(1, 1), Pass(15, 15)
    held = training_memory(CONFIG, 1, few, Training())
    assert (held["weights"], held["optimizer"], held["gradients"]) == (4 * 664, 8 * 664, 4 * 664)
    assert "gathered" not in held and held["allocator"] == 4 * 664
    begins = training_memory(CONFIG, 1, many, Training())  # so many activations that gradients come too late
    # 15 hidden states of 8, logits and log-softmax of 10, and the output layer's gradient
    assert begins["gradients"] == 0 and begins["logits"] == 4 * (15 * 8 + 2 * 15 * 10 + 80)
    adapted = training_memory(CONFIG, 1, few, Training(LORA))
    assert adapted["weights"] == 4 * (664 + 72) and adapted["optimizer"] == 8 * 72
    shared = training_memory(CONFIG, 1, few, Training(data_parallel=2))
    assert shared["optimizer"] == 4 * 664 and shared["gradients"] == 2 * 664
    assert shared["gathered"] == 4 * (3 * 496 + 168 + 496 + 168)


def kept(config: ModelConfig, size: Pass, lora: LoraConfig | None) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, parameters apart."""
    parallel.start()
    model = Decoder(config)
    if lora:
        add_lora(model, lora)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    half = size.n_tokens // 2
    lengths = (half, half) if size.packed else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.ones((1, 2 * half) if lengths else (2, half), dtype=torch.int64), lengths=lengths)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [None, dataclasses.replace(LORA, targets=LINEARS)])
@pytest.mark.parametrize("changes", [{}, {"post_norms": True}, {"qk_norm": True}])
def test_activations_are_those_that_autograd_keeps(
    packed: bool, lora: LoraConfig | None, changes: dict[str, object]
) -> None:
    size = Pass(128, 80, packed)  # products have whole blocks of rows, see models/linear.py
    three, four = (dataclasses.replace(WIDE, n_layers=n, **changes) for n in (3, 4))
    counted = (activations(config, 1, size, Training(lora))[0] for config in (four, three))
    found = (kept(config, size, lora) for config in (four, three))
    assert next(counted) - next(counted) == next(found) - next(found)  # a block


def test_accumulated_gradients_meet_the_next_passes_activations() -> None:
    """They are there from a step's second pass on: at its peak beside all activations, however few those are."""
    largest, how = Pass(16, 16), Training(accumulates=True)
    gradients = 4 * local_parameters(WIDE, 1)
    kept, worked = activations(WIDE, 1, largest, how)
    assert worked < kept < gradients  # one pass alone would have its peak at its end
    held = training_memory(WIDE, 1, largest, how)
    assert (held["gradients"], held["activations"]) == (gradients, kept)
    assert held["logits"] > 0
    alone = training_memory(WIDE, 1, largest, Training())
    assert (alone["gradients"], alone["activations"], alone["logits"]) == (gradients, worked, 0)


def test_moments_in_8_bits_are_a_quarter() -> None:
    """A byte a moment, and a float32 scale for 256 of them."""
    plain, small = (
        training_memory(WIDE, 1, Pass(64, 64), Training(optimizer=name))["optimizer"]
        for name in ("adamw", "adamw_8bit")
    )
    assert plain == 8 * local_parameters(WIDE, 1)
    assert small == int((2 + 2 * 4 / 256) * local_parameters(WIDE, 1))


def test_what_is_computed_again_is_not_kept() -> None:
    size, depth = Pass(100, 50), [dataclasses.replace(WIDE, n_layers=n) for n in (3, 4)]
    for kind, share in (("none", 1.0), ("selective", 0.6), ("full", 0.1)):
        one, more = (activations(config, 1, size, Training(checkpointing=kind))[0] for config in depth)
        block = (more - one) / activations(WIDE, 1, size, Training())[1]
        assert block < share, kind
    assert more - one == 4 * 100 * WIDE.dim  # full: a block's input
