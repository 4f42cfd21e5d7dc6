"""src/training/shared_base.py: models on one base compute what separate ones compute, and hold the base once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src import load
from src.checkpoint import saving
from src.command.config import OptimizerFlags
from src.errors import UserError
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training.offload import ModelOffloader
from src.training.ppo_setup import PPOModels
from src.training.rewards import pairwise_reward
from src.training.sft import sft_loss
from src.training.shared_base import SharedBase
from src.training.trainer import Trainer
from tests.conftest import Folders
from tests.reference import batch
from tests.training.workers import collect, lora_of, ppo_config, ppo_update

LORA = lora_of(4)


def save_adapter(model: Decoder, base: str, folder: Path, seed: int) -> str:
    """Put random adapters on a loaded model and save them. Returns the directory."""
    load.put_lora_on(model, LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05, generator=generator)
    saving.begin_save(model, str(folder), base, lora=LORA).complete()
    return str(folder)


@pytest.fixture
def made(folders: Folders, tmp_path: Path) -> dict[str, str]:
    """A solver and a verifier that are adapters on folders.one, and an adapter on that verifier."""
    solver = save_adapter(load.load_solver(folders.one), folders.one, tmp_path / "solver", 2)
    verifier = save_adapter(
        load.load_verifier(folders.one, from_solver=True), folders.one, tmp_path / "verifier", 3
    )
    second = save_adapter(load.load_verifier(verifier), verifier, tmp_path / "second", 4)
    return {"solver": solver, "verifier": verifier, "second": second}


def test_ppo_on_one_base_is_ppo_on_four_models(
    made: dict[str, str], folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    numbers, found = ppo_config(), []
    for shared in (None, SharedBase(made["solver"])):
        if shared:
            actor = shared.model(made["solver"])
            critic, verifier = (shared.model(made[name], value_head=True) for name in ("verifier", "second"))
        else:
            actor = load.load_solver(made["solver"])
            critic, verifier = (load.load_verifier(made[name]) for name in ("verifier", "second"))
        for model in (actor, critic):
            load.put_lora_on(model, LORA, seed=1)
        log, flags = RunLog(str(tmp_path), {}), OptimizerFlags(lr=1e-3)
        trainers = (Trainer(model, log, flags, total_steps=8) for model in (actor, critic))
        models, seen = PPOModels(*trainers, None, ModelOffloader()), {}
        for iteration in range(2):
            buffer, _ = collect(
                models, tokenizer, lambda rollout, verifier=verifier: pairwise_reward(
                    verifier, rollout, numbers, 2), numbers, iteration
            )
            metrics = ppo_update(models, buffer, numbers, iteration)
            seen |= {f"{name} {iteration}": torch.tensor(value) for name, value in metrics.items()}
            tensors = {**buffer._asdict(), "verifier": buffer.scores.total}
            seen |= {f"{name} {iteration}": t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
        found.append(seen)
    separate, one = found
    for name, expected in separate.items():
        assert_close(one[name], expected, rtol=1e-4, atol=1e-5, msg=name.__add__)
    assert separate["policy_loss 1"] != 0.0 and (separate["verifier 0"].std() > 0)
    base = {p.untyped_storage().data_ptr() for p in shared._tensors.values()}
    for model in (actor, critic, verifier):
        tensors = [*model.parameters(), *model.buffers()]
        own = sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in base)
        assert own < 0.6 * sum(t.nbytes for t in shared._tensors.values()) and len(tensors) > 20


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_gradients_pass_adapters_below_that_carry_none_on_top(made: dict[str, str], precision: str) -> None:
    gradients = []
    for model in (SharedBase(made["solver"], precision).model(made["solver"]),
                  load.load_solver(made["solver"], precision=precision), load.load_solver(made["solver"])):
        load.put_lora_on(model, replace(LORA, targets=("wq",)), seed=1)
        sft_loss(model, batch()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    one, separate, exact = gradients  # the last in float32
    # in half precision both are rounded, unlike by kernel and processor: neither is farther off than the other
    off = 1e-5 * exact.norm() if precision == "float32" else 1.25 * (separate - exact).norm()
    assert (one - exact).norm() < off < 0.05 * exact.norm()


def test_another_base_or_kind_of_model_is_refused(made: dict[str, str], folders: Folders) -> None:
    shared = SharedBase(made["solver"])
    with pytest.raises(UserError, match=f"{folders.verifier} stands on {folders.verifier} and not on"):
        shared.model(folders.verifier, value_head=True)
    with pytest.raises(UserError, match="solver is a solver .no value head.; train a verifier"):
        shared.model(made["solver"], value_head=True)
    with pytest.raises(UserError, match="verifier is a verifier .it has a value head.; a solver is needed"):
        shared.model(made["verifier"])
    head = shared.model(made["solver"], value_head=True, from_solver=True).v_head.weight
    assert not head.any()
