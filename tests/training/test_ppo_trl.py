"""The policy's losses and gradients beside trl's GRPOTrainer: PPO's clip, GSPO and CISPO on the same episodes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from src.models.forward import Distribution, response_logprobs
from src.text.tokenizer import Tokenizer
from src.training.rewards import at_last
from tests.conftest import Folders
from tests.reference import hf_model
from tests.training.test_ppo import actor_loss, buffer_of
from tests.training.workers import ppo_config, ppo_models

# Ours, trl's names, and its clips. Its bound of CISPO's ratio is what the ratio may be, ours how far above 1 it may be.
CASES = {
    "ppo": ({"clip_ratio": 0.2, "clip_high": 0.3}, {"epsilon": 0.2, "epsilon_high": 0.3}),
    "gspo": ({"clip_ratio": 0.05, "clip_high": 0.1},
             {"epsilon": 0.05, "epsilon_high": 0.1, "importance_sampling_level": "sequence"}),
    "cispo": ({"clip_ratio": 1.0, "clip_high": 0.25}, {"loss_type": "cispo", "epsilon_high": 1.25}),
}


@pytest.mark.parametrize("kind", CASES)
def test_losses_and_gradients_equal_trl(folders: Folders, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("trl")
    from benchmarks import trl_grpo

    ours, theirs = CASES[kind]
    config = ppo_config(advantage="grpo", group_size=2, policy_loss=kind, kl_coef=0.0, max_batch_size=10, **ours)
    models = replace(ppo_models(folders.one, "", str(tmp_path)), critic=None)
    buffer = buffer_of(models, tokenizer, lambda rollout: at_last(rollout.lengths.float(), rollout), config, 0)
    tokens, mask = buffer.batch.tokens, buffer.batch.response_mask
    sampled, apart = Distribution(0.8, 64), torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) / 3
    old = torch.zeros(mask.shape)
    with torch.no_grad():  # as if several updates lay between
        old[mask] = response_logprobs(models.actor.model, tokens, mask, distribution=sampled) + apart[mask]
    loss, metrics = actor_loss(models, buffer._replace(logprobs=old, distribution=sampled), config)
    loss.backward()
    assert metrics["clipped_high"] > 0 and (metrics["clipped_low"] > 0) == (kind != "cispo")

    def rows(values: torch.Tensor, side: str = "right") -> torch.Tensor:
        return pad_sequence([row[own] for row, own in zip(values, mask, strict=True)], True, padding_side=side)

    prompts = [row[: int(own.nonzero()[0])] for row, own in zip(tokens, mask, strict=True)]
    given = {
        "prompt_ids": pad_sequence(prompts, True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, padding_side="left"),
        "completion_ids": rows(tokens), "completion_mask": rows(mask.long()), "old_per_token_logps": rows(old),
        "advantages": rows(buffer.advantages)[:, 0], "num_items_in_batch": mask.sum(),
    }
    model = hf_model(folders.hf)
    expected = trl_grpo.loss(model, given, tmp_path, temperature=0.8, **theirs)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for own, other in ((models.actor.model.tok_embeddings, model.model.embed_tokens),
                       (models.actor.model.output, model.lm_head)):
        assert_close(own.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
