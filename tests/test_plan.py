"""The plan of --dry_run says what a run will really hold."""

from pathlib import Path

import pytest

from src import assemble, parallel, plan
from src.checkpoint import sources, storage
from src.models.config import ModelConfig
from src.models.lora import LoraConfig
from tests import tiny

CONFIG = ModelConfig(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=12, vocab_size=10, max_seq_len=32
)
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq", "w2"))


def test_parameters_by_hand() -> None:
    # embeddings and output 2*80; wq, wo 2*64; wk, wv 2*32; w1, w2, w3 3*96; three norms 3*8
    assert plan.local_parameters(CONFIG, 1) == 160 + 128 + 64 + 288 + 24


def test_lora_parameters_by_hand_on_two_ranks() -> None:
    # wq [8, 8]: A 2*8 whole, B 8*2 halved; w2 [8, 12]: A 2*12 halved, B 8*2 whole
    assert plan.local_lora_parameters(CONFIG, LORA, 2) == 16 + 8 + 12 + 16


def test_training_memory_by_hand() -> None:
    memory = plan.training_memory(CONFIG, 1, LORA, n_rows=3, n_tokens=5)
    trainable = 16 + 16 + 24 + 16
    assert memory == {
        "weights": 4 * (664 + trainable),
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "logits": 2 * 4 * 3 * 5 * 10,
    }


def test_ppo_arrangements_by_hand() -> None:
    critic = assemble.solver_to_verifier(CONFIG)
    base, head, adapters = 664, 80, 72  # the critic has a head of 8 in place of the output layer
    actor = 4 * (base + 4 * adapters) + 2 * 4 * 3 * 5 * 10
    trained = 4 * (base - head + 8 + adapters) + 3 * 4 * (adapters + 8)
    rollouts = 2 * 4 * 4 * 2 * 7 + 4 * 2 * 10
    verifier = 4 * (base - head + 8)
    numbers = {"max_new_tokens": 5, "n_rows": 3, "n_decoding": 2, "buffers": 1, "inner_epochs": 2, "minibatches": 4}
    plain = plan.ppo(CONFIG, critic, 1, LORA, [[1, 2]], **numbers, with_critic=True, with_verifier=True)
    # the critic's adapters count its head once, in its weights
    everything = actor + trained + rollouts + verifier
    shared = everything - 4 * (base - head + 8) - verifier + 4 * (adapters + 8)
    held = plain.splitlines()[-1].removeprefix("held").strip()
    assert held.split(", ") == [
        f"all at once {plan.size(everything + 4 * 8)}",
        f"--phases {plan.size(max(actor, rollouts + 4 * (base + adapters)))}",
        f"--share_base {plan.size(shared + 4 * 8)}",
    ]
    assert "each for 2 x 4 optimizer steps" in plain


def test_kv_cache_by_hand() -> None:
    # keys and values, one layer, one kv head of 4, three rows of seven tokens, float32
    assert plan.decoding_memory(CONFIG, 1, n_rows=3, n_tokens=7)["kv cache"] == 2 * 4 * 4 * 3 * 7


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes_as_a_person_reads_them(n_bytes: int, text: str) -> None:
    assert plan.size(n_bytes) == text


def test_the_plan_counts_what_shards_and_loaded_models_hold(tmp_path: Path) -> None:
    source = tiny.write_hf_llama(tmp_path / "hf")
    halves = tiny.split(source, tmp_path / "two", n=2)
    config = assemble.load_config(halves)
    for path in storage.shard_paths(Path(halves)):
        held = sum(tensor.numel() for tensor in storage.read_shard(path).values())
        assert held == plan.local_parameters(config, 2)
    parallel.start()
    model = assemble.load_verifier(tiny.split(source, tmp_path / "one"), from_solver=True)
    assert sum(p.numel() for p in model.parameters()) == plan.local_parameters(model.config, 1)
    assemble.put_lora_on(model, LORA, seed=1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == plan.local_lora_parameters(model.config, LORA, 1)


def test_inspection_says_what_each_number_of_ranks_would_hold(tmp_path: Path) -> None:
    halves = tiny.split(tiny.write_hf_llama(tmp_path / "hf"), tmp_path / "two", n=2)
    facts, _, table = plan.inspection(*sources.describe(halves), ranks=(1, 3, 8, 9)).partition("\n\n")
    assert "llama, a solver" in facts
    assert "float32, " in facts and "shards: 2" in facts
    assert "8 query, 4 key-value, of 4" in facts
    one, three, eight, nine = table.splitlines()[1:]
    assert one.split()[:3] == [
        "1",
        plan.size(4 * plan.local_parameters(assemble.load_config(halves), 1)).split()[0],
        "KiB",
    ]
    assert "uneven: 2 to 4 query heads; 2 rows of padding in the vocabulary" in three
    assert "each key-value head lies on 2 ranks" in eight
    assert "n_heads=8 leaves nothing to do for shard" in nine
