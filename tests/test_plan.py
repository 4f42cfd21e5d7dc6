"""The plan of --dry_run says what a run will really hold."""

from pathlib import Path

import pytest

from src import assemble, parallel, plan
from src.checkpoint import sources, storage
from src.memory import Pass, Training, local_lora_parameters, local_parameters, training_memory
from tests import tiny
from tests.test_memory import CONFIG, LORA


def test_ppo_arrangements_by_hand() -> None:
    critic = assemble.solver_to_verifier(CONFIG)
    base, head, adapters = 664, 80, 72  # the critic has a head of 8 in place of the output layer
    largest = Pass(3 * 7, 3 * 5)
    held, trained = (training_memory(config, 1, largest, Training(LORA)) for config in (CONFIG, critic))
    assert held["weights"] == 4 * (base + adapters) and trained["weights"] == 4 * (base - head + 8 + adapters + 8)
    rollouts = 2 * 4 * 4 * 2 * 7 + 4 * 2 * 10
    verifier = 4 * (base - head + 8)
    numbers = {"max_new_tokens": 5, "n_rows": 3, "n_decoding": 2, "buffers": 1, "inner_epochs": 2, "minibatches": 4}
    plain = plan.ppo(CONFIG, critic, 1, LORA, [[1, 2]], **numbers, with_critic=True, with_verifier=True)
    actor, learner = sum(held.values()), sum(trained.values())
    everything = actor + learner + rollouts + verifier
    shared = everything - 4 * (base - head + 8) - verifier + 4 * (adapters + 8)
    found = plain.splitlines()[-1].removeprefix("held").strip()
    assert found.split(", ") == [
        f"all at once {plan.size(everything)}",
        f"--phases {plan.size(max(actor, learner, verifier, rollouts + held['weights']))}",
        f"--share_base {plan.size(shared)}",
    ]
    assert "each for 2 x 4 optimizer steps" in plain


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
        assert held == local_parameters(config, 2)
    parallel.start()
    model = assemble.load_verifier(tiny.split(source, tmp_path / "one"), from_solver=True)
    assert sum(p.numel() for p in model.parameters()) == local_parameters(model.config, 1)
    assemble.put_lora_on(model, LORA, seed=1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == local_lora_parameters(model.config, LORA, 1)


def test_inspection_says_what_each_number_of_ranks_would_hold(tmp_path: Path) -> None:
    halves = tiny.split(tiny.write_hf_llama(tmp_path / "hf"), tmp_path / "two", n=2)
    facts, _, table = plan.inspection(*sources.describe(halves), ranks=(1, 3, 8, 9)).partition("\n\n")
    assert "llama, a solver" in facts
    assert "float32, " in facts and "shards: 2" in facts
    assert "8 query, 4 key-value, of 4" in facts
    one, three, eight, nine = table.splitlines()[1:]
    assert one.split()[:3] == [
        "1",
        plan.size(4 * local_parameters(assemble.load_config(halves), 1)).split()[0],
        "KiB",
    ]
    assert "uneven: 2 to 4 query heads; 2 rows of padding in the vocabulary" in three
    assert "each key-value head lies on 2 ranks" in eight
    assert "n_heads=8 leaves nothing to do for shard" in nine
