"""PPO's episodes and update do not depend on how they are cut up: micro-batches, tensor- and data-parallel ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.models.decoder import Decoder
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.training.test_invariance import assert_same
from tests.training.workers import join_weights, ppo_buffers, ppo_models

Run = dict[str, dict[str, Tensor]]
CASES = [
    {"advantage": "gae"},
    {"advantage": "grpo", "group_size": 2, "kl_loss": "k3", "entropy_coef": 0.01, "teacher_ckpt_dir": "itself"},
    {"advantage": "gdpo", "group_size": 2, "policy_loss": "gspo", "kl_coef": 0.0},
    {"advantage": "reinforce++", "group_size": 2, "filter_groups": True, "lora_rank": 4, "policy_loss": "cispo"},
]
ROUNDING = 1e-5  # of a buffer's numbers: KL and ratio are differences of log-probs of up to 10 nats


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Every case on one rank, two episodes a forward pass."""
    log_dir = str(tmp_path_factory.mktemp("log"))
    return [ppo_buffers(folders.one, folders.verifier, log_dir, **case) for case in CASES]


def assert_same_run(found: Run, expected: Run) -> None:
    """The weights within the 1e-6 of fine-tuning, as large as one bit of the largest; the same tokens, and every
    number of the buffers within ROUNDING of the largest, or of 1."""
    for part in expected.keys() - {"rollouts"}:
        assert_same(found[part], expected[part])
    for name, tensor in expected["rollouts"].items():
        largest = max(1.0, tensor.double().abs().max().item())
        apart = (found["rollouts"][name].double() - tensor.double()).abs().max().item()
        assert apart < ROUNDING * largest, name


def one_rank_models(folders: Folders, log_dir: Path, lora_rank: int = -1) -> dict[str, Decoder]:
    """The models that are trained, as they start on one rank."""
    models = ppo_models(folders.one, folders.verifier, str(log_dir), lora_rank)
    return {"actor": models.actor.model, "critic": models.critic.model}


@pytest.mark.parametrize("max_batch_size", [1, 3, 10])
def test_micro_batches(folders: Folders, whole: list[Run], tmp_path: Path, max_batch_size: int) -> None:
    for case, expected in zip(CASES, whole, strict=True):
        found = ppo_buffers(folders.one, folders.verifier, str(tmp_path), max_batch_size, **case)
        assert_same_run(found, expected)


# five prompts: three ranks sample 2, 2 and 1 of them, and in some forward passes one keeps the others company
@pytest.mark.parametrize(
    ("n", "tensor_parallel_size", "context_parallel_size"),
    [(3, 1, 1), (2, 2, 1), (4, 2, 1), (2, 1, 2), (4, 2, 2), (4, 1, 2)])
def test_ranks(
    folders: Folders, whole: list[Run], tmp_path: Path, n: int, tensor_parallel_size: int, context_parallel_size: int,
) -> None:
    """Tensor-parallel, data-parallel, and sharing the positions of batches, alone and together."""
    place = tensor_parallel_size - 1
    ranks = run_ranks(
        n,
        "tests.training.workers:ppo_cases",
        tmp_path,
        tensor_parallel_size,
        context_parallel_size=context_parallel_size,
        actor=(folders.one, folders.two)[place],
        critic=(folders.verifier, folders.verifier_two)[place],
        log_dir=str(tmp_path / "log"),
        cases=CASES,
    )
    for index, (case, expected) in enumerate(zip(CASES, whole, strict=True)):
        started = one_rank_models(folders, tmp_path, case.get("lora_rank", -1))
        for part in expected.keys() - {"rollouts"}:  # training moved every weight that it may
            for name, weight in started[part].named_parameters():
                assert torch.equal(weight, expected[part][name]) != weight.requires_grad, name
        for first in range(0, n, tensor_parallel_size):  # every data-parallel copy
            group = [rank[str(index)] for rank in ranks[first : first + tensor_parallel_size]]
            joined = {
                part: join_weights([rank[part] for rank in group], started[part])
                for part in expected.keys() - {"rollouts"}
            }
            for rank in group:
                assert_same_run(joined | {"rollouts": rank["rollouts"]}, expected)
