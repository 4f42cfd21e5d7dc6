"""The update of a step does not depend on how the step is cut up: micro-batches, packing, ranks, recomputation."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src import load
from src.models.lora import at_length, merged_weight
from tests.conftest import Folders
from tests.ranks import Job, in_few_launches
from tests.reference import relative_difference
from tests.training.workers import join_weights, lora_of, sft_epochs

OnRanks = Callable[[tuple[int, ...]], list[dict[str, object]]]
LIMIT = 1e-6  # relative, float32
ROWS = 8  # in a step: more than the six that the last step of an epoch has


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Losses and the weights that act, adapters merged, within LIMIT.

    (Adam divides gradients that are all rounding by their size; an adapter's B, which starts at 0, shows it.)
    """
    expected = merged(expected)
    for name, tensor in merged(found).items():
        assert relative_difference(tensor, expected[name]) < LIMIT, name


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every adapter's product added to its base."""
    weights = dict(weights)
    for name in [name for name in weights if name.endswith(".lora_a.weight")]:
        stem = name.removesuffix(".lora_a.weight")
        lora_b = weights.pop(f"{stem}.lora_b.weight")
        whole = merged_weight(weights[f"{stem}.base.weight"], weights.pop(name), lora_b, 16.0 / len(lora_b.T))
        lengths = weights.pop(f"{stem}.lora_m.weight", None)
        weights[f"{stem}.base.weight"] = whole if lengths is None else at_length(whole, lengths, whole.square().sum(1))
    return weights


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[int | str, dict[str, Tensor]]:
    """Weights and losses with every step in one padded forward pass on one rank, by lora_rank; and of DoRA."""
    log_dir = str(tmp_path_factory.mktemp("log"))
    found = {rank: sft_epochs(folders.one, log_dir, ROWS, 1, lora_rank=rank) for rank in (-1, 4)}
    return found | {"dora": sft_epochs(folders.one, log_dir, ROWS, 1, lora_rank=4, dora=True)}


@settings(max_examples=8, deadline=None)
@given(
    accumulation_steps=st.sampled_from([1, 2, 4, 8]),
    packing=st.booleans(),
    lora_rank=st.sampled_from([-1, 4]),
    recomputed=st.sampled_from(["none", "selective", "full"]),
)
def test_micro_batches_packing_and_recomputation(
    folders: Folders,
    whole: dict[int | str, dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
    accumulation_steps: int,
    packing: bool,
    lora_rank: int,
    recomputed: str,
) -> None:
    log_dir = str(tmp_path_factory.mktemp("log"))
    found = sft_epochs(
        folders.one,
        log_dir,
        ROWS // accumulation_steps,
        accumulation_steps,
        packing,
        lora_rank,
        activation_checkpointing=recomputed,
    )
    assert_same(found, whole[lora_rank])


# ranks, how many of them share a model, replicas of what they share of it, and how many share the positions of batches
TOPOLOGIES = [
    (2, 1, 1, 1), (2, 2, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (2, 1, 1, 2), (4, 2, 1, 2), (4, 1, 1, 2),
]
CASES = [  # rows of a forward pass at most, and what else differs
    (4, {}),
    (1, {"packing": True, "activation_checkpointing": "full"}),
    (2, {"lora_rank": 4}),
    (4, {"lora_rank": 4, "packing": True}),
    (2, {"lora_rank": 4, "packing": True, "dora": True, "activation_checkpointing": "full"}),
]


@pytest.fixture(scope="module")
def on_ranks(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> OnRanks:
    """By topology, every rank's weights and losses of every case, whose steps all have ROWS rows."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), {}
    for n, tensor_parallel_size, replicas, context_parallel_size in TOPOLOGIES:
        own = ROWS * tensor_parallel_size * context_parallel_size // n
        cases = [
            {"max_batch_size": min(size, own), "accumulation_steps": own // min(size, own), **case}
            for size, case in CASES
        ]
        arguments = {"folder": (folders.one, folders.two)[tensor_parallel_size - 1], "log_dir": str(folder / "log"),
                     "cases": cases}
        jobs[n, tensor_parallel_size, replicas, context_parallel_size] = Job(
            n, "tests.training.workers:invariance_cases", arguments, tensor_parallel_size, replicas,
            context_parallel_size,
        )
    return in_few_launches(jobs, folder)


@pytest.mark.parametrize(("n", "tensor_parallel_size", "replicas", "context_parallel_size"), TOPOLOGIES)
def test_ranks(
    folders: Folders,
    whole: dict[int | str, dict[str, Tensor]],
    on_ranks: OnRanks,
    n: int,
    tensor_parallel_size: int,
    replicas: int,
    context_parallel_size: int,
) -> None:
    ranks = on_ranks((n, tensor_parallel_size, replicas, context_parallel_size))
    for index, (_, case) in enumerate(CASES):
        lora_rank, dora = case.get("lora_rank", -1), case.get("dora", False)
        one = whole["dora" if dora else lora_rank]
        model = load.load_solver(folders.one)
        load.put_lora_on(model, lora_of(lora_rank, dora=dora), 1)
        found = [rank[str(index)] for rank in ranks]
        losses = [rank.pop("losses") for rank in found]
        for loss in losses:
            assert relative_difference(loss, one["losses"]) < LIMIT
        expected = {name: tensor for name, tensor in one.items() if name != "losses"}
        for first in range(0, n, tensor_parallel_size):  # every data-parallel copy
            assert_same(join_weights(found[first : first + tensor_parallel_size], model), expected)
